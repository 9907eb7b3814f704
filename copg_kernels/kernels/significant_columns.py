"""The softmax in compact form: for every block of rows, the columns in which any of them is significant.

    kept:     the columns v with p[r, v] >= eps for some row r of the block; the label's own entry apart
    dropped:  all others, of mass m[r]; what they have in common is one distribution `tail` over the vocabulary

A row's dropped entries are below eps and sum to m[r], so that ||p - kept||_2 <= sqrt(eps * m[r]). With m[r] * tail put
back in their place the row sums to 1 again, which is what matters to a gradient: the error has no component along the
mean of the head's rows, and rare tokens still receive theirs.

The logits go through once, a slice of the vocabulary at a time, while the log-sum-exp is still growing: what is
significant against the sum so far, label included, contains what is significant in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import SPLIT_TORCH
from copg_kernels.kernels.exp_tile import ExpTile, exp_tile_torch
from copg_kernels.kernels.head import Head, finish_torch
from copg_kernels.kernels.row_statistics import Partials, joined_partials

# Columns rather than single entries, which need an eps four times lower for the same error and cost more then, and
# blocks of any size from 32 to 256 (bench/granularity.py). 128 is what the kernels' tiles are made of.
BLOCK_ROWS = 128
# A block that would keep more of the vocabulary is computed exactly: compact products would cost about as much.
MOST_KEPT = 0.3
# An eighth of the vocabulary in, hardly a column of a block was insignificant: it will not become compact.
_EARLY, _HOPELESS = 0.125, 0.98
# One in so many blocks, the first ones, shows whether it is worth going on: a block that overflows late has spent the
# logits of its rows for nothing.
_PROBE = 8
# Every so many rows of a block say how its dropped mass spreads over the vocabulary.
_SAMPLE = 8
# Nats by which the label's logit may differ between a dot product of vectors and the GEMM.
_MARGIN = 1e-3


class Compact(NamedTuple):
    """Of blocks of BLOCK_ROWS packed rows, one after the other; with a softcap all but `tail` times its derivative."""

    columns: Tensor  # (C,) int64, ascending within a block
    offsets: Tensor  # (blocks + 1,) int64: where each block's columns start; it has none where it overflowed
    values: Tensor  # the blocks' entries, (rows, columns) row by row, one block behind the other; 0 at the label
    label_values: Tensor  # (R,) p - 1 at the label
    dropped: Tensor  # (R,) mass of the entries that are not there; 0 where the block overflowed
    tail: Tensor  # (V,) how dropped mass spreads: sum 1
    overflow: Tensor  # (R,) bool

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, columns (n,), values (rows, n) of the blocks that keep any."""
        num_rows, first = self.dropped.numel(), 0
        for block, (start, stop) in enumerate(pairwise(self.offsets.tolist())):
            rows = slice(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows))
            size = (rows.stop - rows.start) * (stop - start)
            if size:
                yield rows, self.columns[start:stop], self.values[first : first + size].view(-1, stop - start)
            first += size


class _Slice(NamedTuple):
    """What stays of one slice of the vocabulary: statistics, and the significant columns of each block."""

    tile: ExpTile  # its statistics: the exponentials are overwritten by the next slice
    mass: Tensor  # (R,) sum of the exponentials, relative to the slice's base
    log_so_far: Tensor  # (R,) log-sum-exp of the label and the slices up to this one
    spread: Tensor  # (stop - start,) dropped mass of the sampled rows, relative to log_so_far
    columns: list[Tensor]  # by block, (n,)
    values: list[Tensor]  # by block, (rows, n), relative to the slice's base


def significant_columns_torch(
    hidden_states: Tensor, head: Head, labels: Tensor, eps: float, workspace_bytes: int, *, give_up: bool = False
) -> tuple[Partials, Compact] | None:
    """Packed rows (R, H), head (V, H), (R,) labels -> row statistics and the compact softmax.

    With give_up, None where most of the first rows overflow: exact gradients of all rows will cost less.
    """
    R, V = hidden_states.shape[0], head.weight.shape[0]
    bytes_per_block = BLOCK_ROWS * min(SPLIT_TORCH, V) * hidden_states.element_size()
    rows_at_once = max(1, workspace_bytes // bytes_per_block) * BLOCK_ROWS
    workspace = hidden_states.new_empty((min(R, rows_at_once) * min(SPLIT_TORCH, V),))
    probe = max(1, R // (_PROBE * BLOCK_ROWS)) * BLOCK_ROWS
    first = min(probe, rows_at_once) if give_up else rows_at_once
    partials, compacts = [], []
    for start, stop in pairwise([0, *range(first, R, rows_at_once), R]):
        rows = slice(start, stop)
        found = _slices(hidden_states[rows], head, labels[rows], eps, workspace, give_up and start == 0)
        if found is None:
            return None
        slices, overflowed = found
        partials.append(_partials(slices, hidden_states[rows]))
        compacts.append(_compact(slices, overflowed, partials[-1].label_logits))
    joined = joined_partials(partials)
    return joined, _joined(compacts)


def _slices(
    hidden_states: Tensor, head: Head, labels: Tensor, eps: float, workspace: Tensor, give_up: bool
) -> tuple[list[_Slice], list[bool]] | None:
    """All slices of the vocabulary for some rows, and which blocks overflowed: they have no columns from there on."""
    R, V = hidden_states.shape[0], head.weight.shape[0]
    num_blocks = -(-R // BLOCK_ROWS)
    kept, overflowed = [0] * num_blocks, [False] * num_blocks
    log_so_far = _label_logits(hidden_states, head, labels).double() - _MARGIN
    slices = []
    for start, stop in pairwise([*range(0, V, SPLIT_TORCH), V]):
        out = workspace[: R * (stop - start)].view(R, stop - start)
        tile = exp_tile_torch(hidden_states, head, labels, start, stop, out)
        log_so_far = torch.logaddexp(log_so_far, tile.base + tile.sums.log())
        mass = tile.sums if head.softcap is None else out.sum(1).double()
        factor = (tile.base - log_so_far).exp().to(out.dtype)
        slices.append(
            _Slice(tile._replace(tile=out[:0]), mass, log_so_far, *_significant(out, factor, eps, overflowed))
        )
        kept = [count + columns.numel() for count, columns in zip(kept, slices[-1].columns, strict=True)]
        most = min(MOST_KEPT * V, _HOPELESS * stop if stop >= _EARLY * V else V)
        overflowed = [before or count > most for before, count in zip(overflowed, kept, strict=True)]
        if give_up and sum(overflowed) > len(overflowed) / 2:
            return None
    return slices, overflowed


def _significant(
    tile: Tensor, factor: Tensor, eps: float, overflowed: list[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(R, width) exponentials, (R,) what makes them probabilities so far -> spread, columns, values: see _Slice."""
    spread = tile.new_zeros(tile.shape[1])
    columns, values = [], []
    threshold = (eps / factor).unsqueeze(1)
    for block, skip in enumerate(overflowed):
        rows = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        if skip:
            columns.append(threshold.new_empty(0, dtype=torch.int64))
        else:
            hit = (tile[rows] >= threshold[rows]).any(0)
            columns.append(hit.nonzero().squeeze(1))
            sample = slice(rows.start, rows.stop, _SAMPLE)
            spread += (factor[sample] @ tile[sample]).masked_fill_(hit, 0.0)
        values.append(tile[rows].index_select(1, columns[-1]))
    return spread, columns, values


def _label_logits(hidden_states: Tensor, head: Head, labels: Tensor) -> Tensor:
    product = (hidden_states * head.weight[labels]).sum(1)
    if head.bias is not None:
        product += head.bias[labels]
    return finish_torch(product, head)


def _partials(slices: list[_Slice], hidden_states: Tensor) -> Partials:
    label_logits = hidden_states.new_empty(hidden_states.shape[:1])
    for part in slices:
        label_logits[part.tile.held] = part.tile.label_logits
    return Partials(
        torch.stack([part.tile.base for part in slices]),
        torch.stack([part.tile.sums for part in slices]),
        label_logits,
    )


def _compact(slices: list[_Slice], overflowed: list[bool], label_logits: Tensor) -> Compact:
    """Values and masses, now that the log-sum-exp of every row is known."""
    dtype = label_logits.dtype
    z_label = label_logits.double()
    lse_others = torch.stack([part.tile.base + part.tile.sums.log() for part in slices]).logsumexp(0)
    logps = -torch.nn.functional.softplus(lse_others - z_label, threshold=40)
    lse = torch.where(z_label.isneginf(), lse_others, z_label - logps)
    factors = [(part.tile.base - lse).exp() for part in slices]

    label_values = logps.expm1()
    for part in slices:
        label_values[part.tile.held] *= part.tile.label_slope
    dropped = torch.stack([part.mass * factor for part, factor in zip(slices, factors, strict=True)]).sum(0)
    columns, values, overflow = [], [], torch.zeros_like(z_label, dtype=torch.bool)
    for block, skip in enumerate(overflowed):
        rows = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        if skip:
            overflow[rows] = True
            columns.append(slices[0].columns[block][:0])
            continue
        columns.append(torch.cat([part.columns[block] + part.tile.start for part in slices]))
        pieces = [p.values[block] * f[rows, None].to(dtype) for p, f in zip(slices, factors, strict=True)]
        values.append(torch.cat(pieces, 1))
        dropped[rows] -= values[-1].sum(1)
    num_rows = max(1, lse.numel())
    spread = torch.cat([part.spread * ((part.log_so_far - lse).exp().sum() / num_rows).to(dtype) for part in slices])
    return Compact(
        torch.cat([torch.empty(0, dtype=torch.int64, device=lse.device), *columns]),
        torch.tensor([0, *(block.numel() for block in columns)], device=lse.device).cumsum(0),
        torch.cat([block.flatten() for block in values]) if values else label_logits[:0],
        label_values.masked_fill_(overflow, 0.0).to(dtype),
        dropped.masked_fill_(overflow, 0.0).clamp_min_(0.0).to(dtype),
        spread,
        overflow,
    )


def _joined(parts: list[Compact]) -> Compact:
    """Of consecutive rows, whole blocks of them but for the last; only here tails sum to 1."""
    offsets = [torch.zeros(1, dtype=torch.int64, device=parts[0].offsets.device)]
    for part in parts:
        offsets.append(part.offsets[1:] + offsets[-1][-1])
    tail = torch.stack([part.tail for part in parts]).sum(0)
    return Compact(
        torch.cat([part.columns for part in parts]),
        torch.cat(offsets),
        torch.cat([part.values for part in parts]),
        torch.cat([part.label_values for part in parts]),
        torch.cat([part.dropped for part in parts]),
        tail / tail.sum().clamp_min(torch.finfo(tail.dtype).tiny),
        torch.cat([part.overflow for part in parts]),
    )
