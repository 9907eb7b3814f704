"""Row statistics of tiles -> those of the streaming pass's splits, merged in its order, to the bit."""

from __future__ import annotations

from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.row_statistics import LOWEST, merge_statistics, merge_weighted

BLOCK_R = 128


@jit
def _fold_tiles_kernel(
    tile_max_ptr,  # (num_tiles, R) float32
    tile_sum_ptr,  # (num_tiles, R) float32
    tile_weighted_ptr,  # (num_tiles, R) float32, or None
    partial_max_ptr,  # (S, R) float32, out
    partial_sum_ptr,  # (S, R) float32, out
    partial_weighted_ptr,  # (S, R) float32, out, or None
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
    for tile in range(split * TILES_PER_SPLIT, tl.minimum((split + 1) * TILES_PER_SPLIT, num_tiles)):
        offset = tl.cast(tile, tl.int64) * R + offs_r
        tile_max = tl.load(tile_max_ptr + offset, mask=mask_r, other=0.0)
        tile_sum = tl.load(tile_sum_ptr + offset, mask=mask_r, other=0.0)
        if tile_weighted_ptr is not None:
            tile_weighted = tl.load(tile_weighted_ptr + offset, mask=mask_r, other=0.0)
            running_weighted = merge_weighted(
                running_max, running_sum, running_weighted, tile_max, tile_sum, tile_weighted
            )
        running_max, running_sum = merge_statistics(running_max, running_sum, tile_max, tile_sum)
    offset = split.to(tl.int64) * R + offs_r
    tl.store(partial_max_ptr + offset, running_max, mask=mask_r)
    tl.store(partial_sum_ptr + offset, running_sum, mask=mask_r)
    if tile_weighted_ptr is not None:
        tl.store(partial_weighted_ptr + offset, running_weighted, mask=mask_r)


def fold_tiles(
    tile_max: Tensor, tile_sum: Tensor, tile_weighted: Tensor | None, tiles_per_split: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(num_tiles, R) each -> maximum, sum and weighted sum of each split, (S, R); rows past num_rows are not meant."""
    num_tiles, R = tile_max.shape
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    partial_max, partial_sum = tile_max.new_empty((2, num_splits, R))
    partial_weighted = None if tile_weighted is None else tile_max.new_empty((num_splits, R))
    if R:
        _fold_tiles_kernel[(triton.cdiv(R, BLOCK_R), num_splits)](
            tile_max, tile_sum, tile_weighted, partial_max, partial_sum, partial_weighted, R, num_tiles,
            TILES_PER_SPLIT=tiles_per_split, BLOCK_R=BLOCK_R, **NO_FUSION,
        )  # fmt: skip
    return partial_max, partial_sum, partial_weighted
