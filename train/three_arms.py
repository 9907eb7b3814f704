"""The three-armed bandit of the CoPG paper (arXiv 2406.19185): its constants, draws, optimum and expected gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REWARDS = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
MU = torch.tensor([[0.1, 0.2, 0.7], [0.05, 0.05, 0.9]], dtype=torch.float64)
REFERENCE = torch.full((3,), 1 / 3, dtype=torch.float64)
BETA = 0.5
NUM_PAIRS, BATCH_SIZE = 10_000, 512


class Pairs(NamedTuple):
    arms: Tensor
    """(S, B, 2) int64, S runs of B pairs."""
    first_preferred: Tensor
    """(S, B) bool."""


def completions(arm_logps: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """logps, ref_logps and rewards, (2 S B,), pair after pair."""
    arms = pairs.arms.flatten(1)
    return arm_logps.gather(1, arms).flatten(), REFERENCE.log()[arms].flatten(), REWARDS[arms].flatten()


def objective(policy: Tensor) -> Tensor:
    """J of policies (..., 3)."""
    return (policy * (REWARDS - BETA * (policy / REFERENCE).log())).sum(-1)


def optimum() -> Tensor:
    """(3,) pi* = pi_ref exp(R / beta) / Z."""
    return (REFERENCE.log() + REWARDS / BETA).softmax(0)


def regret(policy: Tensor) -> Tensor:
    """J(pi*) - J(pi)."""
    return objective(optimum()) - objective(policy)


def population() -> tuple[Pairs, Tensor]:
    """Every pair with either preference, as runs of one pair each, and its probability."""
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    pair = MU[0, first] * MU[1, second]
    preferred = torch.sigmoid(REWARDS[first] - REWARDS[second])
    arms = torch.stack([first, second], -1).repeat(2, 1)
    rows = Pairs(arms.unsqueeze(1), torch.arange(18).unsqueeze(1) < 9)
    return rows, torch.cat([pair * preferred, pair * (1 - preferred)])


def rest_point(method: Callable[[Tensor, Pairs], Tensor]) -> Tensor:
    """(3,) the policy at which the expected gradient vanishes, coming from the reference policy."""
    pairs, probability = population()
    logits = REFERENCE.log().requires_grad_()
    for _ in range(20_000):
        arm_logps = logits.log_softmax(0)
        rows = arm_logps.detach().repeat(len(probability), 1).requires_grad_()
        (slopes,) = torch.autograd.grad(method(rows, pairs), rows)
        (gradient,) = torch.autograd.grad(arm_logps, logits, probability @ slopes)
        if gradient.abs().max() < 1e-10:
            return logits.detach().softmax(0)
        logits.data -= gradient
    raise RuntimeError(f"no rest point found: the expected gradient is still {gradient.tolist()}")


def draw_pairs(generators: Sequence[torch.Generator]) -> Pairs:
    """The data set of each seed."""
    arms = torch.stack([MU.multinomial(NUM_PAIRS, replacement=True, generator=g).T for g in generators])
    rewards = REWARDS[arms]
    uniform = torch.stack([torch.rand(NUM_PAIRS, dtype=torch.float64, generator=g) for g in generators])
    return Pairs(arms, uniform < torch.sigmoid(rewards[..., 0] - rewards[..., 1]))


def shuffled_batches(data: Pairs, generators: Sequence[torch.Generator]) -> list[Pairs]:
    """An epoch of each seed in an order of its own; the last batch is what is left."""
    order = torch.stack([torch.randperm(NUM_PAIRS, generator=g) for g in generators])
    run = torch.arange(len(order)).unsqueeze(1)
    return [Pairs(data.arms[run, rows], data.first_preferred[run, rows]) for rows in order.split(BATCH_SIZE, 1)]
