"""Exponentials that stayed -> softmax minus one-hot: the label's entries, and what each row still lacks as a factor.

    factor[r]          = exp(reference[r] - lse[r])                        0 where not counted
    tile[r, label[r]]  = slope * at_label[r] / factor[r]                   at_label: expm1(logp), see row_slopes
    factor * tile      = slope * (softmax - onehot)                        slope: the cap's derivative

One entry of a row is written, the others stay as they are, unless the entropy has a gradient: then `add_entropy` puts
its part into them first. Where lse is too far from a row's reference for that, the kernel says so, takes lse as the
reference of the whole block of rows, and `softmax_minus_label` computes the block's tile once more, on the device's own
decision. Too far above the reference, the tile overflows. Too far below it, the factor does: at a low temperature the
rounding of a bfloat16 reference is tens of nats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.add_entropy import add_entropy, add_entropy_torch
from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.kernels.exp_tile import ExpTile, ScaledTile
from copg_kernels.kernels.head import Head, cap_slope
from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_slopes import RowSlopes
from copg_kernels.kernels.softmax_minus_label import softmax_minus_label

# Nats. exp(-60), a coefficient of 1e-5 and a hidden state of 1e-3 still make a normal float32 and bfloat16.
FARTHEST = tl.constexpr(60.0)


class SoftmaxSlice(NamedTuple):
    """[start, stop) of the vocabulary: factor * tile is softmax minus one-hot, times the cap's derivative."""

    start: int
    stop: int
    tile: Tensor  # (R, stop - start)
    factor: Tensor  # (R,)


@jit
def _place_labels_kernel(
    tile_ptr,  # (R, V), in and out
    reference_ptr,  # (R,) float32
    row_index_ptr,  # (R,) int64
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    label_logits_ptr,  # (R,) float32
    at_label_ptr,  # (T,) float32
    lse_ptr,  # (2, T) float32
    factor_ptr,  # (R,) float32, out
    redo_ptr,  # (row blocks,) int32, out
    T,
    R,
    stride_tile,
    inv_softcap,
    inv_temperature,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < tl.load(num_rows_ptr)
    rows = tl.load(row_index_ptr + offs_n, mask=mask_n, other=0)
    reference = tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=mask_n, other=0.0)
    residual = tl.load(lse_ptr + tl.cast(T, tl.int64) + rows, mask=mask_n, other=0.0)
    redo = tl.max(tl.abs(lse - reference), 0) > FARTHEST
    distance = residual + tl.where(redo, 0.0, lse - reference)
    tl.store(redo_ptr + tl.program_id(0), redo.to(tl.int32))
    tl.store(factor_ptr + offs_n, tl.where(mask_n, tl.exp(-distance), 0.0), mask=offs_n < R)

    at_label = tl.load(at_label_ptr + rows, mask=mask_n, other=0.0) * tl.exp(distance)
    if HAS_CAP:
        at_label *= cap_slope(tl.load(label_logits_ptr + offs_n, mask=mask_n, other=0.0), inv_softcap, inv_temperature)
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1)
    ptrs = tile_ptr + offs_n.to(tl.int64) * stride_tile + label
    # Another rank's shard of the vocabulary holds a label below 0.
    tl.store(ptrs, at_label.to(tile_ptr.dtype.element_ty), mask=mask_n & (label >= 0))


def place_labels(
    kept: ScaledTile, hidden_states: Tensor, head: Head, rows: PackedRows, slopes: RowSlopes, lse: Tensor
) -> list[SoftmaxSlice]:
    """Kept exponentials of packed rows, slopes, lse (2, T) -> the one slice that is the whole vocabulary."""
    R, V = kept.tile.shape
    factor = torch.empty_like(kept.reference) if V else torch.ones_like(kept.reference)
    if R and V:
        blocks = head_blocks(head.weight)
        num_blocks = triton.cdiv(R, blocks.BLOCK_N)
        redo = rows.num_rows.new_empty((num_blocks,), dtype=torch.int32)
        if slopes.of_others is not None:
            add_entropy(kept, head, rows, slopes.of_others, lse)
        _place_labels_kernel[(num_blocks,)](
            kept.tile, kept.reference, rows.row_index, rows.labels, rows.num_rows, kept.label_logits,
            slopes.at_label, lse, factor, redo, slopes.at_label.numel(), R, kept.tile.stride(0),
            inv_softcap=0.0 if head.softcap is None else 1.0 / head.softcap,
            inv_temperature=1.0 / head.temperature,
            HAS_CAP=head.softcap is not None, BLOCK_N=blocks.BLOCK_N, **NO_FUSION,
        )  # fmt: skip
        softmax_minus_label(hidden_states, head, rows, slopes, lse, 0, kept.tile, only=redo)
    return [SoftmaxSlice(0, V, kept.tile, factor)]


def place_labels_torch(
    kept: list[ExpTile], hidden_states: Tensor, head: Head, rows: PackedRows, slopes: RowSlopes, lse: Tensor
) -> list[SoftmaxSlice]:
    """Twin: a slice at a time, whose factor is exp(base - lse).

    A slice that holds less than exp(-60) of a row's mass is dropped from it, lest at_label / factor overflow.
    """
    at_labels = slopes.at_label[rows.row_index]
    exact_lse = lse.double().sum(0)[rows.row_index]
    slices = []
    for part in kept:
        difference = part.base - exact_lse
        negligible = difference < -60
        if negligible.any():
            part.tile[negligible] = 0
        factor = difference.masked_fill(negligible, 0.0).exp().to(part.tile.dtype)
        if slopes.of_others is not None:
            add_entropy_torch(part, head, rows, slopes.of_others, lse)
        at_label = at_labels[part.held] * part.label_slope / factor[part.held]
        part.tile[part.held, part.label_columns] = at_label
        slices.append(SoftmaxSlice(part.start, part.stop, part.tile, factor))
    return slices
