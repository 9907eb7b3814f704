"""Exponentials of a slice of logits with their row sums, the label's column left out: the twins' one pass over a tile.

    tile[r, v] = exp(z[r, v] - base[r])          0 at the label
    sum_{v in slice} tile[r, v] = sums[r]

The forward pass reads off `base + log(sums)` and drops the tile. A schedule that keeps it has the softmax in hand, up
to the factor exp(base - lse) of each row, once the whole row's log-sum-exp is known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.head import Head, logits_tile_torch

# Start of every running maximum: finite, because (-inf) - (-inf) is NaN where a slice has no finite logit.
LOWEST = -1e38
# Of so many columns the largest logit serves as reference, whose probability is above this in all but absurd rows.
_REFERENCE_COLUMNS, _LEAST_PROBABILITY = 64, 1e-30


class ExpTile(NamedTuple):
    """One slice of the vocabulary, [start, stop)."""

    start: int
    stop: int
    tile: Tensor  # (R, stop - start), times the cap's derivative where there is a cap
    base: Tensor  # (R,) float64
    sums: Tensor  # (R,) float64
    held: Tensor  # (K,) rows whose label is in the slice
    label_columns: Tensor  # (K,) its column there
    label_logits: Tensor  # (K,)
    label_slope: Tensor | float  # (K,) the cap's derivative at the label


def exp_tile_torch(hidden_states: Tensor, head: Head, labels: Tensor, start: int, stop: int, out: Tensor) -> ExpTile:
    """(R, H) rows, (R,) labels -> the slice's exponentials in out (R, stop - start)."""
    slope = logits_tile_torch(hidden_states, head, start, stop, out)
    columns = labels - start
    held = ((columns >= 0) & (columns < stop - start)).nonzero().squeeze(1)
    columns = columns[held]
    label_logits = out[held, columns]
    label_slope = 1.0 if slope is None else slope[held, columns]
    out[held, columns] = float("-inf")
    if head.bias is not None or stop - start < 2:
        base, sums = _exponentials(out)
    else:
        base, sums = _softmax(out)
        # The reference logit is 70 nats below the row's largest: those rows once more, the long way.
        absurd = (~base.isfinite()).nonzero().squeeze(1)
        if absurd.numel():
            rows = out.new_empty((absurd.numel(), stop - start))
            logits_tile_torch(hidden_states[absurd], head, start, stop, rows)
            is_label = torch.arange(start, stop, device=out.device) == labels[absurd].unsqueeze(1)
            base[absurd], sums[absurd] = _exponentials(rows.masked_fill_(is_label, float("-inf")))
            out[absurd] = rows
    if slope is not None:
        out.mul_(slope)
    return ExpTile(start, stop, out, base, sums, held, columns, label_logits, label_slope)


def _exponentials(tile: Tensor) -> tuple[Tensor, Tensor]:
    """In place, exp(z - largest z); any column may be -inf, by a bias that masks entries."""
    base = tile.amax(1).clamp_min_(LOWEST)
    return base.double(), tile.sub_(base.unsqueeze(1)).exp_().sum(1).double()


def _softmax(tile: Tensor) -> tuple[Tensor, Tensor]:
    """In place, the slice's own softmax, so that base is its log-sum-exp; infinite where it could not be found.

    softmax is the one fused pass over a tile that torch has on a CPU, three times faster than max, subtract, exp and
    sum. A logit and its probability give the log-sum-exp back, in float64 without another rounding.
    """
    reference, index = tile[:, :_REFERENCE_COLUMNS].max(1, keepdim=True)
    torch.softmax(tile, 1, out=tile)
    probability = tile.gather(1, index)
    base = reference.double() - probability.double().log()
    base = base.masked_fill(~(probability > _LEAST_PROBABILITY), float("inf")).squeeze(1)
    return base, torch.ones_like(base)


def place_labels_torch(tile: ExpTile, per_token_logps: Tensor, lse: Tensor) -> Tensor:
    """Puts the label's column into the tile; (R,) packed logps and lse -> the rows' factors exp(base - lse), (R,).

    factor * tile is then softmax minus onehot, expm1(logp) at the label. A slice that holds less than exp(-60) of a
    row's mass is dropped from it, lest expm1(logp) / factor overflow.
    """
    difference = tile.base - lse.double()
    negligible = difference < -60
    tile.tile[negligible] = 0
    factor = difference.masked_fill(negligible, 0.0).exp().to(tile.tile.dtype)
    at_label = per_token_logps[tile.held].expm1() * tile.label_slope / factor[tile.held]
    tile.tile[tile.held, tile.label_columns] = at_label
    return factor
