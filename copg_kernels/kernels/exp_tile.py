"""Exponentials of logits that stay, with their row statistics: one GEMM from which the gradients need no other.

    tile[r, v] = slope * exp(z[r, v] - reference[r])            0 at the label;  slope: the cap's derivative, or 1

The reference only has to be near the row's log-sum-exp, because a bfloat16 has the exponents of a float32: the largest
of the first logits will do. So the row's log-sum-exp need not be known when the tile is stored, no second pass over it
is needed, and no logit is ever rounded: exp(reference - lse) goes where the token's coefficient goes, and the label's
entry is put in afterwards (`place_labels`). Rows whose reference turns out too far off are computed once more there.

float16 has no exponents to spare; its operands take another schedule.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import GROUP_N, SPLIT_TORCH
from copg_kernels.kernels.fold_tiles import fold_tiles
from copg_kernels.kernels.head import (
    Head,
    cap_slope,
    finish_torch,
    head_logits,
    logits_tile_torch,
    lowest_logit,
    out_arguments,
    padded,
    row_stride,
    store_part,
    tile_arguments,
)
from copg_kernels.kernels.language import LN_2, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.product_slices import blocks_of, products, way_of
from copg_kernels.kernels.row_statistics import (
    NOTHING,
    Partials,
    Wanted,
    computed,
    empty_partials,
    exponentials,
    holds_label,
    largest_before,
    partials_of_no_entries,
    store_wanted,
    sum_of_logits,
    take_out_label,
    tile_maximum,
    weighted_terms,
)

# The largest of so many logits serves as reference.
REFERENCE_COLUMNS = 64
# exp(80) is within float32 and leaves a GEMM room to sum. Rows that need more are computed once more anyway.
_LARGEST_EXPONENT = tl.constexpr(80.0)
# Of the twin's slices, the reference logit's probability is above this in all but absurd rows.
_LEAST_PROBABILITY = 1e-30
_ROWS_AT_ONCE = 256


@jit
def _exp_tile_kernel(
    hidden,  # (R, H), packed; like weight and tile a pointer or a tensor descriptor
    product_ptr,  # (R, width) float32, or None: see head_logits
    weight,  # (V, H)
    bias_ptr,  # (V,)
    labels_ptr,  # (R,) int64, packed
    num_rows_ptr,  # (1,) int64
    reference_ptr,  # (R,) float32
    tile,  # (R, padded width), out
    tile_max_ptr,  # (num_tiles, R) float32, out
    tile_sum_ptr,  # (num_tiles, R) float32, out
    tile_weighted_ptr,  # (num_tiles, R) float32, out, or None; like the next three
    tile_squares_ptr,
    tile_logits_ptr,
    tile_before_ptr,
    label_logits_ptr,  # (R,) float32, out
    first_tile,
    R,
    V,
    H,
    stride_weight,
    stride_product,
    padded_width,
    stride_tile,
    logit_scale,
    inv_softcap,
    inv_temperature,
    BIAS_ON_ACC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    KEEPS_SLOPE: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # 1. GROUP_N row blocks share each tile of the weight while it is in L2. The GEMMs that read the tile run over all R
    # rows, so ignored ones must be 0.
    pid_n = tl.program_id(1) * GROUP_N + tl.program_id(0) % GROUP_N
    pid_v = first_tile + tl.program_id(0) // GROUP_N
    num_rows = tl.load(num_rows_ptr)
    if pid_n * BLOCK_N >= num_rows:
        if pid_n * BLOCK_N < R:
            zeros = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.float32)
            for part in tl.static_range(4):
                start_v = pid_v * BLOCK_V + part * (BLOCK_V // 4)
                store_part(tile, zeros, pid_n * BLOCK_N, start_v, R, padded_width, stride_tile, USE_TMA)
        return
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows

    # 2. The streaming forward pass's logits and maximum.
    parts = head_logits(
        hidden, product_ptr, pid_n * BLOCK_N, weight, bias_ptr, pid_v, first_tile, R, V, H,
        stride_weight, stride_product, logit_scale, inv_softcap, inv_temperature,
        BIAS_ON_ACC, HAS_SCALE, HAS_CAP, USE_TMA, EVEN_V, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    # Not before the GEMM, through which it would hold registers that are not there.
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
    tile_max = tile_maximum(parts)
    reference = tl.load(reference_ptr + offs_n, mask=mask_n, other=0.0)
    factor = tl.where(mask_n, tl.exp(tl.minimum(tile_max - reference, _LARGEST_EXPONENT)), 0.0)
    lowest = lowest_logit(inv_softcap, inv_temperature, HAS_CAP)
    has_label = holds_label(label, pid_v * BLOCK_V, BLOCK_V)
    label_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)
    offset = pid_v.to(tl.int64) * R + offs_n
    if tile_logits_ptr is not None:
        logits = sum_of_logits(parts, pid_v * BLOCK_V, V, EVEN_V, BLOCK_V)
        tl.store(tile_logits_ptr + offset, logits, mask=mask_n)
    if tile_before_ptr is not None:
        before = largest_before(parts, tile_max, has_label, label, pid_v * BLOCK_V, BLOCK_V)
        tl.store(tile_before_ptr + offset, before, mask=mask_n)

    # 3. Its sums, and the exponentials themselves, relative to the row's reference.
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.float32)
    for part in tl.static_range(len(parts)):
        start_v = pid_v * BLOCK_V + part * (BLOCK_V // len(parts))
        z, at_label = take_out_label(parts[part], has_label, label, start_v, lowest)
        label_logit += at_label
        exps, distance = exponentials(z, tile_max)
        sums += exps
        if tile_weighted_ptr is not None:
            weighted += weighted_terms(exps, distance)
        if tile_squares_ptr is not None:
            squares += tl.sum(exps * exps, 1)
        value = exps * factor[:, None]
        if KEEPS_SLOPE:
            value *= cap_slope(z, inv_softcap, inv_temperature)
        store_part(tile, value, pid_n * BLOCK_N, start_v, R, padded_width, stride_tile, USE_TMA)
    tl.store(tile_max_ptr + offset, tile_max, mask=mask_n)
    tl.store(tile_sum_ptr + offset, tl.sum(sums, 1), mask=mask_n)
    if tile_weighted_ptr is not None:
        tl.store(tile_weighted_ptr + offset, tl.sum(weighted, 1) * LN_2, mask=mask_n)
    store_wanted(tile_squares_ptr, offset, squares, mask_n)
    is_here = (label >= pid_v * BLOCK_V) & (label < (pid_v + 1) * BLOCK_V)
    tl.store(label_logits_ptr + offs_n, label_logit, mask=mask_n & is_here)


class ScaledTile(NamedTuple):
    """What `place_labels` makes softmax minus one-hot of."""

    tile: Tensor  # (R, V), rows a multiple of 128 bytes apart
    reference: Tensor  # (R,)
    label_logits: Tensor  # (R,)


def exp_tiles(
    hidden_states: Tensor,
    head: Head,
    rows: PackedRows,
    workspace: Tensor,
    *,
    wanted: Wanted = NOTHING,
    keeps_slope: bool = True,
) -> tuple[Partials, ScaledTile]:
    """Packed rows (R, H), head (V, H) -> row statistics, and exponentials in the workspace (its elements, flat).

    keeps_slope: with the cap's derivative, unless `add_entropy` is to put it in. V may be 0, as a rank's shard of the
    vocabulary may.
    """
    R, V = rows.row_index.numel(), head.weight.shape[0]
    if V == 0:
        label_logits = hidden_states.new_empty((R,), dtype=torch.float32)
        nothing = ScaledTile(workspace[:0].view(R, 0), torch.zeros_like(label_logits), label_logits)
        return partials_of_no_entries(label_logits, torch.float32, wanted), nothing
    way = way_of(head.weight, "loss")
    blocks = blocks_of(head.weight, way, many_numbers=computed(wanted).is_top1)
    stride_tile = row_stride(V)
    tiles = empty_partials(triton.cdiv(V, blocks.BLOCK_V), R, hidden_states.device, computed(wanted))
    kept = ScaledTile(
        workspace[: R * stride_tile].view(R, stride_tile)[:, :V],
        _reference_logits(hidden_states, head),
        tiles.label_logits,
    )
    num_groups = triton.cdiv(R, blocks.BLOCK_N * GROUP_N)
    if R:
        for start, stop, product in products(hidden_states, head.weight, 0, V, blocks, way):
            _exp_tile_kernel[(GROUP_N * triton.cdiv(stop - start, blocks.BLOCK_V), num_groups)](
                labels_ptr=rows.labels,
                num_rows_ptr=rows.num_rows,
                reference_ptr=kept.reference,
                tile_max_ptr=tiles.max,
                tile_sum_ptr=tiles.sum,
                tile_weighted_ptr=tiles.weighted,
                tile_squares_ptr=tiles.squares,
                tile_logits_ptr=tiles.logits,
                tile_before_ptr=tiles.before,
                label_logits_ptr=tiles.label_logits,
                GROUP_N=GROUP_N,
                KEEPS_SLOPE=keeps_slope and head.softcap is not None,
                **out_arguments(padded(kept.tile), blocks),
                **tile_arguments(hidden_states, head, blocks, start, product),
            )
    return fold_tiles(tiles.only(wanted), blocks.tiles_per_split, wanted), kept


def _reference_logits(hidden_states: Tensor, head: Head) -> Tensor:
    """(R, H) -> (R,) float32, the largest of the first logits, as good as the operands' dtype gives it."""
    product = torch.mm(hidden_states, head.weight[:REFERENCE_COLUMNS].T).float()
    if head.bias is not None:
        product += head.bias[:REFERENCE_COLUMNS]
    return finish_torch(product, head).amax(1)


class ExpTile(NamedTuple):
    """One slice of the vocabulary, [start, stop), of the twin: tile = exp(z - base)."""

    start: int
    stop: int
    tile: Tensor  # (R, stop - start), times the cap's derivative where there is a cap
    base: Tensor  # (R,) float64
    sums: Tensor  # (R,) float64
    held: Tensor  # (K,) rows whose label is in the slice
    label_columns: Tensor  # (K,) its column there
    label_logits: Tensor  # (K,)
    label_slope: Tensor | float  # (K,) the cap's derivative at the label
    others: tuple[Tensor | None, ...] = ()  # (R,) float64, those of Partials from `weighted` on


def exp_tiles_torch(
    hidden_states: Tensor,
    head: Head,
    rows: PackedRows,
    workspace: Tensor,
    *,
    wanted: Wanted = NOTHING,
    keeps_slope: bool = True,
) -> tuple[Partials, list[ExpTile]]:
    """Twin: hidden_states are the packed rows (R, H); slices of the vocabulary side by side in the workspace."""
    R, V = hidden_states.shape[0], head.weight.shape[0]
    tiles = []
    for start, stop in pairwise([0, *range(SPLIT_TORCH, V, SPLIT_TORCH), V]):  # an empty one where V = 0
        out = workspace[R * start : R * stop].view(R, stop - start)
        tiles.append(
            exp_tile_torch(hidden_states, head, rows.labels, start, stop, out, wanted=wanted, keeps_slope=keeps_slope)
        )
    return partials_of(tiles), tiles


def partials_of(tiles: list[ExpTile]) -> Partials:
    """Of the twin, whose slices are its splits."""
    base, sums = (torch.stack(rows) for rows in zip(*((tile.base, tile.sums) for tile in tiles), strict=True))
    label_logits = tiles[0].label_logits.new_empty(base.shape[1:])
    for tile in tiles:
        label_logits[tile.held] = tile.label_logits
    others = zip(*(tile.others for tile in tiles), strict=True)
    return Partials(base, sums, label_logits, *(None if rows[0] is None else torch.stack(rows) for rows in others))


def exp_tile_torch(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    start: int,
    stop: int,
    out: Tensor,
    *,
    wanted: Wanted = NOTHING,
    keeps_slope: bool = True,
) -> ExpTile:
    """(R, H) rows, (R,) labels -> the slice's exponentials in out (R, stop - start)."""
    slope = logits_tile_torch(hidden_states, head, start, stop, out)
    columns = labels - start
    of_logits = _of_logits(out, columns, wanted)
    held = ((columns >= 0) & (columns < stop - start)).nonzero().squeeze(1)
    columns = columns[held]
    label_logits = out[held, columns]
    label_slope = 1.0 if slope is None else slope[held, columns]
    out[held, columns] = float("-inf")
    if head.bias is not None or stop - start < 2:
        base, sums = _exponentials(out)
    else:
        base, sums = _softmax(out)
        # The reference logit is 70 nats below the row's largest: those rows once more, the long way.
        absurd = (~base.isfinite()).nonzero().squeeze(1)
        if absurd.numel():
            rows = out.new_empty((absurd.numel(), stop - start))
            logits_tile_torch(hidden_states[absurd], head, start, stop, rows)
            is_label = torch.arange(start, stop, device=out.device) == labels[absurd].unsqueeze(1)
            base[absurd], sums[absurd] = _exponentials(rows.masked_fill_(is_label, float("-inf")))
            out[absurd] = rows
    of_exponentials = _of_exponentials(out, wanted)
    if slope is not None and keeps_slope:
        out.mul_(slope)
    others = (*of_exponentials, *of_logits)
    return ExpTile(start, stop, out, base, sums, held, columns, label_logits, label_slope, others)


def _of_exponentials(tile: Tensor, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """Exponentials e of z - base -> row sums of e log e, 0 log 0 being 0, and of e ** 2."""
    # A few rows at a time, for they are copied.
    few = tile.split(_ROWS_AT_ONCE)
    weighted = None
    if wanted.entropy:
        tiny = torch.finfo(tile.dtype).tiny
        weighted = torch.cat([rows.clamp_min(tiny).log_().mul_(rows).sum(1).double() for rows in few])
    squares = torch.cat([rows.square().sum(1).double() for rows in few]) if wanted.log_sum_sq_probs else None
    return weighted, squares


def _of_logits(tile: Tensor, label_columns: Tensor, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """z, and (R,) columns that may lie outside -> row sums, the largest before the label's column, the largest."""
    logits = tile.sum(1).double() if wanted.mean_logits else None
    if not wanted.is_top1:
        return logits, None, None
    width = tile.shape[1]
    top = tile.amax(1)
    before = top.masked_fill(label_columns < width, float("-inf"))
    held = ((label_columns > 0) & (label_columns < width)).nonzero().squeeze(1)
    for rows in held.split(_ROWS_AT_ONCE):
        is_before = torch.arange(width, device=tile.device) < label_columns[rows].unsqueeze(1)
        before[rows] = tile[rows].masked_fill_(~is_before, float("-inf")).amax(1)
    return logits, before.double(), top.double()


def _exponentials(tile: Tensor) -> tuple[Tensor, Tensor]:
    """In place, exp(z - largest z); any column may be -inf, by a bias that masks entries."""
    base = tile.amax(1).clamp_min_(-1e38) if tile.shape[1] else tile.new_full(tile.shape[:1], -1e38)
    return base.double(), tile.sub_(base.unsqueeze(1)).exp_().sum(1).double()


def _softmax(tile: Tensor) -> tuple[Tensor, Tensor]:
    """In place, the slice's own softmax, so that base is its log-sum-exp; infinite where it could not be found.

    softmax is the one fused pass over a tile that torch has on a CPU, three times faster than max, subtract, exp and
    sum. A logit and its probability give the log-sum-exp back, in float64 without another rounding.
    """
    reference, index = tile[:, :REFERENCE_COLUMNS].max(1, keepdim=True)
    torch.softmax(tile, 1, out=tile)
    probability = tile.gather(1, index)
    base = reference.double() - probability.double().log()
    base = base.masked_fill(~(probability > _LEAST_PROBABILITY), float("inf")).squeeze(1)
    return base, torch.ones_like(base)
