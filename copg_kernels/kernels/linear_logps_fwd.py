"""Streaming forward pass: hidden states x head weight -> row statistics of the logits, which are never stored.

For each counted row and each split of the vocabulary, in float32, with the label's own logit left out of the sums:

    partial_max[s, r]  = max_{v in split s} z[r, v]
    partial_sum[s, r]  = sum_{v in split s, v != label} exp(z[r, v] - partial_max[s, r])
    label_logits[r]    = z[r, label]

and what else is wanted of the same logits (row_statistics). Leaving the label out keeps a confident token exact:
log p = -log(1 + exp(lse_others - z_label)) has full relative precision where z_label - lse has none. No two programs
write to one place: no atomics, the same bits every run.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from copg_kernels.kernels.blocks import GROUP_N
from copg_kernels.kernels.exp_tile import exp_tile_torch, partials_of
from copg_kernels.kernels.head import Head, head_logits, lowest_logit, tile_arguments
from copg_kernels.kernels.language import LN_2, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.product_slices import blocks_of, products, way_of
from copg_kernels.kernels.row_statistics import (
    LOWEST,
    NOTHING,
    Partials,
    Wanted,
    computed,
    empty_partials,
    exponentials,
    holds_label,
    largest_before,
    merge_squares,
    merge_statistics,
    merge_weighted,
    read_back,
    store_wanted,
    sum_of_logits,
    take_out_label,
    tile_maximum,
    weighted_terms,
)


@jit
def _linear_logps_fwd_kernel(
    hidden,  # (R, H), packed; like weight a pointer or a tensor descriptor
    product_ptr,  # (R, width) float32, or None: see head_logits
    weight,  # (V, H)
    bias_ptr,  # (V,)
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    partial_max_ptr,  # (S, R) float32, out
    partial_sum_ptr,  # (S, R) float32, out
    partial_weighted_ptr,  # (S, R) float32, out, or None; like the next three
    partial_squares_ptr,
    partial_logits_ptr,
    partial_before_ptr,
    label_logits_ptr,  # (R,) float32, out
    first_tile,
    R,
    V,
    H,
    stride_weight,
    stride_product,
    logit_scale,
    inv_softcap,
    inv_temperature,
    GROUP_N: tl.constexpr,
    TILES_PER_SPLIT: tl.constexpr,
    BIAS_ON_ACC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # 1. Which rows and which split are mine: GROUP_N row blocks walk through the splits side by side.
    pid_n = tl.program_id(1) * GROUP_N + tl.program_id(0) % GROUP_N
    split = first_tile // TILES_PER_SPLIT + tl.program_id(0) // GROUP_N
    num_rows = tl.load(num_rows_ptr)
    if pid_n * BLOCK_N >= num_rows:
        return
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)

    # 2. Running maximum and sum over the split's tiles.
    running_max = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    running_weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    running_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    running_before = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    # These sums wait for the next tile in memory: there is no register left that could live through the epilogue.
    first = split.to(tl.int64) * R
    store_wanted(partial_logits_ptr, first + offs_n, running_sum, mask_n)
    begin = split * TILES_PER_SPLIT
    end = tl.minimum(begin + TILES_PER_SPLIT, tl.cdiv(V, BLOCK_V))
    # Hoisting the epilogue's column indices out of the loop would cost the registers that the accumulator needs.
    for tile in tl.range(begin, end, disable_licm=True):
        parts = head_logits(
            hidden, product_ptr, pid_n * BLOCK_N, weight, bias_ptr, tile, first_tile, R, V, H,
            stride_weight, stride_product, logit_scale, inv_softcap, inv_temperature,
            BIAS_ON_ACC, HAS_SCALE, HAS_CAP, USE_TMA, EVEN_V, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        tile_max = tile_maximum(parts)
        lowest = lowest_logit(inv_softcap, inv_temperature, HAS_CAP)
        has_label = holds_label(label, tile * BLOCK_V, BLOCK_V)
        if partial_before_ptr is not None:
            before = largest_before(parts, tile_max, has_label, label, tile * BLOCK_V, BLOCK_V)
            running_before = tl.maximum(running_before, before)
        if partial_logits_ptr is not None:
            tile_logits = sum_of_logits(parts, tile * BLOCK_V, V, EVEN_V, BLOCK_V)
            so_far = read_back(partial_logits_ptr + first + offs_n, mask_n)
            tl.store(partial_logits_ptr + first + offs_n, so_far + tile_logits, mask=mask_n)
        tile_label = tl.zeros((BLOCK_N,), dtype=tl.float32)
        tile_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
        sums = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.float32)
        for part in tl.static_range(len(parts)):
            start_v = tile * BLOCK_V + part * (BLOCK_V // len(parts))
            z, at_label = take_out_label(parts[part], has_label, label, start_v, lowest)
            tile_label += at_label
            exps, distance = exponentials(z, tile_max)
            sums += exps
            if partial_weighted_ptr is not None:
                weighted += weighted_terms(exps, distance)
            if partial_squares_ptr is not None:
                tile_squares += tl.sum(exps * exps, 1)
        is_here = (label >= tile * BLOCK_V) & (label < (tile + 1) * BLOCK_V)
        tl.store(label_logits_ptr + offs_n, tile_label, mask=mask_n & is_here)
        tile_sum = tl.sum(sums, 1)
        if partial_weighted_ptr is not None:
            tile_weighted = tl.sum(weighted, 1) * LN_2
            running_weighted = merge_weighted(
                running_max, running_sum, running_weighted, tile_max, tile_sum, tile_weighted
            )
        if partial_squares_ptr is not None:
            running_squares = merge_squares(running_max, running_squares, tile_max, tile_squares)
        running_max, running_sum = merge_statistics(running_max, running_sum, tile_max, tile_sum)

    # 3. One write per row and split.
    offset = split.to(tl.int64) * R + offs_n
    tl.store(partial_max_ptr + offset, running_max, mask=mask_n)
    tl.store(partial_sum_ptr + offset, running_sum, mask=mask_n)
    store_wanted(partial_weighted_ptr, offset, running_weighted, mask_n)
    store_wanted(partial_squares_ptr, offset, running_squares, mask_n)
    store_wanted(partial_before_ptr, offset, running_before, mask_n)


def linear_logps_fwd(
    hidden_states: Tensor, head: Head, rows: PackedRows, width: int, *, wanted: Wanted = NOTHING
) -> Partials:
    """Packed rows (R, H), head (V, H) -> partial statistics of every counted row, and those that `wanted` needs.

    The tile stays in registers, and its splits are the block table's: width is for the twin.
    """
    R, V = rows.row_index.numel(), head.weight.shape[0]
    way = way_of(head.weight, "logps")
    blocks = blocks_of(head.weight, way, many_numbers=computed(wanted).is_top1)
    split_width = blocks.BLOCK_V * blocks.tiles_per_split
    partials = empty_partials(triton.cdiv(V, split_width), R, hidden_states.device, computed(wanted))
    if R == 0:
        return partials.only(wanted)
    num_groups = triton.cdiv(R, blocks.BLOCK_N * GROUP_N)
    for start, stop, product in products(hidden_states, head.weight, 0, V, blocks, way):
        _linear_logps_fwd_kernel[(GROUP_N * triton.cdiv(stop - start, split_width), num_groups)](
            labels_ptr=rows.labels,
            num_rows_ptr=rows.num_rows,
            partial_max_ptr=partials.max,
            partial_sum_ptr=partials.sum,
            partial_weighted_ptr=partials.weighted,
            partial_squares_ptr=partials.squares,
            partial_logits_ptr=partials.logits,
            partial_before_ptr=partials.before,
            label_logits_ptr=partials.label_logits,
            GROUP_N=GROUP_N,
            TILES_PER_SPLIT=blocks.tiles_per_split,
            **tile_arguments(hidden_states, head, blocks, start, product),
        )
    return partials.only(wanted)


def linear_logps_fwd_torch(
    hidden_states: Tensor, head: Head, rows: PackedRows, width: int, *, wanted: Wanted = NOTHING
) -> Partials:
    """Twin: hidden_states are the packed rows (R, H) in the accumulation dtype; a split is `width` entries."""
    R, V = hidden_states.shape[0], head.weight.shape[0]
    edges = [*range(0, V, width), V]
    workspace = hidden_states.new_empty((R * width,))
    tiles = []
    for start, stop in pairwise(edges):
        out = workspace[: R * (stop - start)].view(R, stop - start)  # over the one before, whose statistics are kept
        tiles.append(exp_tile_torch(hidden_states, head, rows.labels, start, stop, out, wanted=wanted))
    return partials_of(tiles)
