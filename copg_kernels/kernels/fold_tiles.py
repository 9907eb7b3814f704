"""Row statistics of tiles -> those of the streaming pass's splits, merged in its order, to the bit."""

from __future__ import annotations

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.row_statistics import (
    LOWEST,
    Partials,
    Wanted,
    empty_partials,
    merge_squares,
    merge_statistics,
    merge_weighted,
    store_wanted,
)

BLOCK_R = 128


@jit
def _fold_tiles_kernel(
    tile_max_ptr,  # (num_tiles, R) float32
    tile_sum_ptr,  # (num_tiles, R) float32
    tile_weighted_ptr,  # (num_tiles, R) float32, or None; like the next three
    tile_squares_ptr,
    tile_logits_ptr,
    tile_before_ptr,
    partial_max_ptr,  # (S, R) float32, out
    partial_sum_ptr,  # (S, R) float32, out
    partial_weighted_ptr,  # (S, R) float32, out, or None; like the next three
    partial_squares_ptr,
    partial_logits_ptr,
    partial_before_ptr,
    R,
    num_tiles,
    TILES_PER_SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    mask_r = offs_r < R
    running_max = tl.full((BLOCK_R,), LOWEST, dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    running_weighted = tl.zeros((BLOCK_R,), dtype=tl.float32)
    running_squares = tl.zeros((BLOCK_R,), dtype=tl.float32)
    running_logits = tl.zeros((BLOCK_R,), dtype=tl.float32)
    running_before = tl.full((BLOCK_R,), LOWEST, dtype=tl.float32)
    for tile in range(split * TILES_PER_SPLIT, tl.minimum((split + 1) * TILES_PER_SPLIT, num_tiles)):
        offset = tl.cast(tile, tl.int64) * R + offs_r
        tile_max = tl.load(tile_max_ptr + offset, mask=mask_r, other=0.0)
        tile_sum = tl.load(tile_sum_ptr + offset, mask=mask_r, other=0.0)
        if tile_weighted_ptr is not None:
            tile_weighted = tl.load(tile_weighted_ptr + offset, mask=mask_r, other=0.0)
            running_weighted = merge_weighted(
                running_max, running_sum, running_weighted, tile_max, tile_sum, tile_weighted
            )
        if tile_squares_ptr is not None:
            tile_squares = tl.load(tile_squares_ptr + offset, mask=mask_r, other=0.0)
            running_squares = merge_squares(running_max, running_squares, tile_max, tile_squares)
        if tile_logits_ptr is not None:
            running_logits += tl.load(tile_logits_ptr + offset, mask=mask_r, other=0.0)
        if tile_before_ptr is not None:
            before = tl.load(tile_before_ptr + offset, mask=mask_r, other=0.0)
            running_before = tl.maximum(running_before, before)
        running_max, running_sum = merge_statistics(running_max, running_sum, tile_max, tile_sum)
    offset = split.to(tl.int64) * R + offs_r
    tl.store(partial_max_ptr + offset, running_max, mask=mask_r)
    tl.store(partial_sum_ptr + offset, running_sum, mask=mask_r)
    store_wanted(partial_weighted_ptr, offset, running_weighted, mask_r)
    store_wanted(partial_squares_ptr, offset, running_squares, mask_r)
    store_wanted(partial_logits_ptr, offset, running_logits, mask_r)
    store_wanted(partial_before_ptr, offset, running_before, mask_r)


def fold_tiles(tiles: Partials, tiles_per_split: int, wanted: Wanted) -> Partials:
    """Statistics (num_tiles, R) of tiles -> (S, R) of each split, and the labels' logits; rows past num_rows are not
    meant."""
    num_tiles, R = tiles.max.shape
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    splits = empty_partials(num_splits, R, tiles.max.device, wanted)._replace(label_logits=tiles.label_logits)
    if R:
        _fold_tiles_kernel[(triton.cdiv(R, BLOCK_R), num_splits)](
            tiles.max, tiles.sum, tiles.weighted, tiles.squares, tiles.logits, tiles.before,
            splits.max, splits.sum, splits.weighted, splits.squares, splits.logits, splits.before, R, num_tiles,
            TILES_PER_SPLIT=tiles_per_split, BLOCK_R=BLOCK_R, **NO_FUSION,
        )  # fmt: skip
    return splits
