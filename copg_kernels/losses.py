"""The loss family around CoPG, on sequence log-probabilities; one signature, so that each can stand in for another.

All take (logps, ref_logps, rewards, *, beta, group_size): (N,) tensors of consecutive groups of k completions of one
prompt, in nats and in units of reward, and return a scalar float32 (float64 for float64 logps). They compute in
float64. Only logps is differentiable. l_i = logps_i - ref_logps_i and A_i = rewards_i - beta * l_i throughout. All
raise TypeError or ValueError for what `copg_kernels.copg_loss` refuses. Losses on pairs take every pair of a group;
where they are defined on single pairs, group_size is 2 unless it is given.

Averaged log-likelihoods (Grinsztajn et al., https://arxiv.org/abs/2406.19188) fit every loss here and `copg_loss`:

    logps_i = 1/|y_i| sum_t log pi(y_it | x, y_i<t),    ref_logps_i averaged in the same way

from `sequence_logps(average=True)` or `linear_sequence_loss(average_logps=True)`; |y| counts the tokens that are not
ignored. The losses stay as they are, each token's gradient is divided by |y_i|, and beta weighs a nat per token: the
pull to the reference stays about the same with beta times the mean |y|. The optimum moves. Where all A_i of a prompt
are equal, which is where CoPG, RLOO and REBEL come to rest, the policy is then

    pi(y) = pi_ref(y) exp(|y| (R(y) - c) / beta),    c such that pi sums to one,

so completions with a reward above c gain in proportion to their length and those below it lose. The gradients of
RLOO, REINFORCE and PPO are then no policy gradients, not even on the policy's own completions.

docs/methods.md lists published methods that are one of these losses under another name, with the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from copg_kernels import checks

_Loss = TypeVar("_Loss", bound=Callable[..., Tensor])


def separable(loss: _Loss) -> _Loss:
    """Declare that a loss is a mean over groups of a pure function of each group's log-probabilities.

        loss(logps) = mean over groups g of f(logps[g], g)        no state, no randomness, no other tensor that trains

    `linear_sequence_loss` may then ask for a group's slopes before it knows the log-probabilities of the next, by
    calling the loss several times, and needs three head GEMMs however many groups there are. Every loss of this package
    is declared so; a loss of your own can be, as `@separable` above its definition.
    """
    loss.separable = True  # type: ignore[attr-defined]
    return loss


@separable
def ipo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """Identity preference optimisation: the pair's log-ratio gap is regressed on a constant.

        loss = mean over pairs of (d - 1 / (2 beta))^2,    d = l_winner - l_loser

    The winner is the completion with the higher reward; pairs of equal rewards are left out. The gradient pulls d to
    1 / (2 beta), however large the difference in reward is. CoPG on pairs with rewards of +-1/4 is beta / 4 times this.

    Reference: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, AISTATS 2024,
    https://arxiv.org/abs/2310.12036.
    """
    operands, dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    gap, sign = _pairs(*operands, group_size)
    return _mean_over_ranked((gap * sign - 1 / (2 * beta)) ** 2, sign).to(dtype)


@separable
def dpo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """Direct preference optimisation: logistic regression on the pair's log-ratio gap.

        loss = mean over pairs of -log sigmoid(beta * d),    d = l_winner - l_loser

    The winner is the completion with the higher reward; pairs of equal rewards are left out. The gradient raises the
    winner and lowers the loser by beta * sigmoid(-beta d), which never vanishes at a finite d.

    Reference: Rafailov et al., Direct Preference Optimization, NeurIPS 2023, https://arxiv.org/abs/2305.18290.
    """
    operands, dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    gap, sign = _pairs(*operands, group_size)
    return _mean_over_ranked(-torch.nn.functional.logsigmoid(beta * gap * sign), sign).to(dtype)


@separable
def rloo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int) -> Tensor:
    """REINFORCE leave-one-out: each completion against the mean of the others.

        loss = mean over groups of -(1/k) sum_i sg(A_i - mean_{j != i} A_j) * logps_i        sg: no gradient

    The value means nothing. The gradient is minus the policy gradient for completions of the policy itself, and for any
    completions that of `copg_loss`: CoPG is what makes this estimator right for the completions of another policy.

    Reference: Ahmadian et al., Back to Basics, ACL 2024, https://arxiv.org/abs/2402.14740.
    """
    operands, dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    return _policy_gradient(operands[0], _leave_one_out(_regularized(*operands, beta), group_size)).to(dtype)


@separable
def reinforce_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int,
    baseline: float | Tensor = 0.0,
) -> Tensor:
    """REINFORCE with a given baseline.

        loss = -mean_i sg(A_i - baseline) * logps_i

    The gradient is minus the policy gradient for completions sampled from the policy itself, whatever the baseline; for
    other completions it is biased (`copg_loss` is not).

    Args:
        baseline: a number, such as a running mean of rewards, or one per completion (N,).

    Reference: Williams, Simple Statistical Gradient-Following Algorithms, Machine Learning 8, 1992.
    """
    operands, dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    if isinstance(baseline, Tensor):
        if baseline.shape not in ((), logps.shape):
            raise ValueError(
                f"baseline must be a number or have shape {tuple(logps.shape)}, got {tuple(baseline.shape)}"
            )
        checks.refuse_gradient("baseline", baseline)
        baseline = baseline.double()
    return _policy_gradient(operands[0], _regularized(*operands, beta) - baseline).to(dtype)


@separable
def raft_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int) -> Tensor:
    """Reward-ranked fine-tuning: the likelihood of each group's best completion.

        loss = mean over groups of -logps_{argmax_i rewards_i}

    Of equal best rewards the first counts. The gradient raises the best completion and nothing lowers the others;
    ref_logps and beta take no part, so nothing holds the policy back.

    Reference: Dong et al., RAFT, TMLR 2023, https://arxiv.org/abs/2304.06767.
    """
    (logps, _, rewards), dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    best = rewards.view(-1, group_size).argmax(1, keepdim=True)
    return -logps.view(-1, group_size).gather(1, best).mean().to(dtype)


@separable
def ppo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int,
    old_logps: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """Proximal policy optimisation with the completion as one action.

        rho_i = exp(logps_i - old_logps_i),    B_i = rewards_i - beta * (old_logps_i - ref_logps_i)
        a_i   = B_i - mean_{j != i} B_j
        loss  = -mean_i min(rho_i a_i, clamp(rho_i, 1 - clip, 1 + clip) a_i)

    The gradient is that of importance-weighted RLOO while the ratio is within 1 +- clip, and zero once it is past.

    Args:
        old_logps: (N,) under the policy that sampled the completions.
        clip: half-width of the trust region of the ratio, > 0.

    Reference: Schulman et al., Proximal Policy Optimization Algorithms, https://arxiv.org/abs/1707.06347.
    """
    checks.check_old_logps(old_logps, logps, clip)
    (logps, ref_logps, rewards), dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    old_logps = old_logps.double()
    advantages = _leave_one_out(_regularized(old_logps, ref_logps, rewards, beta), group_size)
    highest, lowest = math.log1p(clip), math.log1p(-clip) if clip < 1 else -math.inf
    log_ratios = logps - old_logps
    # Past the edge the ratio is a constant, which it has to be before exp: autograd takes 0 times inf for NaN.
    past = torch.where(advantages > 0, log_ratios > highest, (log_ratios < lowest) | (advantages == 0))
    edge = 1 + clip * advantages.sign()
    ratio = torch.where(past, edge, log_ratios.masked_fill(past, 0.0).exp())
    return -(ratio * advantages).mean().to(dtype)


@separable
def rebel_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int) -> Tensor:
    """Regression to relative rewards: the pair's log-ratio gap is regressed on its difference in reward.

        loss = mean over pairs of (d - eta * dR)^2,    d = l_i - l_j,  dR = rewards_i - rewards_j,  eta = 1 / beta

    ref_logps are the previous policy's, which sampled the completions. The loss is 4 / beta times CoPG's, for every k;
    what differs is the anchor, which moves with every iteration.

    Reference: Gao et al., REBEL, NeurIPS 2024, https://arxiv.org/abs/2404.16767.
    """
    (logps, ref_logps, rewards), dtype = _checked(logps, ref_logps, rewards, beta, group_size)
    first, second = _pair_index(group_size, logps.device)
    log_ratios = (logps - ref_logps).view(-1, group_size)
    scaled = (rewards / beta).view(-1, group_size)
    residual = log_ratios - scaled
    return ((residual[:, first] - residual[:, second]) ** 2).mean().to(dtype)


def _checked(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, group_size: int
) -> tuple[tuple[Tensor, Tensor, Tensor], torch.dtype]:
    """The tensors in float64, where their differences lose nothing, and the dtype of the result."""
    checks.check_loss_inputs(logps, ref_logps, rewards, beta, group_size, None)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    return (logps.double(), ref_logps.detach().double(), rewards.detach().double()), dtype


def _pair_index(group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(group_size, group_size, offset=1, device=device)
    return first, second


def _pairs(logps: Tensor, ref_logps: Tensor, rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """l_i - l_j of every pair, and +1, -1 or 0 for which one is preferred."""
    first, second = _pair_index(group_size, logps.device)
    log_ratios = (logps - ref_logps).view(-1, group_size)
    grouped = rewards.view(-1, group_size)
    gap = log_ratios[:, first] - log_ratios[:, second]
    return gap, (grouped[:, first] - grouped[:, second]).sign()


def _mean_over_ranked(losses: Tensor, sign: Tensor) -> Tensor:
    ranked = sign != 0
    return losses.where(ranked, 0.0).sum() / ranked.sum().clamp(min=1)


def _regularized(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return rewards - beta * (logps - ref_logps)


def _leave_one_out(values: Tensor, group_size: int) -> Tensor:
    """values_i - mean_{j != i} values_j = k / (k - 1) * (values_i - mean of the group)."""
    grouped = values.view(-1, group_size)
    centered = grouped - grouped.mean(1, keepdim=True)
    return (centered * (group_size / (group_size - 1))).flatten()


def _policy_gradient(logps: Tensor, advantages: Tensor) -> Tensor:
    return -(advantages.detach() * logps).mean()
