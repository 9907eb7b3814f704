"""What ranks that hold shards of one head exchange: statistics of each token's logits, and sums of dX.

    each rank  -> all    (3, R) numbers of its own entries' logits; (4, R) where the entropy is wanted
    all ranks            the same statistics in the same order, like splits of one vocabulary: the same bits follow
    dX                   (T, H) in the accumulation dtype, each of its own entries, summed over the ranks

A label that another rank holds is a negative number here: no column of the tile is its own, so the tile operations run
on a shard as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials

IGNORED, HELD_ELSEWHERE = -100, -1


class Shards(NamedTuple):
    """The ranks that hold one head's rows."""

    group: dist.ProcessGroup
    most_rows: int
    """Of the largest shard: chunks are planned by it, so that all ranks have the same ones."""

    def merged(self, partials: Partials, rows: PackedRows) -> Partials:
        """Statistics of this rank's entries -> of all ranks', one split for each, in rank order."""
        return _gather(_one_split(partials, rows), self.group)

    def summed(self, dhidden: Tensor) -> Tensor:
        """In place, over all ranks."""
        if dhidden.numel():
            dist.all_reduce(dhidden, group=self.group)
        return dhidden


def shard_labels(labels: Tensor, ignore_index: int, first_row: int, num_rows: int) -> Tensor:
    """Labels of the whole vocabulary -> row of the shard, HELD_ELSEWHERE or IGNORED."""
    local = labels - first_row
    local = local.where((local >= 0) & (local < num_rows), HELD_ELSEWHERE)
    return local.where(labels != ignore_index, IGNORED)


def _one_split(partials: Partials, rows: PackedRows) -> Partials:
    """The splits of one shard -> one split; the label's logit is -inf where another rank holds it."""
    top = partials.max.amax(0)
    distance = partials.max - top
    scale = distance.exp()
    weighted = partials.weighted
    if weighted is not None:
        weighted = ((weighted + partials.sum * distance) * scale).sum(0, keepdim=True)
    held = partials.label_logits.where(rows.labels >= 0, float("-inf"))
    return Partials(top.unsqueeze(0), (partials.sum * scale).sum(0, keepdim=True), held, weighted)


def _gather(partials: Partials, group: dist.ProcessGroup) -> Partials:
    """One split of every rank, in rank order."""
    numbers = [partials.max, partials.sum, partials.label_logits.to(partials.max.dtype).unsqueeze(0)]
    if partials.weighted is not None:
        numbers.append(partials.weighted)
    mine = torch.cat(numbers)
    gathered = mine.new_empty((dist.get_world_size(group), *mine.shape))
    if mine.numel():
        dist.all_gather(list(gathered.unbind()), mine, group=group)
    tops, totals, label_logits, *weighted = (number.contiguous() for number in gathered.unbind(1))
    held = label_logits.amax(0).to(partials.label_logits.dtype)
    return Partials(tops, totals, held, weighted[0] if weighted else None)
