"""The gradient's tile for a slice of the vocabulary: softmax minus the label's one-hot, unscaled by any coefficient.

    tile[r, v] = exp(residual[r]) * slope * (softmax(z[r])[v] - 1[v = label[r]])       slope: the cap's derivative

exp(z - lse) with lse rounded to float32 carries the factor exp(residual); the label's column gets it too, so that the
caller can take it out of the row with the coefficient. The label's column is expm1(logp), never a rounded probability
minus one: for p > 0.99 that difference would keep no digit in bfloat16. A token's
coefficient stays outside, so that it multiplies a T x H operand instead of T x V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.kernels.head import (
    Head,
    cap_slope,
    finish_logits,
    head_product,
    logits_tile_torch,
    tile_arguments,
)
from copg_kernels.kernels.language import jit, tl, triton
from copg_kernels.kernels.linear_logps_fwd import GROUP_N
from copg_kernels.kernels.pack_rows import PackedRows

# float16 flushes probabilities under 6e-8 to zero; the tile's entries are at most 1, so they can be stored larger.
TILE_SCALE = {torch.float16: 2.0**14}


@jit
def _softmax_minus_label_kernel(
    hidden_ptr,  # (T, H)
    weight,  # (V, H), pointer or tensor descriptor
    bias_ptr,  # (V,)
    row_index_ptr,  # (R,) int64
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    per_token_logps_ptr,  # (T,) float32
    lse_ptr,  # (2, T) float32
    tile_ptr,  # (R, tile_width), out
    T,
    R,
    V,
    H,
    stride_hidden,
    stride_weight,
    logit_scale,
    inv_softcap,
    inv_temperature,
    tile_scale,
    first_tile,
    tile_width,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # 1. GROUP_N row blocks share each slice of the weight while it is in L2.
    pid_n = tl.program_id(1) * GROUP_N + tl.program_id(0) % GROUP_N
    tile = tl.program_id(0) // GROUP_N
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_out = offs_n.to(tl.int64) * tile_width

    # 2. The GEMMs that read the tile run over all R rows, so ignored ones must be 0.
    num_rows = tl.load(num_rows_ptr)
    if pid_n * BLOCK_N >= num_rows:
        offs_c = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        zeros = tl.zeros((BLOCK_N, BLOCK_V), dtype=tile_ptr.dtype.element_ty)
        mask = (offs_n < R)[:, None] & (offs_c < tile_width)[None, :]
        tl.store(tile_ptr + offs_out[:, None] + offs_c[None, :], zeros, mask=mask)
        return
    mask_n = offs_n < num_rows
    rows = tl.load(row_index_ptr + offs_n, mask=mask_n, other=0)
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)

    # 3. The forward's logits again, then the probabilities; the label's column is expm1(logp).
    lse = tl.load(lse_ptr + rows, mask=mask_n, other=0.0)
    residual = tl.load(lse_ptr + tl.cast(T, tl.int64) + rows, mask=mask_n, other=0.0)
    label_value = tl.exp(residual) * _expm1(tl.load(per_token_logps_ptr + rows, mask=mask_n, other=0.0))
    parts = head_product(
        hidden_ptr, rows * stride_hidden, weight, first_tile + tile, V, H, stride_weight,
        USE_TMA, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    for part in tl.static_range(len(parts)):
        offs_c = tl.arange(0, BLOCK_V // len(parts))
        start_c = tile * BLOCK_V + part * (BLOCK_V // len(parts))
        start_v = first_tile * BLOCK_V + start_c
        z = finish_logits(
            parts[part], bias_ptr, start_v, V, logit_scale, inv_softcap, inv_temperature, HAS_BIAS, HAS_CAP
        )
        is_label = offs_c[None, :] == (label - start_v)[:, None]
        value = tl.where(is_label, label_value[:, None], tl.exp(z - lse[:, None])) * tile_scale
        if HAS_CAP:
            value *= cap_slope(z, inv_softcap, inv_temperature)
        value = tl.where(mask_n[:, None], value, 0.0).to(tile_ptr.dtype.element_ty)
        mask = (offs_n < R)[:, None] & (offs_c < tile_width - start_c)[None, :]
        tl.store(tile_ptr + (offs_out + start_c)[:, None] + offs_c[None, :], value, mask=mask)


@jit
def _expm1(x):
    """exp(x) - 1 for x <= 0: log(exp(x)) in the quotient undoes the rounding of exp(x) near x = 0."""
    p = tl.exp(x)
    near_zero = (p >= 0.5) & (p < 1.0)
    quotient = x / tl.log(tl.where(near_zero, p, 0.5))
    return tl.where(p == 1.0, x, (p - 1.0) * tl.where(near_zero, quotient, 1.0))


def softmax_minus_label(
    hidden_states: Tensor,
    head: Head,
    rows: PackedRows,
    per_token_logps: Tensor,
    lse: Tensor,
    start: int,
    out: Tensor,
) -> Tensor:
    """(T, H), head (V, H), packed rows, (T,), (2, T) -> out (R, width), TILE_SCALE * tile[:, start:start + width]."""
    blocks = head_blocks(hidden_states.device, hidden_states.dtype)
    R, width = out.shape
    assert start % blocks.BLOCK_V == 0 and out.is_contiguous()
    num_tiles, num_groups = triton.cdiv(width, blocks.BLOCK_V), triton.cdiv(R, blocks.BLOCK_N * GROUP_N)
    _softmax_minus_label_kernel[(GROUP_N * num_tiles, num_groups)](
        row_index_ptr=rows.row_index,
        labels_ptr=rows.labels,
        num_rows_ptr=rows.num_rows,
        per_token_logps_ptr=per_token_logps,
        lse_ptr=lse,
        tile_ptr=out,
        T=per_token_logps.numel(),
        R=R,
        tile_scale=TILE_SCALE.get(out.dtype, 1.0),
        first_tile=start // blocks.BLOCK_V,
        tile_width=width,
        GROUP_N=GROUP_N,
        **tile_arguments(hidden_states, head, blocks),
    )
    return out


def softmax_minus_label_torch(
    hidden_states: Tensor,
    head: Head,
    rows: PackedRows,
    per_token_logps: Tensor,
    lse: Tensor,
    start: int,
    out: Tensor,
) -> Tensor:
    """Twin: hidden_states are the packed rows (R, H) in the accumulation dtype."""
    slope = logits_tile_torch(hidden_states, head, start, start + out.shape[1], out)
    packed_lse, residual = lse.index_select(1, rows.row_index)
    out.sub_(packed_lse.unsqueeze(1)).exp_()
    labels = rows.labels - start
    held = ((labels >= 0) & (labels < out.shape[1])).nonzero().squeeze(1)
    out[held, labels[held]] = residual[held].exp() * per_token_logps[rows.row_index[held]].expm1()
    return out if slope is None else out.mul_(slope)
