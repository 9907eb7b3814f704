"""How exact 16-bit operands come out: what separates providers that round their logits from those that do not.

A rounded logit costs ~0.02 nat, a completion adds up a thousand of them, and CoPG's coefficients see the sum. The
truth is float64 of the same bfloat16 operands. On a CPU, GEMMs of bfloat16 tensors sum in fp32 and round once, as
tensor cores do, so the errors are those of a GPU run though no time would be.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.accuracy import exact
from bench.checks import Checked, check, load_providers
from bench.inputs import Shape, make_inputs
from bench.measure import finite
from bench.memory import unweighed
from bench.providers import TRAINABLE

# Four completions of 1024 tokens; the size of the vocabulary and of H hardly moves the errors.
SHAPE = Shape("fidelity", 8192, 256, 4096, 1024)
REGIME = "rl"


def measure_fidelity(providers: tuple[str, ...], device: torch.device, shape: Shape = SHAPE) -> dict[str, Any]:
    inputs = make_inputs(shape, REGIME, torch.bfloat16, device)
    truth = exact(inputs, (TRAINABLE,), torch.float64)
    loaded, rows = load_providers(providers, device)
    for name, provider in loaded.items():
        if provider.log_probs is not None and not provider.compiles_per_shape:  # compiled eager rounds as eager does
            rows += check(name, provider, inputs, (TRAINABLE,), truth, unweighed)
    rows.sort(key=lambda row: providers.index(row.provider))
    return {"shape": shape._asdict(), "regime": REGIME, "dtype": "bfloat16", "rows": [_row(row) for row in rows]}


def _row(checked: Checked) -> dict[str, Any]:
    errors = {f"{name}_error": finite(value) for name, value in checked.errors._asdict().items()}
    status = "measured" if errors["logps_error"] is not None else checked.status
    return {"provider": checked.provider, "status": status, **errors}
