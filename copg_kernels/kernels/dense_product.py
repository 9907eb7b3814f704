"""out += scale * (tile @ source), if a flag of the device says so: what stands in where a compact tile overflowed.

Nobody waits for the flag: the kernel is launched always, and returns. Its programs are few, so that this costs
nothing, and each takes many tiles of the output; where it is needed it is a GEMM like the head's, with its blocks.
"""

from __future__ import annotations

from torch import Tensor

from copg_kernels.kernels.blocks import GROUP_N, head_blocks
from copg_kernels.kernels.head import compile_options, padded
from copg_kernels.kernels.language import TensorDescriptor, jit, tl

# A few for each of a GPU's multiprocessors.
PROGRAMS = 512


@jit
def _dense_product_kernel(
    overflow_ptr,  # (1,) int32
    tile,  # (members, entries), padded along the vocabulary: a tensor descriptor of its rows, or a pointer
    source,  # (entries, H): a tensor descriptor, or a pointer
    scale_ptr,  # (members,) float32, or None
    out_ptr,  # (members, H), in and out
    num_members,
    num_entries,
    H,
    stride_i,
    stride_k,
    stride_source,
    ROWS_IN_BLOCKS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    if tl.load(overflow_ptr) == 0:
        return
    # The vocabulary, padded: whole vectors are within the mask or beyond it.
    padded_members, padded_entries = num_members, num_entries
    if ROWS_IN_BLOCKS:
        padded_entries = tl.cdiv(num_entries, 16) * 16
    else:
        padded_members = tl.cdiv(num_members, 16) * 16
    # GROUP_N blocks of members share each block of the source while it is in L2.
    per_group = GROUP_N * tl.cdiv(H, BLOCK_H)
    num_tiles = tl.cdiv(num_members, BLOCK_N * GROUP_N) * per_group
    for at in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        start_n = (at // per_group * GROUP_N + at % GROUP_N) * BLOCK_N
        start_h = at % per_group // GROUP_N * BLOCK_H
        members = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        offs_h = start_h + tl.arange(0, BLOCK_H)
        acc = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
        # The last group may have fewer blocks.
        for first in range(0, tl.where(start_n < num_members, num_entries, 0), BLOCK_K):
            if USE_TMA:
                part = tile.load([start_n, first]) if ROWS_IN_BLOCKS else tl.trans(tile.load([first, start_n]))
                rows = source.load([first, start_h])
            else:
                offs_k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
                mask = (members < padded_members)[:, None] & (offs_k < padded_entries)[None, :]
                part = tl.load(tile + members[:, None] * stride_i + offs_k[None, :] * stride_k, mask=mask, other=0.0)
                mask = (offs_k < num_entries)[:, None] & (offs_h < H)[None, :]
                rows = tl.load(source + offs_k[:, None] * stride_source + offs_h[None, :], mask=mask, other=0.0)
            acc = tl.dot(part, rows, acc, input_precision=PRECISION)
        # In parts: what is read beside them takes registers as well.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_H // 2)), (0, 2, 1)))
        part0, part1 = tl.split(tl.permute(tl.reshape(left, (BLOCK_N, 2, BLOCK_H // 4)), (0, 2, 1)))
        part2, part3 = tl.split(tl.permute(tl.reshape(right, (BLOCK_N, 2, BLOCK_H // 4)), (0, 2, 1)))
        step: tl.constexpr = BLOCK_H // 4
        _add(out_ptr, part0, scale_ptr, members, start_h, num_members, H)
        _add(out_ptr, part1, scale_ptr, members, start_h + step, num_members, H)
        _add(out_ptr, part2, scale_ptr, members, start_h + 2 * step, num_members, H)
        _add(out_ptr, part3, scale_ptr, members, start_h + 3 * step, num_members, H)


@jit
def _add(out_ptr, product, scale_ptr, members, start_h, num_members, H):
    """scale * product -> added to out[members, start_h:]."""
    offs_h = start_h + tl.arange(0, product.shape[1])
    mask_n = members < num_members
    if scale_ptr is not None:
        product *= tl.load(scale_ptr + members, mask=mask_n, other=0.0)[:, None]
    out_ptrs = out_ptr + members[:, None] * H + offs_h[None, :]
    mask = mask_n[:, None] & (offs_h < H)[None, :]
    tl.store(out_ptrs, product + tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32), mask=mask)


def dense_product(
    overflow: Tensor, tile: Tensor, source: Tensor, scale: Tensor | None, out: Tensor, precision: str
) -> None:
    """out (members, H) += scale * (tile @ source), if overflow (1,) is set on the device.

    tile (R, V) or the transposed one, its rows as far apart as `row_stride` says.
    """
    (members, entries), H = tile.shape, out.shape[1]
    assert out.is_contiguous() and source.stride(1) == 1
    if not (members and entries):
        return
    rows_in_blocks = tile.stride(1) == 1
    tile = padded(tile) if rows_in_blocks else padded(tile.T).T
    blocks = head_blocks(source)
    operands, strides = (tile, source), tile.stride()
    if blocks.use_tma:
        square = [blocks.BLOCK_N, blocks.BLOCK_H]
        operands = (
            # A descriptor wants rows that are contiguous.
            TensorDescriptor.from_tensor(*((tile, square) if rows_in_blocks else (tile.T, square[::-1]))),
            TensorDescriptor.from_tensor(source, [blocks.BLOCK_H, blocks.BLOCK_V]),
        )
    _dense_product_kernel[(PROGRAMS,)](
        overflow, *operands, scale, out, members, entries, H, *strides, source.stride(0),
        ROWS_IN_BLOCKS=rows_in_blocks, USE_TMA=blocks.use_tma, PRECISION=precision,
        BLOCK_N=blocks.BLOCK_N, BLOCK_H=blocks.BLOCK_V, BLOCK_K=blocks.BLOCK_H, GROUP_N=GROUP_N,
        **compile_options(blocks),
    )  # fmt: skip
