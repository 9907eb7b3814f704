"""A loss whose gradients were computed along with it, as autograd sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from copg_kernels.ops import refuse_second_derivative, scaled_once


def with_gradients(
    value: Tensor, inputs: Sequence[Tensor | None], gradients: Iterable[Tensor], needs: Sequence[bool], backend: str
) -> Tensor:
    """value, whose gradient by each input is the one given where it is needed, times the upstream one.

    Gradients have as many elements as their inputs; they may wait in a wider dtype.
    """
    wanted = [(x, gradient) for x, gradient, need in zip(inputs, gradients, needs, strict=True) if need]
    return _KnownGradients.apply(value, backend, [gradient for _, gradient in wanted], *(x for x, _ in wanted))


class _KnownGradients(torch.autograd.Function):
    """value, with gradients that are there already, and those of what else it was computed from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, backend: str, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.backend = backend
        ctx.like = [(x.shape, x.dtype) for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple:
        refuse_second_derivative()
        pairs = zip(scaled_once(ctx.saved_tensors, dvalue, ctx.backend), ctx.like, strict=True)
        return dvalue, None, None, *(gradient.to(dtype).view(shape) for gradient, (shape, dtype) in pairs)
