"""Row statistics of a tile of logits: its largest, and the sum of exponentials relative to that, without the label.

    tile_max[r]      = max_v z[r, v]                 over the tile's columns
    tile_sum[r]      = sum_{v != label} exp(z[r, v] - tile_max[r])

and where they are wanted, see `Wanted`,

    tile_weighted[r] = sum_{v != label} exp(z[r, v] - tile_max[r]) (z[r, v] - tile_max[r])      for entropy
    tile_squares[r]  = sum_{v != label} exp(z[r, v] - tile_max[r]) ** 2                         for log_sum_sq_probs
    tile_logits[r]   = sum_v z[r, v]                                                            for mean_logits
    tile_before[r]   = max_{v < label} z[r, v]                                                  for is_top1

The streaming forward pass and the pass that keeps its tile call the same functions in the same order, so that a
log-probability has the same bits whichever schedule computed it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.language import LOG2_E, jit, tl

# Where every maximum starts: finite, because (-inf) - (-inf) is NaN where a tile has no finite logit.
LOWEST = tl.constexpr(-1e38)


class Wanted(NamedTuple):
    """Which numbers of each row are computed besides its log-probability."""

    entropy: bool = False
    log_sum_sq_probs: bool = False
    mean_logits: bool = False
    is_top1: bool = False


NOTHING = Wanted()


def computed(wanted: Wanted) -> Wanted:
    """What the head's kernels compute for it: all four where one of the last three is asked for.

    That makes one form more to keep clear of spills and not fourteen, of which each has its own register allocation.
    """
    return Wanted(True, True, True, True) if any(wanted[1:]) else wanted


class Partials(NamedTuple):
    """Row statistics per split of the vocabulary, rows in packed order; float32, of the twin float64 but for the label.

    A split without an entry before the label has LOWEST or -inf as `before`.
    """

    max: Tensor  # (S, R); of the twin anything that is near, `top` is exact
    sum: Tensor  # (S, R)
    label_logits: Tensor  # (R,)
    weighted: Tensor | None = None  # (S, R), for entropy
    squares: Tensor | None = None  # (S, R), for log_sum_sq_probs
    logits: Tensor | None = None  # (S, R), for mean_logits
    before: Tensor | None = None  # (S, R), for is_top1
    top: Tensor | None = None  # (S, R), for is_top1: the largest logit, that of the label included

    def only(self, wanted: Wanted) -> Partials:
        """Without what is not asked for."""
        return self._replace(
            weighted=self.weighted if wanted.entropy else None,
            squares=self.squares if wanted.log_sum_sq_probs else None,
            logits=self.logits if wanted.mean_logits else None,
            before=self.before if wanted.is_top1 else None,
            top=self.top if wanted.is_top1 else None,
        )


def empty_partials(num_splits: int, num_rows: int, device: torch.device, wanted: Wanted) -> Partials:
    """For the kernels to fill, in float32: their maximum is the largest logit itself."""
    largest = torch.empty((num_splits, num_rows), dtype=torch.float32, device=device)
    total, label_logits = torch.empty_like(largest), largest.new_empty((num_rows,))
    weighted, squares, logits, before = (torch.empty_like(largest) if needed else None for needed in wanted)
    top = largest if wanted.is_top1 else None
    return Partials(largest, total, label_logits, weighted, squares, logits, before, top)


def partials_of_no_entries(label_logits: Tensor, dtype: torch.dtype, wanted: Wanted) -> Partials:
    """Of a vocabulary's shard without entries; label_logits (R,) may hold anything, as no label is there."""
    largest = label_logits.new_full((1, label_logits.numel()), -1e38, dtype=dtype)  # LOWEST
    nothing = torch.zeros_like(largest)
    return Partials(largest, nothing, label_logits, nothing if wanted.entropy else None)


def joined_partials(parts: list[Partials]) -> Partials:
    """Of consecutive rows."""
    maxima, sums, label_logits, *others = zip(*parts, strict=True)
    return Partials(
        torch.cat(maxima, -1),
        torch.cat(sums, -1),
        torch.cat(label_logits),
        *(None if field[0] is None else torch.cat(field, -1) for field in others),
    )


@jit
def tile_maximum(parts):
    """z of a tile, in parts -> [BLOCK_N], LOWEST where no logit is finite."""
    z0, z1, z2, z3 = parts
    return tl.maximum(tl.max(tl.maximum(tl.maximum(tl.maximum(z0, z1), z2), z3), 1), LOWEST)


@jit
def holds_label(label, start_v, BLOCK_V: tl.constexpr):
    """Whether a tile that starts at vocabulary entry start_v holds the label of one of its rows.

    Few tiles do, and the others need not look at each column.
    """
    return tl.max(((label >= start_v) & (label < start_v + BLOCK_V)).to(tl.int32), 0) != 0


@jit
def take_out_label(z, has_label, label, start_v, lowest):
    """[BLOCK_N, BLOCK_C] from vocabulary entry start_v on -> z with `lowest` at the label; z at the label, else 0."""
    at_label = tl.zeros((z.shape[0],), dtype=tl.float32)
    if has_label:
        is_label = tl.arange(0, z.shape[1])[None, :] == (label - start_v)[:, None]
        at_label = tl.sum(tl.where(is_label, z, 0.0), 1)
        z = tl.where(is_label, lowest, z)
    return z, at_label


@jit
def exponentials(z, tile_max):
    """[BLOCK_N, BLOCK_C] -> exp(z - tile_max), and its logarithm to the base 2."""
    # Subtracted before it is scaled: a fused z * LOG2_E - tile_max * LOG2_E would save an instruction, and the rounding
    # of the second product would shift all sums, by up to 4e-5 at logits of 1000.
    distance = (z - tile_max[:, None]) * LOG2_E
    return tl.exp2(distance), distance


@jit
def merge_statistics(running_max, running_sum, tile_max, tile_sum):
    """(maximum, sum of exponentials) of two disjoint sets of columns -> that of both."""
    new_max = tl.maximum(running_max, tile_max)
    return new_max, running_sum * tl.exp(running_max - new_max) + tile_sum * tl.exp(tile_max - new_max)


@jit
def weighted_terms(exps, distance):
    """[BLOCK_N, BLOCK_C] as `exponentials` gives them -> exp(z - tile_max) (z - tile_max) / ln 2, 0 for z = -inf."""
    # 2 ** -150 is 0 in float32.
    return exps * tl.maximum(distance, -150.0)


@jit
def merge_weighted(running_max, running_sum, running_weighted, tile_max, tile_sum, tile_weighted):
    """Weighted sums of two disjoint sets of columns -> that of both; for statistics that are not merged yet."""
    new_max = tl.maximum(running_max, tile_max)
    running = (running_weighted + running_sum * (running_max - new_max)) * tl.exp(running_max - new_max)
    return running + (tile_weighted + tile_sum * (tile_max - new_max)) * tl.exp(tile_max - new_max)


@jit
def merge_squares(running_max, running_squares, tile_max, tile_squares):
    """Sums of squared exponentials of two disjoint sets of columns -> that of both; before their maxima are merged."""
    new_max = tl.maximum(running_max, tile_max)
    running_scale, tile_scale = tl.exp(running_max - new_max), tl.exp(tile_max - new_max)
    return running_squares * running_scale * running_scale + tile_squares * tile_scale * tile_scale


@jit
def sum_of_logits(parts, start_v, V, EVEN_V: tl.constexpr, BLOCK_V: tl.constexpr):
    """z of a tile that starts at vocabulary entry start_v, in parts -> [BLOCK_N], the sum of those before V."""
    STEP: tl.constexpr = BLOCK_V // 4
    total = tl.zeros((parts[0].shape[0],), dtype=tl.float32)
    for part in tl.static_range(len(parts)):
        z = parts[part]
        if not EVEN_V:
            # Not in the words in which head_logits masks them: else the compiler keeps z as it was before that, too.
            z = tl.where((start_v + part * STEP + tl.arange(0, STEP) < V)[None, :], z, 0.0)
        total += tl.sum(z, 1)
    return total


@jit
def largest_before(parts, tile_max, has_label, label, start_v, BLOCK_V: tl.constexpr):
    """z of a tile, in parts -> [BLOCK_N], the largest before the row's label; LOWEST where there is none."""
    # A tile is before the label, after it, or one of the few that `has_label` is about.
    STEP: tl.constexpr = BLOCK_V // 4
    largest = tl.where(label >= start_v + BLOCK_V, tile_max, LOWEST)
    if has_label:
        for part in tl.static_range(len(parts)):
            is_before = tl.arange(0, STEP)[None, :] < (label - start_v - part * STEP)[:, None]
            largest = tl.maximum(largest, tl.max(tl.where(is_before, parts[part], LOWEST), 1))
    return largest


@jit
def store_wanted(out_ptr, offset, value, mask):
    """[BLOCK_N] to where it is wanted: out_ptr is None where it is not."""
    if out_ptr is not None:
        tl.store(out_ptr + offset, value, mask=mask)


@jit
def read_back(pointers, mask):
    """[BLOCK_N] numbers that this program has written there."""
    tl.debug_barrier()  # The thread that has written a number need not be the one that reads it.
    return tl.load(pointers, mask=mask, other=0.0)
