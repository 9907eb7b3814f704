"""The one tolerance policy: float64 of the same operands is the truth.

A result may be off by what float32 arithmetic costs (measured: the plain PyTorch reference in float32 on the same
operands, with a factor for another order of summation), and by what rounding to its own dtype costs (measured: the
truth rounded to that dtype, doubled because 16-bit GEMMs also round one operand). No constant is chosen to fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_FACTOR = 4
ROUNDING_FACTOR = 2
# Sums of a dozen rounded terms that cancel: their roundings do not average out.
FEW_TERMS_FACTOR = 4


def upcast(inputs: dict, dtype: torch.dtype) -> dict:
    """The same values in another float dtype, as leaves of a new graph where the originals were leaves."""

    def convert(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in inputs.items()}


def relative_error(actual: Tensor, gold: Tensor) -> float:
    """||actual - gold|| / ||gold||, in float64."""
    gold = gold.double()
    norm = gold.norm().item()
    difference = (actual.double() - gold).norm().item()
    return difference / norm if norm > 0 else difference


def assert_close(name: str, actual: Tensor, base: Tensor, gold: Tensor, *, few_terms: bool = False) -> None:
    """`actual` against the float64 `gold`, bounded by the error of `base`, the reference in float32."""
    assert actual.shape == gold.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(gold.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite at {(~torch.isfinite(actual)).nonzero()[:4].tolist()}"
    rounding = relative_error(gold.to(actual.dtype), gold) * (FEW_TERMS_FACTOR if few_terms else 1)
    bound = FLOAT32_FACTOR * (relative_error(base, gold) + torch.finfo(torch.float32).eps) + ROUNDING_FACTOR * rounding
    error = relative_error(actual, gold)
    worst = (actual.double() - gold.double()).abs().flatten().argmax().item() if actual.numel() else None
    assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.2e}; worst at flat index {worst}"


def assert_logps_close(name: str, actual: Tensor, base: Tensor, gold: Tensor, largest_logit: float) -> None:
    """Log-probabilities are differences of logits: their error is measured in nats, against the logits' own spacing."""
    assert torch.isfinite(actual).all(), f"{name}: not finite at {(~torch.isfinite(actual)).nonzero()[:4].tolist()}"
    spacing = torch.finfo(torch.float32).eps * max(1.0, largest_logit)
    bound = FLOAT32_FACTOR * ((base.double() - gold.double()).abs().max().item() + spacing)
    error = (actual.double() - gold.double()).abs().max().item()
    assert error <= bound, f"{name}: off by {error:.2e} nat > {bound:.2e}"
