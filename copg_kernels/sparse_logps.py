"""Log-probabilities whose backward pass reads a compact softmax instead of computing the logits again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from copg_kernels import checks
from copg_kernels.kernels.head import Head
from copg_kernels.ops import on_device, plain_head, refuse_second_derivative, row_major
from copg_kernels.schedules import sparse_softmax
from copg_kernels.schedules.recompute import Needs
from copg_kernels.schedules.sparse_softmax import Sparsity


@torch.compiler.disable
def sparse_logps(
    hidden_states: Tensor,
    labels: Tensor,
    head: Head,
    ignore_index: int,
    sparse_eps: float,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Sparsity]:
    """(T, H), (T,), head (V, H) -> per_token_logps (T,), differentiable, and what was kept of the softmax.

    How much is kept depends on the values, which torch.compile cannot trace.
    """
    checks.require_labels(labels, head.weight.shape[0], ignore_index)
    options = dict(ignore_index=ignore_index, workspace_bytes=workspace_bytes, backend=backend)
    per_token_logps, statistics = _SparseLogps.apply(
        hidden_states, head.weight, head.bias, labels, head[2:], sparse_eps, options
    )
    return per_token_logps, Sparsity(*statistics.unbind())


def with_sparsity(per_token_logps: Tensor, sparsity: Sparsity) -> Tensor:
    per_token_logps.sparsity = sparsity  # type: ignore[attr-defined]
    return per_token_logps


class _SparseLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_options: tuple[float, float | None, float],
        sparse_eps: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        hidden_states, head = row_major(hidden_states), plain_head(lm_head_weight, bias, *logit_options)
        needs = Needs(*ctx.needs_input_grad[:3])
        with on_device(hidden_states, options["workspace_bytes"]):
            per_token_logps, lse, ctx.compact = sparse_softmax.token_logps(
                hidden_states, head, labels, needs, sparse_eps=sparse_eps, **options
            )
            statistics = sparse_softmax.statistics(ctx.compact, head.weight.shape[0], options["backend"])
        ctx.logit_options, ctx.options = logit_options, options
        ctx.save_for_backward(hidden_states, *head[:2], labels, per_token_logps, lse)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return per_token_logps, statistics

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if dlogps is None:
            return (None,) * 7
        hidden_states, weight, bias, labels, per_token_logps, lse = ctx.saved_tensors
        needs, head = Needs(*ctx.needs_input_grad[:3]), Head(weight, bias, *ctx.logit_options)
        operands = (dlogps.contiguous(), hidden_states, head, labels, per_token_logps, lse, ctx.compact, needs)
        with on_device(hidden_states, ctx.options["workspace_bytes"]):
            gradients = sparse_softmax.token_logps_bwd(*operands, **ctx.options)
        dtype = hidden_states.dtype
        wanted = (gradient.to(dtype) if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *wanted, None, None, None, None
