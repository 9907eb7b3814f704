"""Rows gathered and scaled: the only places where a token's coefficient meets a matrix.

out[i] = scale[i] * source[index[i]]      and exactly 0 where scale[i] = 0, whatever the source holds there
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton

BLOCK_H = 1024


@jit
def _scale_rows_kernel(
    source_ptr,  # (S, H)
    index_ptr,  # (N,) int64, or None: row i of the source is row i of the result
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
    source_row = row if index_ptr is None else tl.load(index_ptr + row)
    source = tl.load(source_ptr + source_row * stride_source + offs_h, mask=mask, other=0.0)
    value = tl.where(scale != 0.0, source.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + row * H + offs_h, value.to(out_ptr.dtype.element_ty), mask=offs_h < H)


def scale_rows(
    source: Tensor, index: Tensor | None, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """(S, H), (N,) or None, (N,) float32 -> (N, H) in `dtype`, the product rounded once; into out, where given."""
    N, H = scale.numel(), source.shape[1]
    out = source.new_empty((N, H), dtype=dtype) if out is None else out
    assert out.is_contiguous() and out.dtype == dtype
    _scale_rows_kernel[(N, triton.cdiv(H, BLOCK_H))](
        source, index, scale, out, H, source.stride(0), BLOCK_H=BLOCK_H, **NO_FUSION
    )
    return out


def scale_rows_torch(
    source: Tensor, index: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Twin of `scale_rows`."""
    kept = scale.nonzero().squeeze(1)
    out = source.new_empty((index.numel(), source.shape[1]), dtype=dtype) if out is None else out
    if kept.numel() < scale.numel():
        out.zero_()
    return out.index_copy_(0, kept, (source[index[kept]] * scale[kept].unsqueeze(1)).to(dtype))


def scale_packed(hidden_states: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed rows (R, H), (R,) float32 -> (R, H) in `dtype`, in their order."""
    return scale_rows(hidden_states, None, scale, dtype)


def scale_packed_torch(hidden_states: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin of `scale_packed`."""
    assert hidden_states.dtype == dtype
    return hidden_states * scale.unsqueeze(1)
