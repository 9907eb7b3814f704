"""out += scale * (tile @ source), if a flag of the device says so: what stands in where a compact tile overflowed."""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.compact_tile import BLOCK
from copg_kernels.kernels.gather_product import BLOCK_H, BLOCK_K, launch_options
from copg_kernels.kernels.language import jit, tl, triton


@jit
def _dense_product_kernel(
    overflow_ptr,  # (1,) int32
    tile_ptr,  # (members, K) by its strides
    source_ptr,  # (K, H)
    scale_ptr,  # (members,) float32, or None
    out_ptr,  # (members, H), in and out
    num_members,
    num_entries,
    H,
    stride_i,
    stride_k,
    stride_source,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if tl.load(overflow_ptr) == 0:
        return
    members = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_i, mask_h = members < num_members, offs_h < H
    acc = tl.zeros((BLOCK, BLOCK_H), dtype=tl.float32)
    for first in range(0, num_entries, BLOCK_K):
        offs_k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < num_entries
        tile_ptrs = tile_ptr + members[:, None] * stride_i + offs_k[None, :] * stride_k
        tile = tl.load(tile_ptrs, mask=mask_i[:, None] & mask_k[None, :], other=0.0)
        source_ptrs = source_ptr + offs_k[:, None] * stride_source + offs_h[None, :]
        source = tl.load(source_ptrs, mask=mask_k[:, None] & mask_h[None, :], other=0.0)
        acc = tl.dot(tile, source, acc, input_precision=PRECISION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + members, mask=mask_i, other=0.0)[:, None]
    out_ptrs = out_ptr + members[:, None] * H + offs_h[None, :]
    mask = mask_i[:, None] & mask_h[None, :]
    tl.store(out_ptrs, acc + tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32), mask=mask)


def dense_product(
    overflow: Tensor, tile: Tensor, source: Tensor, scale: Tensor | None, out: Tensor, precision: str
) -> None:
    """out (members, H) += scale * (tile @ source), if overflow (1,) is set on the device."""
    (members, entries), H = tile.shape, out.shape[1]
    assert out.is_contiguous() and source.stride(1) == 1
    block_h = BLOCK_H[source.element_size()]
    _dense_product_kernel[(triton.cdiv(members, BLOCK), triton.cdiv(H, block_h))](
        overflow, tile, source, scale, out, members, entries, H, *tile.stride(), source.stride(0),
        PRECISION=precision, BLOCK=BLOCK, BLOCK_H=block_h, BLOCK_K=BLOCK_K,
        **launch_options(torch.version.hip is not None),
    )  # fmt: skip
