"""Softmax tile -> its significant entries: of every block of 128 rows (or columns), the columns (or rows) that matter.

    entries[slot]       the entry of the list that a slot holds: significant for some member of the block
    values[slot, 0:128] its probabilities, minus 1 at the label, one per member of the block
    offsets[block]      the block's first slot

A GEMM with the tile then becomes one with `values` and gathered rows, `gather_product`. Both directions come from here:
blocks of rows that list columns for dX, blocks of columns that list rows for dW. Slots are counted, summed up and then
filled, in this order, so that they are the same every run and no program waits for another. What is left out is summed
per member of the block and per entry of the list. Where the slots do not suffice, `overflow` says so, on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.head import padded
from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice

BLOCK = 128
BLOCK_LIST = 64


class Pool(NamedTuple):
    """One direction's compact tile."""

    entries: Tensor  # (capacity,) int32
    values: Tensor  # (capacity, BLOCK)
    offsets: Tensor  # (blocks + 1,) int32
    order: Tensor  # (blocks,) int32: the longest first, so that none is left to run alone at the end
    dropped: Tensor  # (members of all blocks,) float32: mass that is not there
    dropped_list: Tensor  # (entries of the list,) float32: the same, seen from the other side
    overflow: Tensor  # (1,) int32


@jit
def _entries(
    tile_ptr,
    factor_ptr,
    labels_ptr,
    offs_i,  # [BLOCK] int64, members of the block
    offs_j,  # [BLOCK_LIST] int64, entries of the list
    num_members,
    num_entries,
    num_rows,
    stride_i,
    stride_j,
    eps,
    ROWS_IN_BLOCKS: tl.constexpr,
):
    """-> factor * tile, and which entries are significant."""
    # The vocabulary, padded: whole vectors are within the mask or beyond it.
    if ROWS_IN_BLOCKS:
        num_entries = tl.multiple_of(num_entries, 16)
    else:
        num_members = tl.multiple_of(num_members, 16)
    mask = (offs_i < num_members)[:, None] & (offs_j < num_entries)[None, :]
    offsets = offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
    p = tl.load(tile_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ROWS_IN_BLOCKS:
        counted = offs_i < num_rows
        factor = tl.load(factor_ptr + offs_i, mask=counted, other=0.0)[:, None]
        label = tl.load(labels_ptr + offs_i, mask=counted, other=-1)[:, None]
        is_label = label == offs_j[None, :]
    else:
        counted = offs_j < num_rows
        factor = tl.load(factor_ptr + offs_j, mask=counted, other=0.0)[None, :]
        label = tl.load(labels_ptr + offs_j, mask=counted, other=-1)[None, :]
        is_label = label == offs_i[:, None]
    p *= factor
    return p, (p >= eps) | (is_label & mask)


@jit
def _count_kernel(
    tile_ptr,  # softmax minus one-hot over factor
    factor_ptr,  # (R,) float32
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    counts_ptr,  # (blocks, list tiles) int32, out
    dropped_ptr,  # (list tiles, members) float32, out
    dropped_list_ptr,  # (blocks, entries) float32, out
    num_members,
    num_entries,
    num_list_tiles,
    stride_i,
    stride_j,
    eps,
    ROWS_IN_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
):
    block, list_tile = tl.program_id(0), tl.program_id(1)
    offs_i = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_j = (list_tile * BLOCK_LIST + tl.arange(0, BLOCK_LIST)).to(tl.int64)
    p, significant = _entries(
        tile_ptr, factor_ptr, labels_ptr, offs_i, offs_j, num_members, num_entries, tl.load(num_rows_ptr),
        stride_i, stride_j, eps, ROWS_IN_BLOCKS,
    )  # fmt: skip
    hit = tl.max(significant.to(tl.int32), 0)
    tl.store(counts_ptr + block * num_list_tiles + list_tile, tl.sum(hit, 0))
    left_out = tl.where(hit[None, :] == 0, p, 0.0)
    members = tl.cast(list_tile, tl.int64) * num_members + offs_i
    tl.store(dropped_ptr + members, tl.sum(left_out, 1), mask=offs_i < num_members)
    entries = tl.cast(block, tl.int64) * num_entries + offs_j
    tl.store(dropped_list_ptr + entries, tl.sum(left_out, 0), mask=offs_j < num_entries)


@jit
def _fill_kernel(
    tile_ptr,
    factor_ptr,
    labels_ptr,
    num_rows_ptr,
    ends_ptr,  # (blocks, list tiles) int32, running sum of the counts
    counts_ptr,  # (blocks, list tiles) int32
    entries_ptr,  # (capacity,) int32, out
    values_ptr,  # (capacity, BLOCK), out
    capacity,
    num_members,
    num_entries,
    num_list_tiles,
    stride_i,
    stride_j,
    eps,
    ROWS_IN_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
):
    block, list_tile = tl.program_id(0), tl.program_id(1)
    at = block * num_list_tiles + list_tile
    count = tl.load(counts_ptr + at)
    if count == 0:
        return
    offs_i = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    offs_j = (list_tile * BLOCK_LIST + tl.arange(0, BLOCK_LIST)).to(tl.int64)
    p, significant = _entries(
        tile_ptr, factor_ptr, labels_ptr, offs_i, offs_j, num_members, num_entries, tl.load(num_rows_ptr),
        stride_i, stride_j, eps, ROWS_IN_BLOCKS,
    )  # fmt: skip
    hit = tl.max(significant.to(tl.int32), 0)
    slot = tl.load(ends_ptr + at) - count + tl.cumsum(hit, 0) - 1
    kept = (hit != 0) & (slot < capacity)
    tl.store(entries_ptr + slot, offs_j.to(tl.int32), mask=kept)
    out_ptrs = values_ptr + slot.to(tl.int64)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]
    tl.store(out_ptrs, p, mask=kept[None, :] & (offs_i >= 0)[:, None])


def compact_tile(
    part: SoftmaxSlice, rows: PackedRows, eps: float, capacity: int, dtype: torch.dtype, *, rows_in_blocks: bool
) -> Pool:
    """The whole vocabulary's tile (R, V) -> the compact one, with room for so many slots."""
    # Past the vocabulary there are zeros, so that whole vectors can be read.
    tile = padded(part.tile)
    members, entries = tile.shape if rows_in_blocks else tile.shape[::-1]
    strides = tile.stride() if rows_in_blocks else tile.stride()[::-1]
    num_blocks, num_list_tiles = triton.cdiv(members, BLOCK), triton.cdiv(entries, BLOCK_LIST)
    counts = tile.new_empty((num_blocks, num_list_tiles), dtype=torch.int32)
    dropped = tile.new_empty((num_list_tiles, members), dtype=torch.float32)
    dropped_list = tile.new_empty((num_blocks, entries), dtype=torch.float32)
    shape = (members, entries, num_list_tiles, *strides, eps)
    options = dict(ROWS_IN_BLOCKS=rows_in_blocks, BLOCK=BLOCK, BLOCK_LIST=BLOCK_LIST, **NO_FUSION)
    grid = (num_blocks, num_list_tiles)
    operands = (tile, part.factor, rows.labels, rows.num_rows)
    _count_kernel[grid](*operands, counts, dropped, dropped_list, *shape, **options)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view(counts.shape)
    index = counts.new_empty((capacity,))
    values = tile.new_empty((capacity, BLOCK), dtype=dtype)
    _fill_kernel[grid](*operands, ends, counts, index, values, capacity, *shape, **options)
    offsets = torch.cat([ends.new_zeros(1), ends[:, -1]])
    order = offsets.diff().argsort(descending=True, stable=True).to(torch.int32)
    overflow = (offsets[-1:] > capacity).to(torch.int32)
    R, V = part.tile.shape
    members, entries = (R, V) if rows_in_blocks else (V, R)
    return Pool(index, values, offsets, order, dropped.sum(0)[:members], dropped_list.sum(0)[:entries], overflow)
