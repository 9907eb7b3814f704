"""Rows gathered and scaled: the only places where a token's coefficient meets a matrix.

out[i] = scale[i] * source[index[i]]      and exactly 0 where scale[i] = 0, whatever the source holds there
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.language import jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows

BLOCK_H = 1024


@jit
def _scale_rows_kernel(
    source_ptr,  # (S, H)
    index_ptr,  # (N,) int64
    scale_ptr,  # (N,) float32
    out_ptr,  # (N, H), out
    H,
    stride_source,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    # One copy per column: the interpreter cannot combine a scalar comparison with a vector mask.
    scale = tl.load(scale_ptr + row + tl.zeros_like(offs_h))
    mask = (offs_h < H) & (scale != 0.0)
    source = tl.load(source_ptr + tl.load(index_ptr + row) * stride_source + offs_h, mask=mask, other=0.0)
    value = tl.where(scale != 0.0, source.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + row * H + offs_h, value.to(out_ptr.dtype.element_ty), mask=offs_h < H)


def scale_rows(source: Tensor, index: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, H), (N,), (N,) float32 -> (N, H) in `dtype`, the product rounded once."""
    N, H = index.numel(), source.shape[1]
    out = source.new_empty((N, H), dtype=dtype)
    _scale_rows_kernel[(N, triton.cdiv(H, BLOCK_H))](source, index, scale, out, H, source.stride(0), BLOCK_H=BLOCK_H)
    return out


def scale_rows_torch(source: Tensor, index: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin of `scale_rows`."""
    kept = scale.nonzero().squeeze(1)
    out = source.new_zeros((index.numel(), source.shape[1]), dtype=dtype)
    return out.index_copy_(0, kept, (source[index[kept]] * scale[kept].unsqueeze(1)).to(dtype))


def scale_counted(hidden_states: Tensor, rows: PackedRows, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, H), (R,) scale of the packed rows -> (R, H)."""
    return scale_rows(hidden_states, rows.row_index, scale, dtype)


def scale_counted_torch(hidden_states: Tensor, rows: PackedRows, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin: hidden_states are the packed rows already, in `dtype`."""
    assert hidden_states.dtype == dtype
    return hidden_states * scale.unsqueeze(1)
