"""Partial row statistics -> entropy of each counted row's softmax, splits merged in a fixed order.

    lse     = log sum_v exp(z_v)
    entropy = sum_{v != label} p_v (lse - z_v)  -  p_label logp_label,      p_v = exp(z_v - lse)

No term is negative, so that the entropy of a row that is sure of its label keeps its digits, as its log-probability
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials, merge_statistics, merge_weighted

BLOCK_T = 128


@jit
def _token_entropy_kernel(
    partial_max_ptr,  # (S, R) float32
    partial_sum_ptr,  # (S, R) float32
    partial_weighted_ptr,  # (S, R) float32
    label_logits_ptr,  # (R,) float32
    per_token_logps_ptr,  # (T,) float32
    position_ptr,  # (T,) int64
    num_rows_ptr,  # (1,) int64
    entropy_ptr,  # (T,) float32, out
    T,
    R,
    num_splits,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(position_ptr + offs_t, mask=mask_t, other=0)
    counted = mask_t & (position < tl.load(num_rows_ptr))
    top = tl.load(partial_max_ptr + position, mask=counted, other=0.0)
    total = tl.load(partial_sum_ptr + position, mask=counted, other=0.0)
    weighted = tl.load(partial_weighted_ptr + position, mask=counted, other=0.0)
    for split in range(1, num_splits):
        offset = position + tl.cast(split, tl.int64) * R
        split_max = tl.load(partial_max_ptr + offset, mask=counted, other=0.0)
        split_sum = tl.load(partial_sum_ptr + offset, mask=counted, other=0.0)
        split_weighted = tl.load(partial_weighted_ptr + offset, mask=counted, other=0.0)
        weighted = merge_weighted(top, total, weighted, split_max, split_sum, split_weighted)
        top, total = merge_statistics(top, total, split_max, split_sum)
    log_sum = tl.log(total + tl.exp(tl.load(label_logits_ptr + position, mask=counted, other=0.0) - top))
    logp = tl.load(per_token_logps_ptr + offs_t, mask=counted, other=0.0)
    of_label = tl.where(logp > float("-inf"), tl.exp(logp) * -logp, 0.0)
    entropy = (total * log_sum - weighted) * tl.exp(-log_sum) + of_label
    tl.store(entropy_ptr + offs_t, tl.where(counted, entropy, 0.0), mask=mask_t)


def token_entropy_fwd(partials: Partials, rows: PackedRows, per_token_logps: Tensor) -> Tensor:
    """Partials (S, R) with their weighted sums, (T,) -> entropy (T,) in nats, in the tokens' order; 0 where ignored."""
    T, (num_splits, R) = rows.position.numel(), partials.max.shape
    entropy = torch.empty_like(per_token_logps)
    if T:
        _token_entropy_kernel[(triton.cdiv(T, BLOCK_T),)](
            partials.max, partials.sum, partials.weighted, partials.label_logits, per_token_logps, rows.position,
            rows.num_rows, entropy, T, R, num_splits, BLOCK_T=BLOCK_T, **NO_FUSION,
        )  # fmt: skip
    return entropy


def token_entropy_fwd_torch(partials: Partials, rows: PackedRows, per_token_logps: Tensor) -> Tensor:
    """Twin, in float64: base + log sum of a split is its own log-sum-exp, whatever its base."""
    assert partials.weighted is not None
    z_label = partials.label_logits.double()
    lse = torch.logaddexp((partials.max + partials.sum.log()).logsumexp(0), z_label)
    scale = (partials.max - lse).exp()
    # Where a split has no finite logit its base is far below, and 0 times that distance is not meant.
    distance = (lse - partials.max).masked_fill(partials.sum == 0, 0.0)
    of_others = (scale * (partials.sum * distance - partials.weighted)).sum(0)
    logps = per_token_logps.double()[rows.row_index]
    packed = of_others + torch.special.entr(logps.exp())
    return torch.zeros_like(per_token_logps).index_copy_(0, rows.row_index, packed.to(per_token_logps.dtype))
