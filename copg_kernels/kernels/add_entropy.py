"""The entropy's part of the gradient, put into exponentials that stayed: one pass over the tile instead of a GEMM.

    tile[r, v] = slope * E (shift[r] + weight[r] * log p)      E = exp(z - reference) as it was kept, log p = log E +
                                                               reference - lse; slope: the cap's derivative

shift and weight are those of row_slopes; the label's entry is put in afterwards (`place_labels`). A bfloat16 E knows
its logarithm to 2^-9. That is an error of p * 2^-9 in an entry, as much as rounding p itself has made, and none at the
label. The cap's derivative waits for this pass too, for E times a slope would not tell z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.exp_tile import ExpTile, ScaledTile
from copg_kernels.kernels.head import Head, cap_slope
from copg_kernels.kernels.language import LN_2, NO_FUSION, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_slopes import add_weighted_logs

BLOCK_V = 1024


@jit
def _add_entropy_kernel(
    tile_ptr,  # (R, V), in and out
    reference_ptr,  # (R,) float32
    row_index_ptr,  # (R,) int64
    num_rows_ptr,  # (1,) int64
    lse_ptr,  # (2, T) float32
    of_others_ptr,  # (2, T) float32
    T,
    V,
    stride_tile,
    inv_softcap,
    inv_temperature,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows_ptr):
        return
    token = tl.load(row_index_ptr + row)
    reference = tl.load(reference_ptr + row)
    weight = tl.load(of_others_ptr + T + token)
    shift = tl.load(of_others_ptr + token) + weight * (reference - tl.load(lse_ptr + token))
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    ptrs = tile_ptr + row * stride_tile + offs_v
    kept = tl.load(ptrs, mask=offs_v < V, other=0.0).to(tl.float32)
    # Of 0, which has no logarithm, that of the least normal float32: 0 times it is 0.
    log = tl.log2(tl.maximum(kept, 1.1754943508222875e-38)) * LN_2
    value = kept * (shift + weight * log)
    if HAS_CAP:
        value *= cap_slope(log + reference, inv_softcap, inv_temperature)
    tl.store(ptrs, value.to(tile_ptr.dtype.element_ty), mask=offs_v < V)


def add_entropy(kept: ScaledTile, head: Head, rows: PackedRows, of_others: Tensor, lse: Tensor) -> None:
    """Exponentials without the cap's derivative -> in place; (2, T) of `RowSlopes`, lse (2, T)."""
    R, V = kept.tile.shape
    if R:
        _add_entropy_kernel[(R, triton.cdiv(V, BLOCK_V))](
            kept.tile, kept.reference, rows.row_index, rows.num_rows, lse, of_others,
            lse.shape[1], V, kept.tile.stride(0),
            inv_softcap=0.0 if head.softcap is None else 1.0 / head.softcap,
            inv_temperature=1.0 / head.temperature,
            HAS_CAP=head.softcap is not None, BLOCK_V=BLOCK_V, **NO_FUSION,
        )  # fmt: skip


def add_entropy_torch(part: ExpTile, head: Head, rows: PackedRows, of_others: Tensor, lse: Tensor) -> None:
    """Twin, of one slice of the vocabulary."""
    shift, weight = of_others.index_select(1, rows.row_index)
    shift = (shift + weight * (part.base - lse[0, rows.row_index])).to(shift.dtype)
    slope = None
    if head.softcap is not None:
        z = part.tile.clamp_min(torch.finfo(part.tile.dtype).tiny).log_().add_(part.base.unsqueeze(1))
        slope = 1 - z.mul_(head.temperature / head.softcap).square_()
    add_weighted_logs(part.tile, shift, weight)
    if slope is not None:
        part.tile.mul_(slope)
