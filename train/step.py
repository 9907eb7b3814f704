"""One step of training: the loss of a few whole groups, its gradient over all ranks, the optimizer's step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train import ranks
from train.batch import Group, num_completions, num_tokens, singles
from train.model import head_operands
from train.objective import Objective, head_difference, objective, reward_margin, step_loss
from train.online import next_groups, sample_statistics
from train.optimizer import apply_gradients, learning_rate
from train.process import peak_mib
from train.state import DTYPES, Run, device_of, pack_for
from train.two_pass import backward_in_one_pass, backward_in_two_passes


class Outcome(NamedTuple):
    loss: float
    log_ratios: Tensor  # (N,) of all completions of the step, on the CPU
    sparsity: dict[str, float]  # as in Objective, the mean over tokens
    checked: dict[str, float | str]  # what --check found


def train_step(run: Run) -> dict[str, float | str]:
    """One step on the next whole groups, the data's or the policy's own; returns its log record."""
    config, started = run.config, time.perf_counter()
    groups = next_groups(run)
    rewards = torch.tensor([reward for group in groups for reward in group.rewards]).double()
    baseline = run.reward_sum / run.reward_count if run.reward_count else rewards.mean().item()
    outcome = backward(run, groups, baseline)
    lr = learning_rate(config, run.step)
    grad_norm = apply_gradients(run, lr)
    run.step += 1
    run.reward_sum, run.reward_count = run.reward_sum + rewards.sum().item(), run.reward_count + len(rewards)
    samples = {} if run.reward is None else sample_statistics(run, groups)
    return {
        "step": run.step,
        **outcome.checked,
        **outcome.sparsity,
        **samples,
        "loss": outcome.loss,
        "margin": mean(reward_margin(outcome.log_ratios, groups)),
        # Over the data's completions: the KL divergence only where these were sampled from the policy.
        "mean_log_ratio": outcome.log_ratios.mean().item(),
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens_per_s": num_tokens(groups) / (time.perf_counter() - started),
        "peak_mib": max(ranks.from_all(peak_mib(device_of(run.model)))),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def backward(run: Run, groups: Sequence[Group], baseline: float) -> Outcome:
    """Adds the gradient of the step's loss to the parameters', in the cheapest of the ways that are exact."""
    whole_groups = len(groups) >= ranks.size() and not run.config.vocab_parallel
    items = groups if whole_groups else singles(groups)
    most = max(num_completions(ranks.share(items, rank)) for rank in range(ranks.size()))
    in_parts = 0 < run.config.micro_batch < most
    if whole_groups and not in_parts:
        return backward_on_own_groups(run, groups, baseline)
    batch = pack_for(run, groups)
    loss = step_loss(run.config, batch, baseline)
    value, logps = (backward_in_two_passes if in_parts else backward_in_one_pass)(run, groups, loss)
    return Outcome(value.item(), (logps - batch.ref_logps).cpu(), {}, {})


def backward_on_own_groups(run: Run, groups: Sequence[Group], baseline: float) -> Outcome:
    """Each rank takes whole groups, where the loss costs the fewest products; the step's is the mean over groups."""
    config, own = run.config, ranks.share(groups)
    batch = pack_for(run, own)
    loss = step_loss(config, batch, baseline)

    def call(model: nn.Module) -> tuple[Objective, dict[str, float | str]]:
        hidden_states, head = head_operands(model, batch, DTYPES[config.dtype])
        checked: dict[str, float | str] = {}
        if config.check:
            difference = head_difference(model, hidden_states, head, batch, loss)
            checked = {
                "loss_difference": difference.loss,
                "gradient_difference": difference.gradient,
                "worst": difference.parameter,
            }
        return objective(config.impl, hidden_states, head, batch, loss, config.sparse_eps), checked

    outcome, checked = run.policy(call)
    share = len(own) / len(groups)
    # DDP and FSDP2 take the mean over ranks.
    (outcome.loss * (share * ranks.size())).backward()
    told = ranks.from_all((outcome.loss.item() * share, outcome.log_ratios.cpu(), outcome.sparsity, len(batch.labels)))
    losses, log_ratios, sparsities, tokens = zip(*told, strict=True)
    sparsity = {
        name: sum(part[name] * count for part, count in zip(sparsities, tokens, strict=True)) / sum(tokens)
        for name in outcome.sparsity
    }
    return Outcome(sum(losses), torch.cat(log_ratios), sparsity, checked)
