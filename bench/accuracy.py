"""The truth a provider is held to before it is timed, and how far from it counts as wrong.

The truth is the specification (`copg_kernels.reference`) on upcast operands, a few rows at a time: float64
on a CPU, fp32 with fp32 GEMMs on a GPU, for many cards have next to no float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.inputs import BenchInputs
from bench.providers import Provider, bind
from copg_kernels.reference import copg_coefficients_ref, linear_logps_bwd_ref, linear_logps_ref

WINDOW = 1024  # tokens over which log-probs are summed for the error of a sequence


class Errors(NamedTuple):
    logps: float  # largest error of the sum over WINDOW consecutive tokens, in nats
    dhidden: float  # relative L2
    dweight: float  # relative L2


# Beyond these a provider computes something else, and gets no time. In fp32, rounding stays ten times below.
# The 16-bit bounds let eager through, whose rounded logits cost up to a nat per 1024 tokens and, through the
# CoPG coefficients, several percent of the gradients: they catch mistakes, and the table shows the errors.
BOUNDS = {
    torch.float32: Errors(1e-2, 3e-4, 3e-4),
    torch.float16: Errors(0.5, 0.05, 0.05),
    torch.bfloat16: Errors(2.0, 0.2, 0.2),
}


class Truth(NamedTuple):
    token_logps: Tensor
    dhidden: Tensor
    dweight: Tensor


def exact(inputs: BenchInputs) -> Truth:
    """Log-probs and gradients of the CoPG loss, the logits in chunks of 64 MiB."""
    dtype = torch.float32 if inputs.hidden_states.is_cuda else torch.float64
    weight = inputs.lm_head_weight.detach().to(dtype)
    num_rows = max(1, 2**26 // (weight.element_size() * len(weight)))
    chunks = list(zip(inputs.hidden_states.detach().split(num_rows), inputs.labels.split(num_rows), strict=True))
    token_logps = torch.cat([linear_logps_ref(rows.to(dtype), weight, labels) for rows, labels in chunks])

    length = len(token_logps) // len(inputs.rewards)
    coefficients = copg_coefficients_ref(
        token_logps.double().view(-1, length).sum(1),
        inputs.ref_logps.double(),
        inputs.rewards.double(),
        beta=inputs.beta,
        group_size=inputs.group_size,
    )
    dlogps = coefficients.to(dtype).repeat_interleave(length).split(num_rows)
    dhidden, dweight = [], torch.zeros_like(weight)
    for (rows, labels), dlogp in zip(chunks, dlogps, strict=True):
        dx, dw, _ = linear_logps_bwd_ref(dlogp, rows.to(dtype), weight, labels)
        dhidden.append(dx)
        dweight += dw
    return Truth(token_logps, torch.cat(dhidden), dweight)


def measure_errors(provider: Provider, inputs: BenchInputs, truth: Truth) -> Errors:
    """Run both passes once."""
    (token_logps,), (dhidden, dweight) = (run() for run in bind(provider, inputs).values())
    window_errors = (token_logps.double() - truth.token_logps.double()).split(WINDOW)
    return Errors(
        max(abs(errors.sum().item()) for errors in window_errors),
        _relative_l2(dhidden, truth.dhidden),
        _relative_l2(dweight, truth.dweight),
    )


def wrong(errors: Errors, dtype: torch.dtype) -> str | None:
    """Which errors are out of bounds, or None. NaN is out of any bound."""
    names = ("log-probs", "dX", "dW")
    beyond = [
        f"{name} off by {error:.1e} (bound {bound:.0e})"
        for name, error, bound in zip(names, errors, BOUNDS[dtype], strict=True)
        if not error <= bound
    ]
    return "wrong numbers: " + ", ".join(beyond) if beyond else None


def _relative_l2(value: Tensor, truth: Tensor) -> float:
    # Row blocks, so that an upcast copy of a [V, H] gradient is never whole.
    difference = norm = 0.0
    for actual, exact_rows in zip(value.split(8192), truth.split(8192), strict=True):
        difference += (actual.double() - exact_rows.double()).square().sum().item()
        norm += exact_rows.double().square().sum().item()
    return (difference / norm) ** 0.5
