"""The truth a provider is held to before it is timed, and how far from it counts as wrong.

The truth is the specification (`copg_kernels.reference`) on upcast operands, a few rows at a time: float64
on a CPU, fp32 with fp32 GEMMs on a GPU, for many cards have next to no float64.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from bench.composition import entropy_coef, num_counted
from bench.inputs import BenchInputs
from bench.providers import BONUS, FROZEN, MEAN_CE, TRAINABLE, UPSTREAM
from copg_kernels.reference import copg_coefficients_ref, linear_entropy_ref, linear_logps_bwd_ref, linear_logps_ref

WINDOW = 1024  # tokens over which log-probs are summed for the error of a sequence


class Errors(NamedTuple):
    """None: what the pass does not return."""

    logps: float | None = None  # largest error of the sum over WINDOW consecutive tokens, in nats
    dhidden: float | None = None  # relative L2
    dweight: float | None = None  # relative L2


# Beyond these a provider computes something else, and gets no time. In fp32, rounding stays ten times below.
# The 16-bit bounds let eager through, whose rounded logits cost up to a nat per 1024 tokens and, through the
# CoPG coefficients of a pair that is nearly even, a third of the gradient: they catch mistakes, which cost all of
# it, and the table shows the errors. A provider that leaves entries out by design has a bound of its own for
# gradients, `Provider.gradient_error`, where that is wider.
BOUNDS: dict[torch.dtype, tuple[float, float, float]] = {
    torch.float32: (1e-2, 3e-4, 3e-4),
    torch.float16: (0.5, 0.1, 0.1),
    torch.bfloat16: (2.0, 0.5, 0.5),
}


class Truth(NamedTuple):
    token_logps: Tensor
    gradients: dict[str, tuple[Tensor, Tensor]]  # dhidden and dweight by pass


def exact(inputs: BenchInputs, passes: Collection[str], dtype: torch.dtype | None = None) -> Truth:
    """Log-probs, and gradients for each of `passes` that has them, the logits in chunks of 64 MiB."""
    dtype = dtype or (torch.float32 if inputs.hidden_states.is_cuda else torch.float64)
    hidden_states = inputs.hidden_states.detach()
    weight = inputs.lm_head_weight.detach().to(dtype)
    num_rows = max(1, 2**26 // (weight.element_size() * len(weight)))
    chunks = list(zip(hidden_states.split(num_rows), inputs.labels.split(num_rows), strict=True))
    token_logps = torch.cat([linear_logps_ref(rows.to(dtype), weight, labels) for rows, labels in chunks])

    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    for name, upstream in _upstream(inputs, token_logps, passes).items():
        dhidden, dweight = [], torch.zeros_like(weight)
        for (rows, labels), dlogps in zip(chunks, upstream.to(dtype).split(num_rows), strict=True):
            dx, dw, _ = linear_logps_bwd_ref(dlogps, rows.to(dtype), weight, labels)
            dhidden.append(dx)
            dweight += dw
        gradients[name] = torch.cat(dhidden), dweight
    if TRAINABLE in gradients:
        gradients[FROZEN] = gradients[TRAINABLE]
    if BONUS in passes:
        of_bonus = _entropy_gradients(chunks, weight, -entropy_coef(inputs) / num_counted(inputs))
        dhidden_part, dweight_part = gradients[TRAINABLE]
        gradients[BONUS] = dhidden_part + of_bonus[0], dweight_part + of_bonus[1]
    return Truth(token_logps, gradients)


def _entropy_gradients(chunks: list[tuple[Tensor, Tensor]], weight: Tensor, upstream: float) -> tuple[Tensor, Tensor]:
    """dhidden and dweight where every entropy has the same upstream gradient: autograd through the specification."""
    leaf, dhidden, dweight = weight.detach().requires_grad_(), [], torch.zeros_like(weight)
    for hidden_states, labels in chunks:
        rows = hidden_states.to(weight.dtype).detach().requires_grad_()
        dx, dw = torch.autograd.grad(upstream * linear_entropy_ref(rows, leaf, labels).sum(), (rows, leaf))
        dhidden.append(dx)
        dweight += dw
    return torch.cat(dhidden), dweight


def _upstream(inputs: BenchInputs, token_logps: Tensor, passes: Collection[str]) -> dict[str, Tensor]:
    """(T,) gradient of each pass's loss in the token log-probs; three passes have that of a trainable head."""
    upstream = {}
    if any(name in passes for name in (TRAINABLE, FROZEN, BONUS)):
        length = len(token_logps) // len(inputs.rewards)
        coefficients = copg_coefficients_ref(
            token_logps.double().view(-1, length).sum(1),
            inputs.ref_logps.double(),
            inputs.rewards.double(),
            beta=inputs.beta,
            group_size=inputs.group_size,
        )
        upstream[TRAINABLE] = coefficients.repeat_interleave(length)
    if UPSTREAM in passes:
        upstream[UPSTREAM] = inputs.dlogps
    if MEAN_CE in passes:
        upstream[MEAN_CE] = torch.full_like(inputs.dlogps, -1 / num_counted(inputs))
    return upstream


def logps_error(token_logps: Tensor, truth: Truth) -> Errors:
    window_errors = (token_logps.double() - truth.token_logps.double()).split(WINDOW)
    sums = torch.stack([errors.sum() for errors in window_errors])
    return Errors(logps=sums.abs().max().item())  # NaN stays NaN


def gradient_errors(pass_name: str, gradients: tuple[Tensor, ...], truth: Truth) -> Errors:
    """The head's gradient is missing where the head is frozen."""
    pairs = zip(gradients, truth.gradients[pass_name], strict=False)
    return Errors(None, *(_relative_l2(value, exact_value) for value, exact_value in pairs))


def wrong(errors: Errors, dtype: torch.dtype, gradient_error: float = 0.0) -> str | None:
    """Which errors are out of bounds, or None; those of gradients are at least `gradient_error`. NaN is out of any."""
    names, (logps, dhidden, dweight) = ("log-probs", "dX", "dW"), BOUNDS[dtype]
    bounds = (logps, max(dhidden, gradient_error), max(dweight, gradient_error))
    beyond = [
        f"{name} off by {error:.1e} (bound {bound:.0e})"
        for name, error, bound in zip(names, errors, bounds, strict=True)
        if error is not None and not error <= bound
    ]
    return "wrong numbers: " + ", ".join(beyond) if beyond else None


def _relative_l2(value: Tensor, truth: Tensor) -> float:
    # Row blocks, so that an upcast copy of a [V, H] gradient is never whole.
    difference = norm = 0.0
    for actual, exact_rows in zip(value.split(8192), truth.split(8192), strict=True):
        difference += (actual.double() - exact_rows.double()).square().sum().item()
        norm += exact_rows.double().square().sum().item()
    return (difference / norm) ** 0.5
