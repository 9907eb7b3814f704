"""How the policy's log-ratios rank the completions of each group, against their rewards."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("log_ratio", "log_ratio_margin", "accuracy", "entropy")


def group_metrics(log_ratios: Tensor, rewards: Tensor, group_sizes: Tensor, entropy: Tensor | None = None) -> Tensor:
    """(G, 4), one row per group, one column per name of METRICS; (G, 3) without entropy.

    With l = log pi - log pi_ref of each completion, (N,):
        log_ratio         mean of l; minus the KL divergence from the reference where that sampled the completions
        log_ratio_margin  mean of l_i - l_j over the pairs with rewards_i > rewards_j, in nats; NaN without such pairs
        accuracy          share of those pairs with l_i > l_j; NaN without such pairs
        entropy           mean of `entropy` (N,), of each completion in nats per token

    Nothing synchronises with the host.
    """
    group = torch.repeat_interleave(group_sizes, output_size=rewards.numel())
    better = (group[:, None] == group) & (rewards[:, None] > rewards)
    gaps = log_ratios[:, None] - log_ratios

    def total(per_completion: Tensor) -> Tensor:
        zeros = torch.zeros(group_sizes.shape, dtype=log_ratios.dtype, device=log_ratios.device)
        return zeros.index_add(0, group, per_completion.to(log_ratios.dtype))

    num_pairs = total(better.sum(1))  # 0 / 0 = NaN is meant
    margins = total(gaps.where(better, 0.0).sum(1)) / num_pairs
    accuracies = total((better & (gaps > 0)).sum(1)) / num_pairs
    columns = [total(log_ratios) / group_sizes, margins, accuracies]
    if entropy is not None:
        columns.append(total(entropy) / group_sizes)
    return torch.stack(columns, dim=1)


def mean_over_groups(table: Tensor) -> dict[str, float]:
    """The columns' means over the groups that have them."""
    return means(totals(table))


def totals(table: Tensor) -> Tensor:
    """(2, columns): the sum of each over the groups that have it, and their number; those of several tables add up."""
    return torch.stack([table.nansum(0), (~table.isnan()).sum(0).to(table.dtype)])


def means(totals: Tensor) -> dict[str, float]:
    return dict(zip(METRICS, (totals[0] / totals[1]).tolist(), strict=False))  # entropy is last, where there is one
