"""The loss family around CoPG, on sequence log-probabilities; one signature, so that each can stand in for another.

All take (logps, ref_logps, rewards, *, beta, group_size=2): (N,) tensors of consecutive groups of k completions of one
prompt, in nats and in units of reward, and return a scalar float32 (float64 for float64 logps). Only logps is
differentiable. l_i = logps_i - ref_logps_i and A_i = rewards_i - beta * l_i throughout. All raise TypeError or
ValueError for what `copg_kernels.copg_loss` refuses. Losses on pairs take every pair of a group.

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

import torch
from torch import Tensor

from copg_kernels import checks


def ipo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """Identity preference optimisation: the pair's log-ratio gap is regressed on a constant.

        loss = mean over pairs of (d - 1 / (2 beta))^2,    d = l_winner - l_loser

    The winner is the completion with the higher reward; pairs of equal rewards are left out. The gradient pulls d to
    1 / (2 beta), however large the difference in reward is. CoPG on pairs with rewards of +-1/4 is beta / 4 times this.

    Reference: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, AISTATS 2024,
    https://arxiv.org/abs/2310.12036.
    """
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    gap, sign = _pairs(logps, ref_logps, rewards, group_size)
    return _mean_over_ranked((gap * sign - 1 / (2 * beta)) ** 2, sign)


def dpo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """Direct preference optimisation: logistic regression on the pair's log-ratio gap.

        loss = mean over pairs of -log sigmoid(beta * d),    d = l_winner - l_loser

    The winner is the completion with the higher reward; pairs of equal rewards are left out. The gradient raises the
    winner and lowers the loser by beta * sigmoid(-beta d), which never vanishes at a finite d.

    Reference: Rafailov et al., Direct Preference Optimization, NeurIPS 2023, https://arxiv.org/abs/2305.18290.
    """
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    gap, sign = _pairs(logps, ref_logps, rewards, group_size)
    return _mean_over_ranked(-torch.nn.functional.logsigmoid(beta * gap * sign), sign)


def rloo_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """REINFORCE leave-one-out: each completion against the mean of the others.

        loss = mean over groups of -(1/k) sum_i sg(A_i - mean_{j != i} A_j) * logps_i        sg: no gradient

    The value means nothing. The gradient is minus the policy gradient for completions of the policy itself, and for any
    completions that of `copg_loss`: CoPG is what makes this estimator right for the completions of another policy.

    Reference: Ahmadian et al., Back to Basics, ACL 2024, https://arxiv.org/abs/2402.14740.
    """
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    return _policy_gradient(logps, _leave_one_out(_regularized(logps, ref_logps, rewards, beta), group_size))


def reinforce_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int = 2,
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
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    if isinstance(baseline, Tensor):
        if baseline.shape not in ((), logps.shape):
            raise ValueError(
                f"baseline must be a number or have shape {tuple(logps.shape)}, got {tuple(baseline.shape)}"
            )
        baseline = baseline.to(logps.dtype)
    return _policy_gradient(logps, _regularized(logps, ref_logps, rewards, beta) - baseline)


def raft_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """Reward-ranked fine-tuning: the likelihood of each group's best completion.

        loss = mean over groups of -logps_{argmax_i rewards_i}

    Of equal best rewards the first counts. The gradient raises the best completion and nothing lowers the others;
    ref_logps and beta take no part, so nothing holds the policy back.

    Reference: Dong et al., RAFT, TMLR 2023, https://arxiv.org/abs/2304.06767.
    """
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    best = rewards.view(-1, group_size).argmax(1, keepdim=True)
    return -logps.view(-1, group_size).gather(1, best).mean()


def ppo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int = 2,
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
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    checks.check_old_logps(old_logps, logps, clip)
    old_logps = old_logps.detach().to(logps.dtype)
    advantages = _leave_one_out(_regularized(old_logps, ref_logps, rewards, beta), group_size)
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def rebel_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int = 2) -> Tensor:
    """Regression to relative rewards: the pair's log-ratio gap is regressed on its difference in reward.

        loss = mean over pairs of (d - eta * dR)^2,    d = l_i - l_j,  dR = rewards_i - rewards_j,  eta = 1 / beta

    ref_logps are the previous policy's, which sampled the completions. The loss is 4 / beta times CoPG's, for every k;
    what differs is the anchor, which moves with every iteration.

    Reference: Gao et al., REBEL, NeurIPS 2024, https://arxiv.org/abs/2404.16767.
    """
    logps, ref_logps, rewards = _checked(logps, ref_logps, rewards, beta, group_size)
    first, second = _pair_index(group_size, logps.device)
    log_ratios = (logps - ref_logps).view(-1, group_size)
    scaled = (rewards / beta).view(-1, group_size)
    residual = log_ratios - scaled
    return ((residual[:, first] - residual[:, second]) ** 2).mean()


def _checked(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in the dtype of the result: a loss that stayed in bfloat16 would sum and subtract in 8 bits."""
    checks.check_loss_inputs(logps, ref_logps, rewards, beta, group_size, None)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    return logps.to(dtype), ref_logps.detach().to(dtype), rewards.detach().to(dtype)


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
