"""out += scale * (tile @ source), if a flag of the device says so: what stands in where a compact tile overflowed."""

from __future__ import annotations

from torch import Tensor

from copg_kernels.kernels.count_significant import BLOCK
from copg_kernels.kernels.gather_product import BLOCK_K, block_width, launch_options
from copg_kernels.kernels.head import padded
from copg_kernels.kernels.language import jit, tl, triton


@jit
def _dense_product_kernel(
    overflow_ptr,  # (1,) int32
    tile_ptr,  # (members, K) by its strides, padded along the vocabulary
    source_ptr,  # (K, H)
    scale_ptr,  # (members,) float32, or None
    out_ptr,  # (members, H), in and out
    num_members,
    num_entries,
    H,
    stride_i,
    stride_k,
    stride_source,
    ROWS_IN_BLOCKS: tl.constexpr,
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
    # The vocabulary, padded: whole vectors are within the mask or beyond it.
    padded_members, padded_entries = num_members, num_entries
    if ROWS_IN_BLOCKS:
        padded_entries = tl.cdiv(num_entries, 16) * 16
    else:
        padded_members = tl.cdiv(num_members, 16) * 16
    acc = tl.zeros((BLOCK, BLOCK_H), dtype=tl.float32)
    for first in range(0, num_entries, BLOCK_K):
        offs_k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < num_entries
        tile_ptrs = tile_ptr + members[:, None] * stride_i + offs_k[None, :] * stride_k
        mask = (members < padded_members)[:, None] & (offs_k < padded_entries)[None, :]
        tile = tl.load(tile_ptrs, mask=mask, other=0.0)
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
    """out (members, H) += scale * (tile @ source), if overflow (1,) is set on the device.

    tile (R, V) or the transposed one, its rows as far apart as `row_stride` says.
    """
    (members, entries), H = tile.shape, out.shape[1]
    assert out.is_contiguous() and source.stride(1) == 1
    rows_in_blocks = tile.stride(1) == 1
    tile = padded(tile) if rows_in_blocks else padded(tile.T).T
    block_h = block_width(source)
    _dense_product_kernel[(triton.cdiv(members, BLOCK), triton.cdiv(H, block_h))](
        overflow, tile, source, scale, out, members, entries, H, *tile.stride(), source.stride(0),
        ROWS_IN_BLOCKS=rows_in_blocks, PRECISION=precision, BLOCK=BLOCK, BLOCK_H=block_h, BLOCK_K=BLOCK_K,
        **launch_options(out.device),
    )  # fmt: skip
