"""Every kernel, in every form, against float64 and as a hostile GPU would launch it: see `calls` and `launches`."""

from __future__ import annotations

import importlib
import pkgutil
from unittest import mock

import pytest
import torch

from copg_kernels import kernels
from copg_kernels.kernels.language import INTERPRETING
from tests import calls
from tests.calls import ALIGNED, EVEN, FULL, MULTIPLE, NARROW, ONE, ONE_MORE, PLAIN, PRIME, Call
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import assert_close, assert_logps_close

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")

BFLOAT16 = [
    *calls.calls([MULTIPLE], [torch.bfloat16], [PLAIN]),
    *calls.calls([PRIME, ONE, ONE_MORE, ALIGNED], [torch.bfloat16], [FULL]),
    *calls.calls([NARROW], [torch.bfloat16], [FULL], ["chunks"]),
]
OTHERS = [*calls.calls([PRIME], [torch.float32, torch.float16], [FULL])]
ON_A_GPU = [*calls.calls([EVEN], [torch.float32, torch.bfloat16, torch.float16], [PLAIN, FULL])]


@pytest.mark.parametrize("call", BFLOAT16 + OTHERS + (ON_A_GPU if DEVICE.type == "cuda" else []), ids=str)
def test_in_any_order_and_with_nothing_beside(call: Call):
    inputs, batch = calls.operands(call, DEVICE), calls.completions(call, DEVICE)
    with calls.room(call), audited():
        outcome = calls.run(call, inputs, batch, "triton")
    gold, base = (calls.reference(call, inputs, batch, dtype) for dtype in (torch.float64, torch.float32))
    for name, value in outcome.values.items():
        assert_logps_close(name, value, base.values[name], gold.values[name], largest_logit=10.0)
    for name, gradient in outcome.gradients.items():
        assert_close(name, gradient, base.gradients[name], gold.gradients[name], few_terms=True)


def audited():
    """On a GPU there is no order to choose and no page to take away."""
    if not INTERPRETING:
        return mock.patch.dict({})
    from tests import launches

    return launches.audited()


def test_every_kernel_is_among_the_calls_in_bfloat16(monkeypatch):
    """By their names: no kernel is run."""
    every = {
        kernel.fn.__name__: kernel
        for module in pkgutil.iter_modules(kernels.__path__)
        for name, kernel in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items()
        if name.endswith("_kernel")
    }
    launched: set[str] = set()
    for kind in {type(kernel) for kernel in every.values()}:
        monkeypatch.setattr(kind, "run", lambda self, *args, **options: launched.add(self.fn.__name__))
    for call in BFLOAT16:
        with calls.room(call):
            calls.run(call, calls.operands(call, DEVICE), calls.completions(call, DEVICE), "triton")
    assert len(every) >= 12 and launched == set(every)
