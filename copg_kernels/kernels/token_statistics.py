"""Partial row statistics -> what was asked for of each counted row's softmax, splits merged in a fixed order.

    lse              = log sum_v exp(z_v),      p_v = exp(z_v - lse)
    entropy          = sum_{v != label} p_v (lse - z_v)  -  p_label logp_label
    log_sum_sq_probs = log(sum_{v != label} p_v^2  +  p_label^2)
    mean_logits      = sum_v z_v / V
    is_top1          = z_label >= z_v for all v, and z_label > z_v for v < label, as argmax breaks ties

No term of the first two is negative, and the label's comes from its log-probability, so that a row that is sure of its
label keeps its digits, as its log-probability does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.merge_splits import log1p
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import (
    Partials,
    merge_squares,
    merge_statistics,
    merge_weighted,
)

BLOCK_T = 128


class TokenStatistics(NamedTuple):
    """(T,) each in the tokens' order, 0 or False where ignored; empty where not asked for."""

    entropy: Tensor  # in nats, float32 like the next two (float64 for float64 operands)
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor  # bool


def no_statistics(like: Tensor) -> TokenStatistics:
    """Nothing was asked for; log-probabilities tell dtype and device."""
    empty = like.new_empty(0)
    return TokenStatistics(empty, empty.clone(), empty.clone(), empty.new_empty(0, dtype=torch.bool))


@jit
def _token_statistics_kernel(
    partial_max_ptr,  # (S, R) float32
    partial_sum_ptr,  # (S, R) float32
    partial_weighted_ptr,  # (S, R) float32, or None; like the next three
    partial_squares_ptr,
    partial_logits_ptr,
    partial_before_ptr,
    label_logits_ptr,  # (R,) float32
    per_token_logps_ptr,  # (T,) float32
    position_ptr,  # (T,) int64
    num_rows_ptr,  # (1,) int64
    entropy_ptr,  # (T,) float32, out, or None where partial_weighted_ptr is
    log_sum_sq_probs_ptr,  # (T,) float32, out, or None where partial_squares_ptr is
    mean_logits_ptr,  # (T,) float32, out, or None where partial_logits_ptr is
    is_top1_ptr,  # (T,) bool, out, or None where partial_before_ptr is
    T,
    R,
    V,
    num_splits,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(position_ptr + offs_t, mask=mask_t, other=0)
    counted = mask_t & (position < tl.load(num_rows_ptr))

    # 1. Over the splits.
    top = tl.load(partial_max_ptr + position, mask=counted, other=0.0)
    total = tl.load(partial_sum_ptr + position, mask=counted, other=0.0)
    weighted = _load_wanted(partial_weighted_ptr, position, counted)
    squares = _load_wanted(partial_squares_ptr, position, counted)
    logits = _load_wanted(partial_logits_ptr, position, counted)
    before = _load_wanted(partial_before_ptr, position, counted)
    for split in range(1, num_splits):
        offset = position + tl.cast(split, tl.int64) * R
        split_max = tl.load(partial_max_ptr + offset, mask=counted, other=0.0)
        split_sum = tl.load(partial_sum_ptr + offset, mask=counted, other=0.0)
        if entropy_ptr is not None:
            split_weighted = _load_wanted(partial_weighted_ptr, offset, counted)
            weighted = merge_weighted(top, total, weighted, split_max, split_sum, split_weighted)
        if log_sum_sq_probs_ptr is not None:
            squares = merge_squares(top, squares, split_max, _load_wanted(partial_squares_ptr, offset, counted))
        logits += _load_wanted(partial_logits_ptr, offset, counted)
        before = tl.maximum(before, _load_wanted(partial_before_ptr, offset, counted))
        top, total = merge_statistics(top, total, split_max, split_sum)

    # 2. With the label.
    z_label = tl.load(label_logits_ptr + position, mask=counted, other=0.0)
    logp = tl.load(per_token_logps_ptr + offs_t, mask=counted, other=0.0)
    log_sum = tl.log(total + tl.exp(z_label - top))
    if entropy_ptr is not None:
        of_label = tl.where(logp > float("-inf"), tl.exp(logp) * -logp, 0.0)
        entropy = (total * log_sum - weighted) * tl.exp(-log_sum) + of_label
        tl.store(entropy_ptr + offs_t, tl.where(counted, entropy, 0.0), mask=mask_t)
    if log_sum_sq_probs_ptr is not None:
        log_sum_sq_probs = _log_sum(2.0 * logp, tl.log(squares) - 2.0 * log_sum)
        tl.store(log_sum_sq_probs_ptr + offs_t, tl.where(counted, log_sum_sq_probs, 0.0), mask=mask_t)
    if mean_logits_ptr is not None:
        tl.store(mean_logits_ptr + offs_t, tl.where(counted, logits / V, 0.0), mask=mask_t)
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + offs_t, counted & (z_label >= top) & (z_label > before), mask=mask_t)


@jit
def _load_wanted(partial_ptr, offset, counted):
    """Of one split, or zeros where nothing was asked for."""
    if partial_ptr is None:
        return tl.zeros(offset.shape, dtype=tl.float32)
    else:
        return tl.load(partial_ptr + offset, mask=counted, other=0.0)


@jit
def _log_sum(a, b):
    """log(exp(a) + exp(b)), of which one may be -inf."""
    return tl.maximum(a, b) + log1p(tl.exp(-tl.abs(a - b)))


def token_statistics_fwd(partials: Partials, rows: PackedRows, per_token_logps: Tensor, V: int = 0) -> TokenStatistics:
    """Partials (S, R), (T,) -> (T,) of each statistic that they have; V, the vocabulary's entries, for mean_logits."""
    T, (num_splits, R) = rows.position.numel(), partials.max.shape
    sources = (partials.weighted, partials.squares, partials.logits, partials.before)
    nothing = no_statistics(per_token_logps)
    statistics = TokenStatistics(
        *(none if source is None else none.new_empty((T,)) for none, source in zip(nothing, sources, strict=True))
    )
    if T:
        _token_statistics_kernel[(triton.cdiv(T, BLOCK_T),)](
            partials.max, partials.sum, *sources, partials.label_logits, per_token_logps, rows.position, rows.num_rows,
            *(out if out.numel() else None for out in statistics), T, R, V, num_splits, BLOCK_T=BLOCK_T, **NO_FUSION,
        )  # fmt: skip
    return statistics


def token_statistics_fwd_torch(
    partials: Partials, rows: PackedRows, per_token_logps: Tensor, V: int = 0
) -> TokenStatistics:
    """Twin, in float64."""
    logps = per_token_logps.double()[rows.row_index]
    # base + log sum of a split is its own log-sum-exp, whatever its base.
    lse = torch.logaddexp((partials.max + partials.sum.log()).logsumexp(0), partials.label_logits.double())
    packed = (
        None if partials.weighted is None else _entropy(partials, partials.weighted, lse, logps),
        None if partials.squares is None else _log_sum_sq_probs(partials, partials.squares, lse, logps),
        None if partials.logits is None else partials.logits.sum(0) / V,
        None if partials.before is None or partials.top is None else _is_top1(partials, partials.before, partials.top),
    )
    nothing = no_statistics(per_token_logps)
    return TokenStatistics(*(_of_tokens(*pair, rows) for pair in zip(packed, nothing, strict=True)))


def _of_tokens(packed: Tensor | None, nothing: Tensor, rows: PackedRows) -> Tensor:
    """(R,) in packed order -> (T,), or nothing, in whose dtype it is."""
    if packed is None:
        return nothing
    return nothing.new_zeros(rows.position.shape).index_copy_(0, rows.row_index, packed.to(nothing.dtype))


def _entropy(partials: Partials, weighted: Tensor, lse: Tensor, logps: Tensor) -> Tensor:
    # Where a split has no finite logit its base is far below, and 0 times that distance is not meant.
    distance = (lse - partials.max).masked_fill(partials.sum == 0, 0.0)
    of_others = ((partials.max - lse).exp() * (partials.sum * distance - weighted)).sum(0)
    return of_others + torch.special.entr(logps.exp())


def _log_sum_sq_probs(partials: Partials, squares: Tensor, lse: Tensor, logps: Tensor) -> Tensor:
    of_others = (squares.log() + 2 * (partials.max - lse)).logsumexp(0)
    return torch.logaddexp(of_others, 2 * logps)


def _is_top1(partials: Partials, before: Tensor, top: Tensor) -> Tensor:
    z_label = partials.label_logits.double()
    return (z_label >= top.amax(0)) & (z_label > before.amax(0))
