"""Partial row statistics -> per-token log-probability and log-sum-exp, splits merged in a fixed order.

    lse_others = log sum over the vocabulary without the label of exp(z)
    logp       = -log(1 + exp(lse_others - z_label)),     lse = z_label - logp
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.language import jit, tl, triton
from copg_kernels.kernels.linear_logps_fwd import Partials
from copg_kernels.kernels.pack_rows import PackedRows

_BLOCK_T = 128


@jit
def merge_splits(partial_max_ptr, partial_sum_ptr, label_logits_ptr, position, counted, R, num_splits):
    """-> logp and lse of the packed rows `position`, 0 where not counted. `position` is int64."""
    total_max = tl.load(partial_max_ptr + position, mask=counted, other=0.0)
    total = tl.load(partial_sum_ptr + position, mask=counted, other=0.0)
    for split in range(1, num_splits):
        offset = position + tl.cast(split, tl.int64) * R
        split_max = tl.load(partial_max_ptr + offset, mask=counted, other=0.0)
        split_sum = tl.load(partial_sum_ptr + offset, mask=counted, other=0.0)
        new_max = tl.maximum(total_max, split_max)
        total = total * tl.exp(total_max - new_max) + split_sum * tl.exp(split_max - new_max)
        total_max = new_max
    z_label = tl.load(label_logits_ptr + position, mask=counted, other=0.0)
    lse_others = total_max + tl.log(total)
    # log1p(e) = log(1 + e) * e / ((1 + e) - 1): the quotient undoes the rounding of 1 + e, so small e keep their digits.
    # -inf differences (a vocabulary of one entry, a label of probability 0) come out as logp = 0 and -inf.
    difference = lse_others - z_label
    e = tl.exp(-tl.abs(difference))
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    logp = -(tl.maximum(difference, 0.0) + log1p)
    lse = tl.where(z_label == float("-inf"), lse_others, z_label - logp)
    return tl.where(counted, logp, 0.0), tl.where(counted, lse, 0.0)


@jit
def _merge_splits_kernel(
    partial_max_ptr,  # (S, R) float32
    partial_sum_ptr,  # (S, R) float32
    label_logits_ptr,  # (R,) float32
    position_ptr,  # (T,) int64
    num_rows_ptr,  # (1,) int64
    per_token_logps_ptr,  # (T,) float32, out
    lse_ptr,  # (T,) float32, out
    T,
    R,
    num_splits,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(position_ptr + offs_t, mask=mask_t, other=0)
    counted = mask_t & (position < tl.load(num_rows_ptr))
    logp, lse = merge_splits(partial_max_ptr, partial_sum_ptr, label_logits_ptr, position, counted, R, num_splits)
    tl.store(per_token_logps_ptr + offs_t, logp, mask=mask_t)
    tl.store(lse_ptr + offs_t, lse, mask=mask_t)


def merge_splits_fwd(partials: Partials, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Partials (S, R) -> per_token_logps (T,), lse (T,), in the tokens' own order; 0 where ignored."""
    T, (num_splits, R) = rows.position.numel(), partials.max.shape
    per_token_logps = partials.max.new_empty((T,))
    lse = partials.max.new_empty((T,))
    _merge_splits_kernel[(triton.cdiv(T, _BLOCK_T),)](
        partials.max, partials.sum, partials.label_logits, rows.position, rows.num_rows,
        per_token_logps, lse, T, R, num_splits, BLOCK_T=_BLOCK_T,
    )  # fmt: skip
    return per_token_logps, lse


def merge_splits_fwd_torch(partials: Partials, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Twin of `merge_splits_fwd`."""
    lse_others = (partials.max + partials.sum.log()).logsumexp(0)
    packed_logps = -torch.nn.functional.softplus(lse_others - partials.label_logits, threshold=40)
    packed_lse = torch.where(
        partials.label_logits.isneginf(), lse_others, partials.label_logits - packed_logps
    )
    per_token_logps = partials.max.new_zeros(rows.position.shape)
    lse = partials.max.new_zeros(rows.position.shape)
    return (
        per_token_logps.index_copy_(0, rows.row_index, packed_logps),
        lse.index_copy_(0, rows.row_index, packed_lse),
    )
