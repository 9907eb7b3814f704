"""Softmax tile -> which of its columns matter to a block of rows, and which of its rows to a block of columns.

One pass finds both: a program reads a square of the tile. What it finds stays as one byte per entry of a list, so that
the pass that fills the lists (`compact_tile`) compares nothing again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.head import padded
from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice

# Rows and columns of a square, and members of a block.
BLOCK = 128
SQUARE: dict[str, int] = dict(BLOCK=BLOCK, num_warps=8) | NO_FUSION


class Significant(NamedTuple):
    """Blocks of members (rows, or columns), each with a list of entries (columns, or rows) in tiles of BLOCK."""

    hits: Tensor  # (blocks, entries) uint8: 1 where some member of the block has p >= eps, or its label
    counts: Tensor  # (blocks, list tiles) int32
    num_members: int


@jit
def load_rows(
    tile_ptr,  # (R, padded_width)
    factor_ptr,  # (R,) float32
    start_n,
    offs_v,  # [BLOCK]
    mask_v,
    R,
    stride_tile,
    BLOCK_N: tl.constexpr,
):
    """-> factor * tile [BLOCK_N, BLOCK], its rows, and which of them there are."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < R
    # 64 bits to the block of rows, 32 within it.
    start = tile_ptr + tl.cast(start_n, tl.int64) * stride_tile
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_tile + offs_v[None, :]
    exps = tl.load(start + offsets, mask=mask_n[:, None] & mask_v[None, :], other=0.0)
    factor = tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0)
    return exps.to(tl.float32) * factor[:, None], offs_n, mask_n


@jit
def _count_significant_kernel(
    tile_ptr,  # (R, padded_width), softmax minus one-hot over factor
    factor_ptr,  # (R,) float32
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    column_hits_ptr,  # (row blocks, padded_width) uint8, out
    column_counts_ptr,  # (row blocks, column blocks) int32, out
    row_hits_ptr,  # (column blocks, R) uint8, out, or None
    row_counts_ptr,  # (column blocks, row blocks) int32, out, or None
    R,
    padded_width,
    stride_tile,
    eps,
    BLOCK: tl.constexpr,
):
    # Squares side by side run at the same time: memory likes long rows.
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    offs_v = column_block * BLOCK + tl.arange(0, BLOCK)
    mask_v = offs_v < padded_width
    p, offs_n, mask_n = load_rows(tile_ptr, factor_ptr, row_block * BLOCK, offs_v, mask_v, R, stride_tile, BLOCK)
    # The label's entry is p - 1, and kept whatever it is.
    label = tl.load(labels_ptr + offs_n, mask=offs_n < tl.load(num_rows_ptr), other=-1).to(tl.int32)
    size = tl.where(label[:, None] == offs_v[None, :], 1.0, p)

    hit = (tl.max(size, 0) >= eps).to(tl.int32)
    hits_ptrs = column_hits_ptr + tl.cast(row_block, tl.int64) * padded_width + offs_v
    tl.store(hits_ptrs, hit.to(tl.uint8), mask=mask_v)
    tl.store(column_counts_ptr + row_block * tl.num_programs(0) + column_block, tl.sum(hit, 0))
    if row_hits_ptr is not None:
        hit = (tl.max(size, 1) >= eps).to(tl.int32)
        hits_ptrs = row_hits_ptr + tl.cast(column_block, tl.int64) * R + offs_n
        tl.store(hits_ptrs, hit.to(tl.uint8), mask=mask_n)
        tl.store(row_counts_ptr + column_block * tl.num_programs(1) + row_block, tl.sum(hit, 0))


def count_significant(
    part: SoftmaxSlice, rows: PackedRows, eps: float, *, by_columns: bool
) -> tuple[Significant, Significant | None]:
    """The whole vocabulary's tile (R, V) -> of blocks of rows, and of blocks of columns."""
    # Past the vocabulary there are zeros, so that whole vectors can be read.
    tile = padded(part.tile)
    R, width = tile.shape
    of_rows = _nothing_yet(tile, R, width)
    of_columns = _nothing_yet(tile, width, R) if by_columns else None
    _count_significant_kernel[of_rows.counts.shape[::-1]](
        tile, part.factor, rows.labels, rows.num_rows, *of_rows[:2], *(of_columns or (None, None))[:2],
        R, width, tile.stride(0), eps, **SQUARE,
    )  # fmt: skip
    return of_rows, of_columns


def _nothing_yet(tile: Tensor, members: int, entries: int) -> Significant:
    blocks, list_tiles = triton.cdiv(members, BLOCK), triton.cdiv(entries, BLOCK)
    return Significant(
        tile.new_empty((blocks, entries), dtype=torch.uint8),
        tile.new_empty((blocks, list_tiles), dtype=torch.int32),
        members,
    )
