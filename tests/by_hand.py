"""The equations of the losses on lists of Python numbers: (value, derivative by every log-prob)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Floats = Sequence[float]
Result = tuple[float, list[float]]


def copg(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int) -> Result:
    """Var(A) / (2 beta) per group; slope -(A_i - mean of the others) / k."""
    A = regularized(logps, ref_logps, rewards, beta)
    starts = range(0, len(A), k)
    value = 0.0
    for start in starts:
        group = A[start : start + k]
        mean = sum(group) / k
        value += sum((a - mean) ** 2 for a in group) / (k - 1) / (2 * beta)
    slopes = [-advantage / k / len(starts) for advantage in leave_one_out(A, k)]
    return value / len(starts), slopes


def rloo(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int) -> Result:
    advantages = leave_one_out(regularized(logps, ref_logps, rewards, beta), k)
    return weighted_likelihood(logps, advantages)


def reinforce(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int, baseline: Floats) -> Result:
    A = regularized(logps, ref_logps, rewards, beta)
    return weighted_likelihood(logps, [a - b for a, b in zip(A, baseline, strict=True)])


def raft(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int) -> Result:
    starts = range(0, len(logps), k)
    best = [max(range(start, start + k), key=lambda i: (rewards[i], -i)) for start in starts]
    slopes = [-1 / len(starts) if i in best else 0.0 for i in range(len(logps))]
    return -sum(logps[i] for i in best) / len(starts), slopes


def ppo(
    logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int, old_logps: Floats, clip: float
) -> Result:
    """A clipped completion contributes a constant: its slope is 0."""
    advantages = leave_one_out(regularized(old_logps, ref_logps, rewards, beta), k)
    N = len(logps)
    value, slopes = 0.0, []
    for new, old, advantage in zip(logps, old_logps, advantages, strict=True):
        ratio = math.exp(new - old)
        past = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
        edge = 1 + clip if advantage > 0 else 1 - clip
        value -= (edge if past else ratio) * advantage / N
        slopes.append(0.0 if past else -ratio * advantage / N)
    return value, slopes


def ipo(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int) -> Result:
    return over_ranked_pairs(
        logps, ref_logps, rewards, k, lambda d: (d - 1 / (2 * beta)) ** 2, lambda d: 2 * (d - 1 / (2 * beta))
    )


def dpo(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int) -> Result:
    return over_ranked_pairs(
        logps,
        ref_logps,
        rewards,
        k,
        lambda d: max(0.0, -beta * d) + math.log1p(math.exp(-abs(beta * d))),
        lambda d: -beta / (1 + math.exp(min(beta * d, 700.0))),
    )


def rebel(logps: Floats, ref_logps: Floats, rewards: Floats, *, beta: float, k: int) -> Result:
    pairs = pairs_of_groups(len(logps), k)
    value, slopes = 0.0, [0.0] * len(logps)
    for i, j in pairs:
        residual = (logps[i] - ref_logps[i]) - (logps[j] - ref_logps[j]) - (rewards[i] - rewards[j]) / beta
        value += residual**2 / len(pairs)
        slopes[i] += 2 * residual / len(pairs)
        slopes[j] -= 2 * residual / len(pairs)
    return value, slopes


def regularized(logps: Floats, ref_logps: Floats, rewards: Floats, beta: float) -> list[float]:
    return [r - beta * (a - b) for a, b, r in zip(logps, ref_logps, rewards, strict=True)]


def leave_one_out(values: Floats, k: int) -> list[float]:
    advantages = []
    for i, value in enumerate(values):
        start = i - i % k
        others = [values[j] for j in range(start, start + k) if j != i]
        advantages.append(value - sum(others) / (k - 1))
    return advantages


def weighted_likelihood(logps: Floats, weights: Floats) -> Result:
    N = len(logps)
    return -sum(w * x for w, x in zip(weights, logps, strict=True)) / N, [-w / N for w in weights]


def pairs_of_groups(N: int, k: int) -> list[tuple[int, int]]:
    return [(i, j) for start in range(0, N, k) for i in range(start, start + k) for j in range(i + 1, start + k)]


def over_ranked_pairs(
    logps: Floats,
    ref_logps: Floats,
    rewards: Floats,
    k: int,
    value_of: Callable[[float], float],
    slope_of: Callable[[float], float],
) -> Result:
    """Mean over the pairs with a winner, of a function of the winner's log-ratio minus the loser's."""
    ranked = [pair for pair in pairs_of_groups(len(logps), k) if rewards[pair[0]] != rewards[pair[1]]]
    value, slopes = 0.0, [0.0] * len(logps)
    for pair in ranked:
        winner, loser = sorted(pair, key=lambda i: -rewards[i])
        gap = (logps[winner] - ref_logps[winner]) - (logps[loser] - ref_logps[loser])
        value += value_of(gap) / len(ranked)
        slopes[winner] += slope_of(gap) / len(ranked)
        slopes[loser] -= slope_of(gap) / len(ranked)
    return value, slopes
