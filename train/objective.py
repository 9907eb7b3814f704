"""The loss of a step, and the head under it twice: through the fused operators and as the specification writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from copg_kernels import copg_loss, linear_copg_loss, linear_logps, linear_sequence_loss, losses, sequence_logps
from copg_kernels.integrations.transformers import HeadInputs
from copg_kernels.reference import copg_loss_ref, linear_logps_ref, sequence_logps_ref
from train.batch import Batch, Group
from train.config import Config

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "copg": copg_loss,
    "ipo": losses.ipo_loss,
    "dpo": losses.dpo_loss,
    "rloo": losses.rloo_loss,
    "reinforce": losses.reinforce_loss,
    "raft": losses.raft_loss,
    "ppo": losses.ppo_loss,
    "rebel": losses.rebel_loss,
}


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step as a function of its log-probs (N,), summed over tokens; the rest is bound."""

    function: Callable[..., Tensor]
    ref_logps: Tensor  # (N,) as `function` gets them: averages with --average-logps
    rewards: Tensor  # (N,)
    beta: float
    groups: dict[str, Any]  # group_size or cu_groups
    average: bool
    lengths: Tensor  # (N,) tokens per completion

    def __call__(self, logps: Tensor) -> Tensor:
        logps = logps / self.lengths if self.average else logps
        return self.function(logps, self.ref_logps, self.rewards, beta=self.beta, **self.groups)


class Objective(NamedTuple):
    loss: Tensor  # scalar; differentiable, unless its backward pass has been taken already
    log_ratios: Tensor  # (N,) log pi - log pi_ref of each completion, summed over its tokens, detached
    sparsity: dict[str, float]  # density, dropped and overflow of sparse gradients; empty for exact ones


class HeadDifference(NamedTuple):
    loss: float  # |fused - reference|
    gradient: float  # the largest ||fused - reference|| / ||reference|| over the parameter tensors
    parameter: str  # where that is


def step_loss(config: Config, batch: Batch, baseline: float = 0.0) -> StepLoss:
    """The loss of --loss on this batch.

    PPO's ratio and REBEL's anchor are the sampling policy's log-probs; for completions from elsewhere the reference
    policy stands in for that one. The baseline is REINFORCE's.
    """
    lengths = batch.cu_seqlens.diff()
    divisor = lengths if config.average_logps else torch.ones_like(lengths)
    ref_logps = batch.ref_logps / divisor
    old_logps = batch.old_logps / divisor if batch.old_logps.numel() else ref_logps
    function = FUNCTIONS[config.loss]
    if config.loss == "ppo":
        function = partial(function, old_logps=old_logps)
    elif config.loss == "reinforce":
        function = partial(function, baseline=baseline)
    elif config.loss == "rebel":
        ref_logps = old_logps
    groups = {"group_size": batch.group_sizes[0]} if batch.cu_groups is None else {"cu_groups": batch.cu_groups}
    return StepLoss(function, ref_logps, batch.rewards, config.beta, groups, config.average_logps, lengths)


def fused_objective(
    hidden_states: Tensor, head: HeadInputs, batch: Batch, loss: StepLoss, sparse_eps: float = 0.0
) -> Objective:
    """The loss is exact in any case; with sparse_eps its gradients come from a compact softmax."""
    fused = linear_copg_loss
    if loss.function is not copg_loss:
        fused = partial(linear_sequence_loss, loss=loss.function)
    output = fused(
        hidden_states,
        head.lm_head_weight,
        batch.labels,
        loss.ref_logps,
        loss.rewards,
        beta=loss.beta,
        cu_seqlens=batch.cu_seqlens,
        average_logps=loss.average,
        sparse_eps=sparse_eps or None,
        **loss.groups,
        **head.options(),
    )
    logps = output.logps * loss.lengths if loss.average else output.logps
    sparsity = {} if output.sparsity is None else output.sparsity._asdict()
    shares = {name: share.item() for name, share in sparsity.items()}
    return Objective(output.loss, logps - batch.ref_logps, shares)


def reference_objective(hidden_states: Tensor, head: HeadInputs, batch: Batch, loss: StepLoss) -> Objective:
    """Full logits in float64: the rounding that `--check` shows is then the fused operator's alone."""
    if loss.function is copg_loss:
        loss = replace(loss, function=copg_loss_ref)
    logps = completion_logps(hidden_states, head, batch, "reference")
    return Objective(loss(logps), (logps - batch.ref_logps).detach(), {})


def objective(
    impl: str, hidden_states: Tensor, head: HeadInputs, batch: Batch, loss: StepLoss, sparse_eps: float = 0.0
) -> Objective:
    if impl == "reference":
        return reference_objective(hidden_states, head, batch, loss)
    return fused_objective(hidden_states, head, batch, loss, sparse_eps)


def completion_logps(hidden_states: Tensor, head: HeadInputs, batch: Batch, impl: str = "fused") -> Tensor:
    """(N,) log-probability of each completion, EOS included; in float64 from full logits for the reference."""
    if impl == "fused":
        per_token_logps = linear_logps(hidden_states, head.lm_head_weight, batch.labels, **head.options())
        return sequence_logps(per_token_logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    options = head.options() | {"bias": None if head.bias is None else head.bias.double()}
    token_logps = linear_logps_ref(hidden_states.double(), head.lm_head_weight.double(), batch.labels, **options)
    return sequence_logps_ref(token_logps, batch.labels, cu_seqlens=batch.cu_seqlens)


def head_difference(
    model: nn.Module, hidden_states: Tensor, head: HeadInputs, batch: Batch, loss: StepLoss
) -> HeadDifference:
    """Fused against reference on one batch, for every parameter of the model that is trained.

    Both go through the same transformer pass, so what differs is the head. A tensor's difference is relative to its own
    norm, where that is not zero: half of all adapters get no gradient in the first step.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*named, strict=True)
    fused = fused_objective(hidden_states, head, batch, loss)
    reference = reference_objective(hidden_states, head, batch, loss)
    fused_grads = torch.autograd.grad(fused.loss, parameters, retain_graph=True)
    reference_grads = torch.autograd.grad(reference.loss, parameters, retain_graph=True)
    pairs = zip(fused_grads, reference_grads, strict=True)
    ratios = torch.stack([_relative((ours - truth).norm(), truth.norm()) for ours, truth in pairs])
    worst = int(ratios.argmax())  # a NaN counts as the largest
    return HeadDifference(abs(fused.loss.item() - reference.loss.item()), ratios[worst].item(), names[worst])


def _relative(difference: Tensor, norm: Tensor) -> Tensor:
    return difference / norm if norm > 0 else difference


def reward_margin(log_ratios: Tensor, groups: Sequence[Group]) -> list[float]:
    """Per group, log-ratio of the best completion minus the worst's; none where all rewards are equal."""
    margins = []
    parts = log_ratios.split([len(group.rewards) for group in groups])
    for ratios, group in zip(parts, groups, strict=True):
        rewards = torch.tensor(group.rewards)
        best, worst = rewards.argmax(), rewards.argmin()
        if rewards[best] > rewards[worst]:
            margins.append((ratios[best] - ratios[worst]).item())
    return margins
