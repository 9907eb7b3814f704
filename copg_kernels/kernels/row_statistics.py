"""Row statistics of a tile of logits: its largest, and the sum of exponentials relative to that, without the label.

    tile_max[r]      = max_v z[r, v]                 over the tile's columns
    tile_sum[r]      = sum_{v != label} exp(z[r, v] - tile_max[r])
    tile_weighted[r] = sum_{v != label} exp(z[r, v] - tile_max[r]) (z[r, v] - tile_max[r])      where entropy is wanted

The streaming forward pass and the pass that keeps its tile call the same functions in the same order, so that a
log-probability has the same bits whichever schedule computed it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.language import jit, tl

# Where every maximum starts: finite, because (-inf) - (-inf) is NaN where a tile has no finite logit.
LOWEST = tl.constexpr(-1e38)


class Partials(NamedTuple):
    """Row statistics per split of the vocabulary, rows in packed order; float32 (max and sum of the twin: float64)."""

    max: Tensor  # (S, R)
    sum: Tensor  # (S, R)
    label_logits: Tensor  # (R,)
    weighted: Tensor | None = None  # (S, R), for the entropy


def joined_partials(parts: list[Partials]) -> Partials:
    """Of consecutive rows."""
    maxima, sums, label_logits, weighted = zip(*parts, strict=True)
    return Partials(
        torch.cat(maxima, -1),
        torch.cat(sums, -1),
        torch.cat(label_logits),
        None if weighted[0] is None else torch.cat(weighted, -1),
    )


@jit
def tile_maximum(parts):
    """z of a tile, in parts -> [BLOCK_N], LOWEST where no logit is finite.

    Part by part down to one number per row, here and in `exponentials`: wider running values spill.
    """
    largest = tl.full((parts[0].shape[0],), LOWEST, dtype=tl.float32)
    for part in tl.static_range(len(parts)):
        largest = tl.maximum(largest, tl.max(parts[part], 1))
    return largest


@jit
def exponentials(z, start_v, label, tile_max):
    """[BLOCK_N, BLOCK_C] -> exp(z - tile_max), 0 at the label; its row sums; and z at the label, 0 where it is not."""
    is_label = tl.arange(0, z.shape[1])[None, :] == (label - start_v)[:, None]
    exps = tl.where(is_label, 0.0, tl.exp(z - tile_max[:, None]))
    return exps, tl.sum(exps, 1), tl.sum(tl.where(is_label, z, 0.0), 1)


@jit
def merge_statistics(running_max, running_sum, tile_max, tile_sum):
    """(maximum, sum of exponentials) of two disjoint sets of columns -> that of both."""
    new_max = tl.maximum(running_max, tile_max)
    return new_max, running_sum * tl.exp(running_max - new_max) + tile_sum * tl.exp(tile_max - new_max)


@jit
def weighted_sum(z, exps, tile_max):
    """[BLOCK_N, BLOCK_C] and their exponentials -> row sums of exp(z - tile_max) (z - tile_max), 0 for z = -inf."""
    return tl.sum(tl.where(exps > 0.0, exps * (z - tile_max[:, None]), 0.0), 1)


@jit
def merge_weighted(running_max, running_sum, running_weighted, tile_max, tile_sum, tile_weighted):
    """Weighted sums of two disjoint sets of columns -> that of both; for statistics that are not merged yet."""
    new_max = tl.maximum(running_max, tile_max)
    running = (running_weighted + running_sum * (running_max - new_max)) * tl.exp(running_max - new_max)
    return running + (tile_weighted + tile_sum * (tile_max - new_max)) * tl.exp(tile_max - new_max)
