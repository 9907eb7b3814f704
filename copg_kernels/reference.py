"""The specification: every quantity of this package in plain PyTorch, written like the papers.

Nothing here is fast and nothing is fused; the full logits exist, the contrast is a double loop over pairs. All
functions compute in the dtype of their operands, float64 included, and autograd runs through them. Tests,
benchmarks and `copg_kernels.tune` measure the fused operators against this file; no operator calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_logps_ref(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probability of each label under the softmax of the language-model head.

        logits[t] = cap(logit_scale * (W x[t] + bias)) / temperature,   cap(z) = softcap * tanh(z / softcap)
        logp[t]   = logits[t, labels[t]] - logsumexp_v logits[t, v]

    Args: hidden_states (..., H), lm_head_weight (V, H), labels (...,) int64, bias (V,).
    Returns: (...,) in the dtype of the operands; 0 where labels == ignore_index.
    """
    logits = _capped_logits(hidden_states, lm_head_weight, bias, logit_scale, softcap) / temperature
    counted = labels != ignore_index
    index = labels.where(counted, torch.zeros_like(labels))
    logps = logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return logps.where(counted, torch.zeros_like(logps))


def linear_entropy_ref(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Entropy of the same softmax, of each row: -sum_v p_v log p_v, with 0 log 0 = 0.

    Args: as `linear_logps_ref`. Returns: (...,) in nats; 0 where labels == ignore_index.
    """
    logits = _capped_logits(hidden_states, lm_head_weight, bias, logit_scale, softcap) / temperature
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps.masked_fill(logps.isneginf(), 0.0)).sum(-1)
    return entropy.where(labels != ignore_index, torch.zeros_like(entropy))


def linear_logps_bwd_ref(
    dlogps: Tensor,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `linear_logps_ref` as explicit algebra, for (T, H) hidden states.

    dlogits[t, v] = dlogp[t] * (1[v = labels[t]] - softmax(logits[t])[v])
    dz            = dlogits / temperature * (1 - (cap(z) / softcap)^2)        z = logit_scale * (W x + bias)
    dX = logit_scale * dz W,    dW = logit_scale * dz^T X,    dbias = logit_scale * sum_t dz[t]
    """
    capped = _capped_logits(hidden_states, lm_head_weight, bias, logit_scale, softcap)
    counted = labels != ignore_index
    index = labels.where(counted, torch.zeros_like(labels))
    onehot = torch.nn.functional.one_hot(index, lm_head_weight.shape[0]).to(capped.dtype)
    coefficient = dlogps.where(counted, torch.zeros_like(dlogps)).unsqueeze(-1)
    dz = coefficient * (onehot - (capped / temperature).softmax(-1)) / temperature
    if softcap is not None:
        dz = dz * (1 - (capped / softcap) ** 2)
    dz = dz * logit_scale
    return dz @ lm_head_weight, dz.T @ hidden_states, dz.sum(0)


def sequence_logps_ref(
    per_token_logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Sum (or mean) of the counted tokens' log-probabilities, one completion after the other.

    Padded (B, L) -> (B,); packed (T,) with cu_seqlens (N + 1,) -> (N,).
    """
    if cu_seqlens is None:
        completions = list(zip(per_token_logps, labels, strict=True))
    else:
        edges = cu_seqlens.tolist()
        completions = [(per_token_logps[a:b], labels[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    logps = []
    for token_logps, token_labels in completions:
        counted = token_labels != ignore_index
        total = token_logps[counted].sum()
        logps.append(total / counted.sum() if average else total)
    return torch.stack(logps)


def groups_ref(num_sequences: int, group_size: int | None, cu_groups: Tensor | None) -> list[range]:
    """The consecutive completions of each prompt: equal groups, or ragged ones bounded by cu_groups (G + 1,)."""
    if cu_groups is None:
        assert group_size is not None, "group_size or cu_groups must be given"
        return [range(start, start + group_size) for start in range(0, num_sequences, group_size)]
    edges = cu_groups.tolist()
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def copg_loss_ref(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
) -> Tensor:
    """Contrastive policy gradient as a sum over pairs of completions, averaged over the groups.

        A_i  = rewards_i - beta * (logps_i - ref_logps_i)
        loss = mean over groups of  1 / (2 beta k (k - 1)) * sum_{i > j} (A_i - A_j)^2

    For k = 2 this is half of the paper's squared form (38): the paper sums over both members of the pair.
    """
    regularized_rewards = rewards - beta * (logps - ref_logps)
    losses = []
    for group in groups_ref(len(logps), group_size, cu_groups):
        k = len(group)
        pairs = torch.zeros_like(regularized_rewards[0])
        for i, j in ((i, j) for i in group for j in group if i > j):
            pairs = pairs + (regularized_rewards[i] - regularized_rewards[j]) ** 2
        losses.append(pairs / (2 * beta * k * (k - 1)))
    return torch.stack(losses).mean()


def copg_coefficients_ref(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
) -> Tensor:
    """dloss / dlogps of `copg_loss_ref`: minus the leave-one-out advantage of A_i, over k and the number of groups.

    dloss / dlogps_i = -(A_i - mean_{j != i} A_j) / (k G)
    """
    regularized_rewards = rewards - beta * (logps - ref_logps)
    groups = groups_ref(len(logps), group_size, cu_groups)
    coefficients = []
    for group in groups:
        for i in group:
            others = torch.stack([regularized_rewards[j] for j in group if j != i])
            coefficients.append(-(regularized_rewards[i] - others.mean()) / (len(group) * len(groups)))
    return torch.stack(coefficients)


def linear_copg_loss_ref(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    average_logps: bool = False,
    ignore_index: int = -100,
    **logits_options: Any,
) -> Tensor:
    """`linear_logps_ref`, `sequence_logps_ref` and `copg_loss_ref`, one after the other."""
    token_logps = linear_logps_ref(hidden_states, lm_head_weight, labels, ignore_index=ignore_index, **logits_options)
    logps = sequence_logps_ref(
        token_logps, labels, cu_seqlens=cu_seqlens, average=average_logps, ignore_index=ignore_index
    )
    return copg_loss_ref(logps, ref_logps, rewards, beta=beta, group_size=group_size, cu_groups=cu_groups)


def _capped_logits(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    logits = hidden_states @ lm_head_weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
