"""What a row's softmax becomes on its way into the gradient: three numbers of each row, and c, which stays outside.

With g and h the upstream gradients of a row's log-probability and of its entropy H, dL/dz = -c * tile:

    tile[v] = a (p_v - 1[v = label]) + b p_v (log p_v + H)      c = |g| + 4 |h|,  a = g / c,  b = h / c
            = p_v (shift + b log p_v)                           shift = a + b H,  away from the label
            = a expm1(logp) + b exp(logp) (logp + H)            at the label

Of the log-probability alone the tile is softmax minus one-hot, c = g, and nothing but the label's entry is needed. The
label's entry is never a rounded probability minus one: for p > 0.99 that difference would keep no digit in bfloat16.

c follows a token into a T x H operand, where it costs less than in T x V. It is as large as makes every entry of the
tile at most 1: |p (log p + H)| is below 4 for a vocabulary of up to three million entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of a row's entropy, beside one of its log-probability.
_ENTROPY_UNITS = 4.0
_ROWS_AT_ONCE = 256
# What stands for the logarithm of a probability of 0, for which 0 log 0 = 0.
_LOWEST_LOG = -150.0


class RowSlopes(NamedTuple):
    """Of each token; with the entropy's part, or without."""

    at_label: Tensor  # (T,)
    of_others: Tensor | None = None  # (2, T): shift and b


def slopes_of_logps(per_token_logps: Tensor) -> RowSlopes:
    """Of the log-probability alone."""
    return RowSlopes(per_token_logps.expm1())


def slopes_of_both(
    dlogps: Tensor | None, dentropy: Tensor, per_token_logps: Tensor, entropy: Tensor, lse: Tensor
) -> tuple[Tensor, RowSlopes]:
    """(T,) each, lse (2, T) -> c (T,) and the slopes, computed in float64; 0 where neither gradient arrives."""
    h, logp, dtype = dentropy.double(), per_token_logps.double(), per_token_logps.dtype
    g = torch.zeros_like(h) if dlogps is None else dlogps.double()
    c = g.abs() + _ENTROPY_UNITS * h.abs()
    a, b = (torch.where(c == 0, 0.0, x / c) for x in (g, h))
    # A label of probability 0 has no part in the entropy.
    in_entropy = torch.where(logp.isneginf(), 0.0, logp.exp() * (logp + entropy))
    # The kernels' log p is z - lse[0]: what lse's rounding left goes here.
    of_others = torch.stack([a + b * (entropy - lse[1]), b]).to(dtype)
    return c.to(dtype), RowSlopes((a * logp.expm1() + b * in_entropy).to(dtype), of_others)


def add_weighted_logs(tile: Tensor, shift: Tensor, weight: Tensor) -> None:
    """In place, tile * (shift + weight * log tile), 0 where the tile is 0: (R, width), (R,), (R,).

    A few rows at a time, for they are copied.
    """
    for rows, shifts, weights in zip(*(x.split(_ROWS_AT_ONCE) for x in (tile, shift, weight)), strict=True):
        logs = rows.clamp_min(torch.finfo(rows.dtype).tiny).log_()
        rows.mul_(logs.mul_(weights.unsqueeze(1)).add_(shifts.unsqueeze(1)))


def exponentials_with_weighted_logs(tile: Tensor, shift: Tensor, weight: Tensor) -> None:
    """In place, exp(tile) * (shift + weight * tile): the same from logarithms."""
    for rows, shifts, weights in zip(*(x.split(_ROWS_AT_ONCE) for x in (tile, shift, weight)), strict=True):
        logs = rows.clamp_min(_LOWEST_LOG)
        rows.exp_().mul_(logs.mul_(weights.unsqueeze(1)).add_(shifts.unsqueeze(1)))
