"""The head and the loss, twice: through the fused operators and as the specification writes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from copg_kernels import linear_copg_loss, linear_logps, sequence_logps
from copg_kernels.reference import copg_loss_ref, linear_logps_ref, sequence_logps_ref
from train.batch import Batch


class Objective(NamedTuple):
    loss: Tensor  # scalar, differentiable
    log_ratios: Tensor  # (N,) log pi - log pi_ref of each completion, detached
    sparsity: dict[str, float]  # density, dropped and overflow of sparse gradients; empty for exact ones


class HeadDifference(NamedTuple):
    loss: float  # |fused - reference|
    gradient: float  # the largest ||fused - reference|| / ||reference|| over the parameter tensors
    parameter: str  # where that is


def fused_objective(
    hidden_states: Tensor, lm_head_weight: Tensor, batch: Batch, beta: float, sparse_eps: float = 0.0
) -> Objective:
    """The loss is exact in any case; with sparse_eps its gradients come from a compact softmax."""
    output = linear_copg_loss(
        hidden_states,
        lm_head_weight,
        batch.labels,
        batch.ref_logps,
        batch.rewards,
        beta=beta,
        group_size=batch.group_sizes[0],
        cu_groups=batch.cu_groups,
        cu_seqlens=batch.cu_seqlens,
        sparse_eps=sparse_eps or None,
    )
    sparsity = {} if output.sparsity is None else output.sparsity._asdict()
    return Objective(output.loss, output.log_ratios, {name: share.item() for name, share in sparsity.items()})


def reference_objective(hidden_states: Tensor, lm_head_weight: Tensor, batch: Batch, beta: float) -> Objective:
    """Full logits in float64: the rounding that `--check` shows is then the fused operator's alone."""
    token_logps = linear_logps_ref(hidden_states.double(), lm_head_weight.double(), batch.labels)
    logps = sequence_logps_ref(token_logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    loss = copg_loss_ref(
        logps,
        batch.ref_logps,
        batch.rewards,
        beta=beta,
        group_size=batch.group_sizes[0],
        cu_groups=batch.cu_groups,
    )
    return Objective(loss, (logps - batch.ref_logps).detach(), {})


def objective(
    impl: str, hidden_states: Tensor, lm_head_weight: Tensor, batch: Batch, beta: float, sparse_eps: float
) -> Objective:
    if impl == "reference":
        return reference_objective(hidden_states, lm_head_weight, batch, beta)
    return fused_objective(hidden_states, lm_head_weight, batch, beta, sparse_eps)


def completion_logps(hidden_states: Tensor, lm_head_weight: Tensor, batch: Batch) -> Tensor:
    """(N,) log-probability of each completion, EOS included."""
    per_token_logps = linear_logps(hidden_states, lm_head_weight, batch.labels)
    return sequence_logps(per_token_logps, batch.labels, cu_seqlens=batch.cu_seqlens)


def head_difference(
    model: nn.Module, hidden_states: Tensor, lm_head_weight: Tensor, batch: Batch, beta: float
) -> HeadDifference:
    """Fused against reference on one batch, for every parameter of the model.

    Both go through the same transformer pass, so what differs is the head. A tensor's difference is relative
    to its own norm: no tensor of GPT-2 has a true gradient of zero (the key bias does, inside c_attn.bias).
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    fused = fused_objective(hidden_states, lm_head_weight, batch, beta)
    reference = reference_objective(hidden_states, lm_head_weight, batch, beta)
    fused_grads = torch.autograd.grad(fused.loss, parameters, retain_graph=True)
    reference_grads = torch.autograd.grad(reference.loss, parameters, retain_graph=True)
    pairs = zip(fused_grads, reference_grads, strict=True)
    ratios = torch.stack([(ours - truth).norm() / truth.norm() for ours, truth in pairs])
    worst = int(ratios.argmax())  # a NaN counts as the largest
    return HeadDifference(abs(fused.loss.item() - reference.loss.item()), ratios[worst].item(), names[worst])


def reward_margin(log_ratios: Tensor, batch: Batch) -> list[float]:
    """Per group, log-ratio of the best completion minus the worst's; none where all rewards are equal."""
    margins = []
    groups = zip(log_ratios.split(batch.group_sizes), batch.rewards.split(batch.group_sizes), strict=True)
    for ratios, rewards in groups:
        best, worst = rewards.argmax(), rewards.argmin()
        if rewards[best] > rewards[worst]:
            margins.append((ratios[best] - ratios[worst]).item())
    return margins
