"""Partial row statistics -> per-token log-probability and log-sum-exp, splits merged in a fixed order.

    difference = log sum_{v != label} exp(z_v) - z_label
    logp       = -log(1 + exp(difference)),     lse = z_label - logp

lse is kept as a float32 and what its rounding left: at logits of 1000 that is 3e-5, a factor of the whole softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials

BLOCK_T = 128


@jit
def merge_splits(partial_max_ptr, partial_sum_ptr, label_logits_ptr, position, counted, R, num_splits):
    """-> logp, lse and lse's residual of the packed rows `position` (int64), 0 where not counted."""
    top = tl.load(partial_max_ptr + position, mask=counted, other=0.0)
    total = tl.load(partial_sum_ptr + position, mask=counted, other=0.0)
    for split in range(1, num_splits):
        offset = position + tl.cast(split, tl.int64) * R
        split_max = tl.load(partial_max_ptr + offset, mask=counted, other=0.0)
        split_sum = tl.load(partial_sum_ptr + offset, mask=counted, other=0.0)
        new_top = tl.maximum(top, split_max)
        total = total * tl.exp(top - new_top) + split_sum * tl.exp(split_max - new_top)
        top = new_top
    z_label = tl.load(label_logits_ptr + position, mask=counted, other=0.0)
    # `total` is 0 for a vocabulary of one entry, z_label -inf for a label of probability 0: logp = 0 and -inf.
    difference = (top - z_label) + tl.log(total)
    logp = -(tl.maximum(difference, 0.0) + log1p(tl.exp(-tl.abs(difference))))
    # top is the row's maximum, label included, so log_sum is small; the lines after keep what the sum rounds off.
    log_sum = tl.log(total + tl.exp(z_label - top))
    lse = top + log_sum
    rest = lse - top
    residual = (top - (lse - rest)) + (log_sum - rest)
    return tl.where(counted, logp, 0.0), tl.where(counted, lse, 0.0), tl.where(counted, residual, 0.0)


@jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1: the quotient undoes the rounding of 1 + x, so that small x keep their digits."""
    rounded = 1.0 + x
    is_one = rounded == 1.0
    return tl.where(is_one, x, tl.log(rounded) * (x / tl.where(is_one, 1.0, rounded - 1.0)))


@jit
def _merge_splits_kernel(
    partial_max_ptr,  # (S, R) float32
    partial_sum_ptr,  # (S, R) float32
    label_logits_ptr,  # (R,) float32
    position_ptr,  # (T,) int64
    num_rows_ptr,  # (1,) int64
    per_token_logps_ptr,  # (T,) float32, out
    lse_ptr,  # (2, T) float32, out
    T,
    R,
    num_splits,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(position_ptr + offs_t, mask=mask_t, other=0)
    counted = mask_t & (position < tl.load(num_rows_ptr))
    logp, lse, residual = merge_splits(
        partial_max_ptr, partial_sum_ptr, label_logits_ptr, position, counted, R, num_splits
    )
    tl.store(per_token_logps_ptr + offs_t, logp, mask=mask_t)
    tl.store(lse_ptr + offs_t, lse, mask=mask_t)
    tl.store(lse_ptr + tl.cast(T, tl.int64) + offs_t, residual, mask=mask_t)


def merge_splits_fwd(partials: Partials, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Partials (S, R) -> per_token_logps (T,), lse (2, T) with its residual, in the tokens' order; 0 where ignored."""
    T, (num_splits, R) = rows.position.numel(), partials.max.shape
    per_token_logps = partials.max.new_empty((T,))
    lse = partials.max.new_empty((2, T))
    if T:
        _merge_splits_kernel[(triton.cdiv(T, BLOCK_T),)](
            partials.max, partials.sum, partials.label_logits, rows.position, rows.num_rows,
            per_token_logps, lse, T, R, num_splits, BLOCK_T=BLOCK_T, **NO_FUSION,
        )  # fmt: skip
    return per_token_logps, lse


def merge_splits_fwd_torch(partials: Partials, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Twin of `merge_splits_fwd`; the few numbers per row are merged in float64."""
    dtype = partials.label_logits.dtype
    z_label = partials.label_logits.double()
    lse_others = (partials.max + partials.sum.log()).logsumexp(0)
    packed_logps = -torch.nn.functional.softplus(lse_others - z_label, threshold=40)
    exact_lse = torch.where(z_label.isneginf(), lse_others, z_label - packed_logps)
    packed_lse = exact_lse.to(dtype)
    per_token_logps = z_label.new_zeros(rows.position.shape, dtype=dtype)
    lse = z_label.new_zeros((2, rows.position.numel()), dtype=dtype)
    return (
        per_token_logps.index_copy_(0, rows.row_index, packed_logps.to(dtype)),
        lse.index_copy_(1, rows.row_index, torch.stack([packed_lse, (exact_lse - packed_lse).to(dtype)])),
    )
