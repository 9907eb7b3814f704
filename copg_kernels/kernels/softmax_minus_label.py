"""The gradient's tile for a slice of the vocabulary: softmax minus the label's one-hot, unscaled by any coefficient.

    tile[r, v] = exp(residual[r]) * slope * (softmax(z[r])[v] - 1[v = label[r]])       slope: the cap's derivative

and where the entropy has a gradient, its part as well: see row_slopes, where the label's entry comes from too.
exp(z - lse) with lse rounded to float32 carries the factor exp(residual); the label's column gets it too, so that the
caller can take it out of the row with the coefficient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import GROUP_N
from copg_kernels.kernels.head import (
    Head,
    cap_slope,
    head_logits,
    logits_tile_torch,
    out_arguments,
    padded,
    store_part,
    tile_arguments,
)
from copg_kernels.kernels.language import LN_2, LOG2_E, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.product_slices import blocks_of, products, way_of
from copg_kernels.kernels.row_slopes import RowSlopes, exponentials_with_weighted_logs
from copg_kernels.kernels.row_statistics import holds_label

# float16 flushes probabilities under 6e-8 to zero; the tile's entries are at most 1, so they can be stored larger.
TILE_SCALE = {torch.float16: 2.0**14}


@jit
def _softmax_minus_label_kernel(
    hidden,  # (R, H), packed; like weight and tile a pointer or a tensor descriptor
    product_ptr,  # (R, width) float32, or None: see head_logits
    weight,  # (V, H)
    bias_ptr,  # (V,)
    row_index_ptr,  # (R,) int64
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    at_label_ptr,  # (T,) float32
    of_others_ptr,  # (2, T) float32, or None: see RowSlopes
    lse_ptr,  # (2, T) float32
    only_ptr,  # (row blocks,) int32: which blocks to compute, or None for all
    tile,  # (R, padded width), out
    T,
    R,
    V,
    H,
    stride_weight,
    stride_product,
    padded_width,
    stride_tile,
    logit_scale,
    inv_softcap,
    inv_temperature,
    tile_scale,
    first_tile,
    BIAS_ON_ACC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # 1. GROUP_N row blocks share each slice of the weight while it is in L2.
    pid_n = tl.program_id(1) * GROUP_N + tl.program_id(0) % GROUP_N
    pid_v = tl.program_id(0) // GROUP_N
    if pid_n * BLOCK_N >= R:
        return
    if only_ptr is not None:
        if tl.load(only_ptr + pid_n) == 0:
            return

    # 2. The GEMMs that read the tile run over all R rows, so ignored ones must be 0.
    num_rows = tl.load(num_rows_ptr)
    if pid_n * BLOCK_N >= num_rows:
        zeros = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.float32)
        for part in tl.static_range(4):
            start_c = pid_v * BLOCK_V + part * (BLOCK_V // 4)
            store_part(tile, zeros, pid_n * BLOCK_N, start_c, R, padded_width, stride_tile, USE_TMA)
        return

    # 3. The forward's logits again, then the probabilities. What belongs to a row is read after the GEMM, through which
    # it would hold registers that are not there.
    parts = head_logits(
        hidden, product_ptr, pid_n * BLOCK_N, weight, bias_ptr, first_tile + pid_v, first_tile, R, V, H,
        stride_weight, stride_product, logit_scale, inv_softcap, inv_temperature,
        BIAS_ON_ACC, HAS_SCALE, HAS_CAP, USE_TMA, EVEN_V, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    rows = tl.load(row_index_ptr + offs_n, mask=mask_n, other=0)
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
    lse = tl.load(lse_ptr + rows, mask=mask_n, other=float("inf"))
    row_scale = tl.where(mask_n, tile_scale, 0.0)[:, None]
    if of_others_ptr is not None:
        shift = tl.load(of_others_ptr + rows, mask=mask_n, other=0.0)
        weighted = tl.load(of_others_ptr + tl.cast(T, tl.int64) + rows, mask=mask_n, other=0.0) * LN_2
    start_v = (first_tile + pid_v) * BLOCK_V
    has_label = holds_label(label, start_v, BLOCK_V)
    for part in tl.static_range(len(parts)):
        z = parts[part]
        distance = (z - lse[:, None]) * LOG2_E
        value = tl.exp2(distance)
        if of_others_ptr is not None:
            # 2 ** -150 is 0 in float32, and 0 times -inf would be NaN.
            value *= shift[:, None] + weighted[:, None] * tl.maximum(distance, -150.0)
        if has_label:
            # Read here, in the few tiles that need it, because there are no registers left to keep it in.
            rows = tl.load(row_index_ptr + offs_n, mask=mask_n, other=0)
            residual = tl.load(lse_ptr + tl.cast(T, tl.int64) + rows, mask=mask_n, other=0.0)
            label_value = tl.exp(residual) * tl.load(at_label_ptr + rows, mask=mask_n, other=0.0)
            offs_v = start_v + part * (BLOCK_V // len(parts)) + tl.arange(0, BLOCK_V // len(parts))
            value = tl.where(offs_v[None, :] == label[:, None], label_value[:, None], value)
        if HAS_CAP:
            value *= cap_slope(z, inv_softcap, inv_temperature)
        value *= row_scale
        start_c = pid_v * BLOCK_V + part * (BLOCK_V // len(parts))
        store_part(tile, value, pid_n * BLOCK_N, start_c, R, padded_width, stride_tile, USE_TMA)


def softmax_minus_label(
    hidden_states: Tensor,
    head: Head,
    rows: PackedRows,
    slopes: RowSlopes,
    lse: Tensor,
    start: int,
    out: Tensor,
    only: Tensor | None = None,
) -> Tensor:
    """Packed rows (R, H), head (V, H), slopes, lse (2, T) -> out (R, width), TILE_SCALE * tile[:, start:start + width].

    Rows of out are `row_stride` apart, and what lies between becomes 0.
    `only` (row blocks,) int32, where given, leaves the blocks of BLOCK_N rows alone that it has 0 for.
    """
    # Which blocks are meant only the device knows, and cuBLAS would compute them all.
    way = "fused" if only is not None else way_of(head.weight, "logps")
    blocks = blocks_of(head.weight, way)
    R, width = out.shape
    assert start % blocks.BLOCK_V == 0 and out.stride(0) % 64 == 0 and out.stride(1) == 1
    num_groups = triton.cdiv(R, blocks.BLOCK_N * GROUP_N)
    for first, last, product in products(hidden_states, head.weight, start, start + width, blocks, way):
        _softmax_minus_label_kernel[(GROUP_N * triton.cdiv(last - first, blocks.BLOCK_V), num_groups)](
            row_index_ptr=rows.row_index,
            labels_ptr=rows.labels,
            num_rows_ptr=rows.num_rows,
            at_label_ptr=slopes.at_label,
            of_others_ptr=slopes.of_others,
            lse_ptr=lse,
            only_ptr=only,
            T=slopes.at_label.numel(),
            tile_scale=TILE_SCALE.get(out.dtype, 1.0),
            GROUP_N=GROUP_N,
            **out_arguments(padded(out[:, first - start : last - start]), blocks),
            **tile_arguments(hidden_states, head, blocks, first, product),
        )
    return out


def softmax_minus_label_torch(
    hidden_states: Tensor,
    head: Head,
    rows: PackedRows,
    slopes: RowSlopes,
    lse: Tensor,
    start: int,
    out: Tensor,
) -> Tensor:
    """Twin: hidden_states are the packed rows (R, H) in the accumulation dtype."""
    slope = logits_tile_torch(hidden_states, head, start, start + out.shape[1], out)
    packed_lse, residual = lse.index_select(1, rows.row_index)
    out.sub_(packed_lse.unsqueeze(1))
    if slopes.of_others is None:
        out.exp_()
    else:
        exponentials_with_weighted_logs(out, *slopes.of_others.index_select(1, rows.row_index))
    labels = rows.labels - start
    held = ((labels >= 0) & (labels < out.shape[1])).nonzero().squeeze(1)
    out[held, labels[held]] = residual[held].exp() * slopes.at_label[rows.row_index[held]]
    return out if slope is None else out.mul_(slope)
