"""The compact softmax of the torch backend: found while the logits stream by, in float32, block by block.

For every block of rows, with its significant columns K and their probabilities P (rows x K), everything per token:

    dX    = -c * (P W[K] + dropped * (tail W) + (p_label - 1) W[label])
    dW[K] -= P^T (c X)        dW -= tail (dropped * c X summed over tokens)        dW[label] -= (p_label - 1) (c X)
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import SPLIT_TORCH
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.kernels.significant_columns import Compact, significant_columns_torch
from copg_kernels.schedules import forward, recompute
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.tile_ops import counted_rows

# Nats. Below it, another rounding of a logit is at most 2e-5 of a probability.
_LARGE = 128.0


def compact_rows(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    needs: Needs,
    *,
    ignore_index: int,
    sparse_eps: float,
    workspace_bytes: int,
    give_up: bool,
) -> tuple[Partials, PackedRows, Compact] | None:
    """(T, H), (T,) -> row statistics, the rows they are of, their softmax; None as in `significant_columns_torch`."""
    packed, rows = counted_rows(hidden_states, labels, ignore_index, "torch")
    found = significant_columns_torch(packed, head, rows.labels, sparse_eps, workspace_bytes, give_up=give_up)
    return None if found is None else (found[0], rows, found[1])


def token_logps_bwd(
    dlogps: Tensor,
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    per_token_logps: Tensor,
    lse: Tensor,
    compact: Compact,
    needs: Needs,
    *,
    ignore_index: int,
    workspace_bytes: int,
) -> Gradients:
    """(T,) upstream gradient -> gradients in the accumulation dtype, empty where not needed."""
    packed, rows = counted_rows(hidden_states, labels, ignore_index, "torch")
    scale = dlogps.index_select(0, rows.row_index).to(packed.dtype) * -head.slope
    scale.masked_fill_(compact.overflow, 0.0)
    gradients = Gradients(*(hidden_states.new_empty(0, dtype=packed.dtype) for _ in needs))
    if needs.hidden_states:
        dhidden = packed.new_zeros(hidden_states.shape)
        dhidden.index_copy_(0, rows.row_index, _hidden_product(compact, head, rows.labels, scale))
        gradients = gradients._replace(hidden_states=dhidden)
    if needs.weight:
        scaled = packed * scale.unsqueeze(1)
        gradients = gradients._replace(weight=_head_product(compact, rows.labels, scaled))
    if needs.bias:
        gradients = gradients._replace(bias=_head_product(compact, rows.labels, scale.unsqueeze(1)).squeeze(1))
    if not compact.overflow.any():
        return gradients
    of_overflow = torch.full_like(labels, ignore_index)
    exact_rows = rows.row_index[compact.overflow]
    of_overflow[exact_rows] = labels[exact_rows]
    if lse[0].abs().max() > _LARGE:
        # A GEMM of fewer rows may round its logits otherwise: at 4e4 that is 4e-3 of a probability.
        per_token_logps, lse, _ = forward.token_logps(
            hidden_states, head, of_overflow,
            ignore_index=ignore_index, workspace_bytes=workspace_bytes, backend="torch",
        )  # fmt: skip
    exact = recompute.token_logps_bwd(
        dlogps, hidden_states, head, of_overflow, per_token_logps, lse, needs,
        ignore_index=ignore_index, workspace_bytes=workspace_bytes, backend="torch",
    )  # fmt: skip
    return Gradients(*(a.add_(b) for a, b in zip(gradients, exact, strict=True)))


def _hidden_product(compact: Compact, head: Head, labels: Tensor, scale: Tensor) -> Tensor:
    """scale * (P - onehot) weight, (R, H)."""
    dtype = scale.dtype
    product = head.weight[labels].to(dtype).mul_(compact.label_values.unsqueeze(1))
    product.addr_(compact.dropped, _mean_row(compact.tail, head.weight))
    for rows, columns, values in compact.blocks():
        product[rows].addmm_(values, head.weight.index_select(0, columns).to(dtype))
    return product.mul_(scale.unsqueeze(1))


def _mean_row(tail: Tensor, weight: Tensor) -> Tensor:
    """tail @ weight, (H,); 16-bit weights are upcast a slice at a time."""
    parts = zip(tail.split(SPLIT_TORCH), weight.split(SPLIT_TORCH), strict=True)
    return torch.stack([mass @ rows.to(tail.dtype) for mass, rows in parts]).sum(0)


def _head_product(compact: Compact, labels: Tensor, scaled: Tensor) -> Tensor:
    """(P - onehot)^T scaled, (V, width); scaled (R, width)."""
    product = torch.outer(compact.tail, compact.dropped @ scaled)
    for rows, columns, values in compact.blocks():
        # A block's columns are distinct: gathered, added to and put back, in a fixed order.
        product.index_copy_(0, columns, product.index_select(0, columns).addmm_(values.T, scaled[rows]))
    at_labels = scaled * compact.label_values.unsqueeze(1)
    if product.is_cuda:  # where index_add_ adds in no fixed order
        return product.index_put_((labels,), at_labels, accumulate=True)
    return product.index_add_(0, labels, at_labels)


def statistics(compact: Compact, vocab_size: int) -> Tensor:
    """Density, mean dropped mass, share of rows that overflowed: (3,)."""
    num_rows, overflowed = compact.dropped.numel(), int(compact.overflow.sum())
    sparse_rows = max(1, num_rows - overflowed)
    density, dropped = compact.values.numel() / (sparse_rows * vocab_size), float(compact.dropped.sum()) / sparse_rows
    return compact.dropped.new_tensor([density, dropped, overflowed / max(1, num_rows)])
