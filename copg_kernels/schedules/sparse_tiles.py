"""The compact softmax of the kernels: tiles of a chunk of tokens, compacted before the next chunk takes their place.

For an upstream gradient that is not there yet: the compact tiles wait for it. A chunk that does not fit into its slots
is computed again by the exact kernels, on the device's own decision: they are launched always, and return. Whole groups
know their coefficients while the tile stands, and need neither (`closed_groups`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.kernels.count_significant import BLOCK
from copg_kernels.kernels.dense_product import dense_product
from copg_kernels.kernels.exp_tile import exp_tiles
from copg_kernels.kernels.gather_product import gather_product
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.merge_splits import merge_splits_fwd
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import place_labels
from copg_kernels.kernels.row_slopes import slopes_of_logps
from copg_kernels.kernels.row_statistics import Partials, joined_partials
from copg_kernels.kernels.scale_rows import scale_packed, scale_rows
from copg_kernels.kernels.softmax_minus_label import softmax_minus_label
from copg_kernels.schedules import compact_tiles
from copg_kernels.schedules.compact_tiles import CompactTile, compacted, mean_row
from copg_kernels.schedules.frozen_head import joined_rows
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.tile_ops import counted_rows, pack_hidden
from copg_kernels.schedules.workspace import kept_bytes_per_token, kept_elements, slice_width, tile_in


class CompactChunk(NamedTuple):
    """Consecutive tokens."""

    tokens: slice
    rows: PackedRows
    compact: CompactTile
    mean_row: Tensor  # (H,) of the head's weight, over what the rows' blocks left out


def compact_rows(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    needs: Needs,
    *,
    ignore_index: int,
    sparse_eps: float,
    workspace_bytes: int,
    give_up: bool,
) -> tuple[Partials, PackedRows, list[CompactChunk]]:
    """(T, H), (T,) -> row statistics, the rows they are of, their softmax. Gives up nothing: the host does not know."""
    T, V = labels.numel(), head.weight.shape[0]
    bytes_per_token = kept_bytes_per_token(V, hidden_states.dtype, hidden_states.device, "triton")
    most_tokens = max(1, min(T, max(BLOCK, workspace_bytes // bytes_per_token // BLOCK * BLOCK)))
    workspace = hidden_states.new_empty((kept_elements(most_tokens, V, "triton"),))
    partials, chunks = [], []
    for start in range(0, max(T, 1), most_tokens):
        tokens = slice(start, min(T, start + most_tokens))
        hidden, rows = counted_rows(hidden_states[tokens], labels[tokens], ignore_index, "triton")
        statistics_, tiles = exp_tiles(hidden, head, rows, workspace)
        logps, lse = merge_splits_fwd(statistics_, rows)
        (part,) = place_labels(tiles, hidden, head, rows, slopes_of_logps(logps), lse)
        compact = compacted(part, rows, sparse_eps, needs, in_tile=False)
        partials.append(statistics_)
        chunks.append(CompactChunk(tokens, rows, compact, mean_row(compact.by_rows.dropped_list, head.weight)))
    joined = joined_partials(partials)
    return joined, joined_rows([chunk.rows for chunk in chunks]), chunks


def token_logps_bwd(
    dlogps: Tensor,
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    per_token_logps: Tensor,
    lse: Tensor,
    chunks: list[CompactChunk],
    needs: Needs,
    *,
    ignore_index: int,
    workspace_bytes: int,
) -> Gradients:
    """(T,) upstream gradient -> gradients, empty where not needed; the head's summed in float32 over several chunks."""
    (V, H), dtype = head.weight.shape, hidden_states.dtype
    summed = dtype if len(chunks) == 1 else torch.float32
    gradients = Gradients(
        hidden_states.new_empty(hidden_states.shape if needs.hidden_states else (0,)),
        hidden_states.new_empty((V, H) if needs.weight else (0,), dtype=summed),
        hidden_states.new_empty((V, 1) if needs.bias else (0,), dtype=torch.float32),
    )
    precision = head_blocks(head.weight).precision
    for index, chunk in enumerate(chunks):
        counted = (labels[chunk.tokens] != ignore_index).float()
        # Whatever reaches an ignored token, NaN included, goes no further.
        scale = dlogps[chunk.tokens].float().where(counted != 0, 0.0) * -head.slope
        packed_scale = scale.index_select(0, chunk.rows.row_index)
        statistics_ = (per_token_logps[chunk.tokens], lse[:, chunk.tokens].contiguous())
        packed = pack_hidden(hidden_states[chunk.tokens], chunk.rows)
        part = _Products(packed, head, chunk, packed_scale, statistics_, precision, workspace_bytes)
        if needs.hidden_states:
            dhidden = scale_rows(_hidden_product(part), chunk.rows.position, counted, dtype)
            gradients.hidden_states[chunk.tokens] = dhidden
        if needs.weight:
            source = scale_packed(packed, packed_scale, dtype)
            _add_head_product(part, source, gradients.weight, add=index > 0)
        if needs.bias:
            _add_head_product(part, packed_scale.to(dtype).unsqueeze(1), gradients.bias, add=index > 0)
    return gradients._replace(bias=gradients.bias.view(-1))


class _Products(NamedTuple):
    """What the products of a chunk are made of."""

    hidden_states: Tensor  # (R, H), packed, like
    head: Head
    chunk: CompactChunk
    scale: Tensor  # (R,)
    statistics: tuple[Tensor, Tensor]  # per_token_logps, lse of the chunk's tokens
    precision: str
    workspace_bytes: int


def _hidden_product(part: _Products) -> Tensor:
    """scale * (softmax - onehot) weight, (R, H) float32."""
    chunk, weight = part.chunk, part.head.weight
    pool = chunk.compact.by_rows
    out = part.scale.new_empty((part.scale.numel(), weight.shape[1]))
    gather_product(pool, weight, chunk.mean_row, part.scale, out, part.precision, add=False)
    for start, stop, tile, factor in _exact_tiles(part, pool.overflow):
        operands = (tile, weight[start:stop], part.scale * factor, out)
        dense_product(pool.overflow, *operands, part.precision)
    return out


def _add_head_product(part: _Products, source: Tensor, out: Tensor, *, add: bool) -> None:
    """out (V, width) = or += (softmax - onehot)^T source, (R, width)."""
    pool = part.chunk.compact.by_columns
    assert pool is not None
    gather_product(pool, source, mean_row(pool.dropped_list, source), None, out, part.precision, add=add)
    for start, stop, tile, factor in _exact_tiles(part, pool.overflow):
        exact = (source.float() * factor.unsqueeze(1)).to(source.dtype)
        dense_product(pool.overflow, tile.T, exact, None, out[start:stop], part.precision)


def _exact_tiles(part: _Products, overflow: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Slices of the vocabulary, computed again if `overflow` is set: start, stop, tile, factor of its rows."""
    hidden_states, head, rows = part.hidden_states, part.head, part.chunk.rows
    blocks = head_blocks(head.weight)
    R, (V, H) = rows.row_index.numel(), head.weight.shape
    per_token_logps, lse = part.statistics
    slopes = slopes_of_logps(per_token_logps)
    only = overflow.expand(-(-R // blocks.BLOCK_N)).contiguous()
    factor = (-lse[1]).exp().index_select(0, rows.row_index)
    device, dtype = hidden_states.device, hidden_states.dtype
    width = slice_width(part.workspace_bytes, R, (V, H), dtype, device, "triton")
    workspace = hidden_states.new_empty((kept_elements(R, width, "triton"),))
    for start in range(0, V, width):
        tile = tile_in(workspace, R, min(start + width, V) - start, "triton")
        softmax_minus_label(hidden_states, head, rows, slopes, lse, start, tile, only=only)
        yield start, start + tile.shape[1], tile, factor


def statistics(chunks: list[CompactChunk], vocab_size: int) -> Tensor:
    """Density, mean dropped mass, share of rows that overflowed: (3,), on the device."""
    return compact_tiles.statistics([chunk.compact.shares for chunk in chunks], vocab_size)
