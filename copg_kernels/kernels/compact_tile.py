"""Softmax tile -> its significant entries: of every block of 128 rows (or columns), the columns (or rows) that matter.

    entries[slot]       the entry of the list that a slot holds: significant for some member of the block
    values[slot, 0:128] its probabilities, minus 1 at the label, one per member of the block
    offsets[block]      the block's first slot

A GEMM with the tile then becomes one with `values` and gathered rows, `gather_product`. Both directions come from the
same two passes over the tile: blocks of rows that list columns for dX, blocks of columns that list rows for dW. Slots
are counted, summed up and then filled, in this order, so that they are the same every run and no program waits for
another. What is left out is summed per member of the block and per entry of the list. Where the slots do not suffice,
`overflow` says so, on the device.

A row of the tile holds a block of columns side by side, as `values` would: where the tile stays, it serves as `values`
of the blocks of columns, and nothing is copied for them. Otherwise both directions share their slots, those of the
blocks of columns behind the others, where the blocks of rows alone may still fit.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import device_kind
from copg_kernels.kernels.count_significant import BLOCK, SQUARE, Significant, count_significant, load_rows
from copg_kernels.kernels.head import padded
from copg_kernels.kernels.language import jit, tl
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice


class Columns(Enum):
    """What becomes of the blocks of columns."""

    UNWANTED = 0
    IN_TILE = 1
    COPIED = 2


class Pool(NamedTuple):
    """One direction's compact tile."""

    entries: Tensor  # (slots,) int32
    values: Tensor  # (slots, BLOCK), or the tile, padded (entries of the list, members of all blocks)
    offsets: Tensor  # (blocks + 1,) int32
    order: Tensor  # (blocks,) int32: the longest first, so that none is left to run alone at the end
    dropped: Tensor  # (members of all blocks,) float32: mass that is not there
    dropped_list: Tensor  # (entries of the list,) float32: the same, seen from the other side
    overflow: Tensor  # (1,) int32
    in_tile: bool  # values is the tile: each entry of the list once, and its factor still to come


class _Slots(NamedTuple):
    """One direction's, as the kernel fills them."""

    hits: Tensor  # see Significant
    starts: Tensor  # (blocks, list tiles) int32: the first slot of each square
    dropped: Tensor  # (list tiles, members) float32, out
    dropped_list: Tensor  # (blocks, entries) float32, out
    offsets: Tensor  # (blocks + 1,) int32: where each block's start


@jit
def _fill_kernel(
    tile_ptr,  # (R, padded_width), softmax minus one-hot over factor
    factor_ptr,  # (R,) float32
    column_hits_ptr,  # blocks of rows, which list columns: see _Slots
    column_starts_ptr,
    row_dropped_ptr,
    column_dropped_list_ptr,
    row_hits_ptr,  # blocks of columns, which list rows; with those below None where they are not wanted
    row_starts_ptr,
    column_dropped_ptr,
    row_dropped_list_ptr,
    entries_ptr,  # (num_slots,) int32, out
    values_ptr,  # (capacity, BLOCK), out
    capacity,
    num_slots,
    R,
    padded_width,
    stride_tile,
    COPY_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column_block, row_block = tl.program_id(0), tl.program_id(1)

    # 1. The slots of the block of rows: one per column that it lists.
    offs_v = column_block * BLOCK + tl.arange(0, BLOCK)
    mask_v = offs_v < padded_width
    of_columns = tl.cast(row_block, tl.int64) * padded_width + offs_v
    column_hit = tl.load(column_hits_ptr + of_columns, mask=mask_v, other=0).to(tl.int32)
    first_column = tl.load(column_starts_ptr + row_block * tl.num_programs(0) + column_block)
    column_slot = first_column + tl.cumsum(column_hit, 0) - 1
    column_kept = (column_hit != 0) & (column_slot < capacity)
    tl.store(entries_ptr + column_slot, offs_v, mask=column_kept)
    column_dropped_list = tl.zeros((BLOCK,), dtype=tl.float32)
    column_dropped = tl.zeros((BLOCK,), dtype=tl.float32)
    if row_hits_ptr is not None:
        first_row = tl.load(row_starts_ptr + column_block * tl.num_programs(1) + row_block)

    # 2. Its values, and what other columns hold; half of the rows at a time, which registers have room for.
    for half in tl.static_range(2):
        member = half * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        p, offs_n, mask_n = load_rows(
            tile_ptr, factor_ptr, row_block * BLOCK + half * (BLOCK // 2), offs_v, mask_v, R, stride_tile, BLOCK // 2
        )
        of_rows = tl.cast(column_block, tl.int64) * R + offs_n
        left_out = tl.where(column_hit[None, :] != 0, 0.0, p)
        tl.store(row_dropped_ptr + of_rows, tl.sum(left_out, 1), mask=mask_n)
        column_dropped_list += tl.sum(left_out, 0)
        values = p.to(values_ptr.dtype.element_ty)
        out_ptrs = values_ptr + column_slot.to(tl.int64)[None, :] * BLOCK + member[:, None]
        tl.store(out_ptrs, values, mask=column_kept[None, :] & (member >= 0)[:, None])

        # 3. The same for the block of columns.
        if row_hits_ptr is not None:
            row_hit = tl.load(row_hits_ptr + of_rows, mask=mask_n, other=0).to(tl.int32)
            row_slot = first_row + tl.cumsum(row_hit, 0) - 1
            first_row += tl.sum(row_hit, 0)
            row_kept = (row_hit != 0) & (row_slot < num_slots)
            tl.store(entries_ptr + row_slot, offs_n, mask=row_kept)
            if COPY_COLUMNS:
                out_ptrs = values_ptr + row_slot.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
                tl.store(out_ptrs, values, mask=row_kept[:, None] & (offs_v >= 0)[None, :])
            left_out = tl.where(row_hit[:, None] != 0, 0.0, p)
            tl.store(row_dropped_list_ptr + of_rows, tl.sum(left_out, 1), mask=mask_n)
            column_dropped += tl.sum(left_out, 0)

    tl.store(column_dropped_list_ptr + of_columns, column_dropped_list, mask=mask_v)
    if row_hits_ptr is not None:
        tl.store(column_dropped_ptr + of_columns, column_dropped, mask=mask_v)


def compact_tile(
    part: SoftmaxSlice, rows: PackedRows, eps: float, capacity: int, columns: Columns
) -> tuple[Pool, Pool | None]:
    """The whole vocabulary's tile (R, V) -> blocks of rows, and blocks of columns, in so many slots.

    Copied, both share them; else each has as many, and those of the blocks of columns are 4 bytes each.
    """
    found_rows, found_columns = count_significant(part, rows, eps, by_columns=columns != Columns.UNWANTED)
    tile, (R, V) = padded(part.tile), part.tile.shape
    num_slots = capacity * (2 if columns == Columns.IN_TILE else 1)
    entries, values = tile.new_empty((num_slots,), dtype=torch.int32), tile.new_empty((capacity, BLOCK))
    by_rows = _slots(found_rows, entries.new_zeros(1))
    by_columns = None
    if found_columns is not None:
        behind = entries.new_full((1,), capacity) if columns == Columns.IN_TILE else by_rows.offsets[-1:]
        by_columns = _slots(found_columns, behind)
    _fill_kernel[found_rows.counts.shape[::-1]](
        tile, part.factor, *by_rows[:-1], *(by_columns or [None] * len(by_rows))[:-1], entries, values,
        capacity, num_slots, R, tile.shape[1], tile.stride(0),
        COPY_COLUMNS=columns == Columns.COPIED, **SQUARE, **_registers(tile.device),
    )  # fmt: skip
    pool = _pool(by_rows, entries[:capacity], values, R, V, in_tile=False)
    if by_columns is None:
        return pool, None
    in_tile = columns == Columns.IN_TILE
    return pool, _pool(by_columns, entries, tile if in_tile else values, V, R, in_tile=in_tile)


def _registers(device: torch.device) -> dict[str, int]:
    """All there are: two programs per multiprocessor, at 128, would spill with one version of Triton or the other."""
    return {} if device_kind(device) == "gfx942" else dict(maxnreg=255)


def _slots(found: Significant, first: Tensor) -> _Slots:
    """Room for what was counted, from slot `first` (1,) on."""
    (blocks, num_entries), list_tiles = found.hits.shape, found.counts.shape[1]
    ends = found.counts.flatten().cumsum(0, dtype=torch.int32).view(found.counts.shape).add_(first)
    dropped = found.hits.new_empty((list_tiles, found.num_members), dtype=torch.float32)
    dropped_list = found.hits.new_empty((blocks, num_entries), dtype=torch.float32)
    return _Slots(found.hits, ends - found.counts, dropped, dropped_list, torch.cat([first, ends[:, -1]]))


def _pool(slots: _Slots, entries: Tensor, values: Tensor, num_members: int, num_entries: int, *, in_tile: bool) -> Pool:
    offsets = slots.offsets
    return Pool(
        entries,
        values,
        offsets,
        order=offsets.diff().argsort(descending=True, stable=True).to(torch.int32),
        # Past the vocabulary there is nothing.
        dropped=slots.dropped.sum(0)[:num_members],
        dropped_list=slots.dropped_list.sum(0)[:num_entries],
        overflow=(offsets[-1:] > entries.numel()).to(torch.int32),
        in_tile=in_tile,
    )
