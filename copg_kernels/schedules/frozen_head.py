"""Log-probabilities and their derivative by the hidden states, where the head is frozen: two units of GEMM work.

    u[t] = dlogp[t] / dhidden_states[t] = -slope * sum_v (softmax - onehot)[t, v] weight[v]

or the derivative of the entropy instead, for as much: see row_slopes. A token's upstream gradient is then a factor of
its row, so the backward pass has no GEMM left, whatever it is. Tokens go through in chunks whose logits fit the
workspace; a group may lie in many. Where ranks hold shards of the head, the statistics of a chunk are exchanged before
its label's entries are placed, and u is summed over the ranks in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_slopes import slopes_of_both, slopes_of_logps
from copg_kernels.kernels.row_statistics import NOTHING, Partials, Wanted, joined_partials
from copg_kernels.kernels.token_statistics import TokenStatistics, no_statistics
from copg_kernels.schedules.kept_tiles import write_hidden_product
from copg_kernels.schedules.shards import Shards
from copg_kernels.schedules.tile_ops import accumulation_dtype, counted_rows, kept_dtype, operand_dtype, tile_ops
from copg_kernels.schedules.workspace import balanced, kept_bytes_per_token, kept_elements


class _Chunk(NamedTuple):
    """Consecutive tokens."""

    tokens: slice
    partials: Partials
    rows: PackedRows
    per_token_logps: Tensor
    lse: Tensor
    statistics: TokenStatistics


def token_logps_and_slopes(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    *,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    wanted: Wanted = NOTHING,
    of_entropy: bool = False,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor, Tensor, TokenStatistics]:
    """(T, H), (T,) -> per_token_logps (T,), lse (2, T), u (T, H) in `kept_dtype`, what is wanted; 0 where ignored.

    u is the log-probability's derivative, or with of_entropy the entropy's.
    """
    dtype, num_tokens = accumulation_dtype(hidden_states.dtype), labels.numel()
    per_token_logps = hidden_states.new_empty((num_tokens,), dtype=dtype)
    lse = hidden_states.new_empty((2, num_tokens), dtype=dtype)
    u = _empty_slopes(hidden_states, shards)
    statistics = [no_statistics(per_token_logps)]
    wanted = wanted._replace(entropy=wanted.entropy or of_entropy)
    options: dict[str, Any] = dict(wanted=wanted, of_entropy=of_entropy, shards=shards)
    for chunk in _chunks(hidden_states, head, labels, u, ignore_index, workspace_bytes, backend, **options):
        per_token_logps[chunk.tokens], lse[:, chunk.tokens] = chunk.per_token_logps, chunk.lse
        statistics.append(chunk.statistics)
    u = _complete(u, hidden_states, shards)
    return per_token_logps, lse, u, TokenStatistics(*map(torch.cat, zip(*statistics, strict=True)))


def copg(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    completions: Completions,
    ignore_index: int,
    *,
    workspace_bytes: int,
    backend: str,
    entropy: bool = False,
    shards: Shards | None = None,
) -> tuple[Contrast, Tensor]:
    """Contrast of groups that may lie in many chunks, and u (T, H), which the coefficients then scale."""
    u = _empty_slopes(hidden_states, shards)
    partials, rows = [], []
    options: dict[str, Any] = dict(wanted=Wanted(entropy), shards=shards)
    for chunk in _chunks(hidden_states, head, labels, u, ignore_index, workspace_bytes, backend, **options):
        partials.append(chunk.partials)
        rows.append(chunk.rows)
    joined = joined_partials(partials)
    contrast = tile_ops(backend).contrast_fwd(joined, joined_rows(rows), completions)
    return contrast, _complete(u, hidden_states, shards)


def _empty_slopes(hidden_states: Tensor, shards: Shards | None) -> Tensor:
    """Where u goes; what is still to be summed over ranks in the accumulation dtype."""
    dtype = kept_dtype(hidden_states.dtype) if shards is None else accumulation_dtype(hidden_states.dtype)
    return torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)


def _complete(u: Tensor, hidden_states: Tensor, shards: Shards | None) -> Tensor:
    return u if shards is None else shards.summed(u).to(kept_dtype(hidden_states.dtype))


def _chunks(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    u: Tensor,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    *,
    wanted: Wanted,
    shards: Shards | None,
    of_entropy: bool = False,
) -> Iterator[_Chunk]:
    """Write u (T, H), and hand out what else is known of its tokens."""
    ops, dtype, V = tile_ops(backend), hidden_states.dtype, head.weight.shape[0]
    most_rows = V if shards is None else shards.most_rows
    bytes_per_token = kept_bytes_per_token(most_rows, dtype, hidden_states.device, backend)
    max_tokens = balanced(labels.numel(), max(1, workspace_bytes // bytes_per_token))
    workspace = hidden_states.new_empty((kept_elements(max_tokens, V, backend),), dtype=operand_dtype(dtype, backend))
    for start in range(0, labels.numel(), max_tokens):
        tokens = slice(start, start + max_tokens)
        packed, rows = counted_rows(hidden_states[tokens], labels[tokens], ignore_index, backend)
        partials, tiles = ops.exp_tiles(packed, head, rows, workspace, wanted=wanted, keeps_slope=not of_entropy)
        if shards is not None:
            partials = shards.merged(partials, rows)
        per_token_logps, lse = ops.merge_splits_fwd(partials, rows)
        statistics = no_statistics(per_token_logps)
        if any(wanted):
            statistics = ops.token_statistics_fwd(partials, rows, per_token_logps, V)
        scale = (labels[tokens] != ignore_index).to(lse.dtype) * -head.slope
        if of_entropy:
            ones = torch.ones_like(per_token_logps)
            units, slopes = slopes_of_both(None, ones, per_token_logps, statistics.entropy, lse)
            scale *= units
        else:
            slopes = slopes_of_logps(per_token_logps)
        slices = ops.place_labels(tiles, packed, head, rows, slopes, lse)
        write_hidden_product(slices, head, rows, scale, u[tokens], backend)
        yield _Chunk(tokens, partials, rows, per_token_logps, lse, statistics)


def joined_rows(chunks: list[PackedRows]) -> PackedRows:
    """The rows of consecutive tokens, one chunk's behind the other's, as the contrast reads them."""
    num_tokens = sum(rows.position.numel() for rows in chunks)
    row_index, position = [], []
    first_row = first_token = 0
    for rows in chunks:
        row_index.append(rows.row_index + first_token)
        position.append(torch.where(rows.position < rows.num_rows, rows.position + first_row, num_tokens))
        first_row += rows.row_index.numel()
        first_token += rows.position.numel()
    labels = torch.cat([rows.labels for rows in chunks])
    num_rows = torch.full_like(chunks[0].num_rows, num_tokens)
    return PackedRows(torch.cat(row_index), torch.cat(position), num_rows, labels)
