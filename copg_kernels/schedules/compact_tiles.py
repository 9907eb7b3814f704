"""A tile's compact form, both ways, and its products while the tile is still there: closed groups with `sparse_eps`.

Blocks of rows list columns for dX, blocks of columns list rows for dW: a GEMM with gathered rows wants its other
operand in blocks. What either leaves out comes back as one rank-1 term. A tile that does not fit into its slots is
multiplied as it stands, on the device's own decision: both kernels are launched always, and one of them returns. So no
logit is computed twice, and an overflow costs the search for entries that were too many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.kernels.compact_tile import BLOCK, Pool, compact_tile
from copg_kernels.kernels.dense_product import dense_product
from copg_kernels.kernels.gather_product import gather_product
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.matmul import mm_fp32
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice
from copg_kernels.kernels.scale_rows import scale_packed
from copg_kernels.kernels.significant_columns import MOST_KEPT
from copg_kernels.schedules.recompute import Needs


class CompactTile(NamedTuple):
    by_rows: Pool
    by_columns: Pool | None  # where the head is trained
    shares: Tensor  # (4,) see `statistics`


def compacted(part: SoftmaxSlice, rows: PackedRows, eps: float, needs: Needs, dtype: torch.dtype) -> CompactTile:
    """The whole vocabulary's tile -> its entries of at least eps, in the operands' dtype."""
    by_rows = _pool(part, rows, eps, dtype, rows_in_blocks=True)
    by_columns = _pool(part, rows, eps, dtype, rows_in_blocks=False) if needs.weight or needs.bias else None
    overflow = by_rows.overflow if by_columns is None else by_rows.overflow | by_columns.overflow
    numbers = (rows.num_rows, by_rows.offsets[-1:], by_rows.dropped.sum().view(1), overflow)
    return CompactTile(by_rows, by_columns, torch.cat([number.float() for number in numbers]))


def _pool(part: SoftmaxSlice, rows: PackedRows, eps: float, dtype: torch.dtype, *, rows_in_blocks: bool) -> Pool:
    R, V = part.tile.shape
    members, entries = (R, V) if rows_in_blocks else (V, R)
    capacity = max(1, int(-(-members // BLOCK) * entries * MOST_KEPT))
    return compact_tile(part, rows, eps, capacity, dtype, rows_in_blocks=rows_in_blocks)


def mean_row(mass: Tensor, source: Tensor) -> Tensor:
    """(N,) float32 weights, (N, H) -> (H,) float32: the mean of the rows, 0 where there is no mass."""
    share = (mass / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)).to(source.dtype)
    return mm_fp32(share.unsqueeze(0), source, mass.new_empty((1, source.shape[1]))).squeeze(0)


def hidden_product(compact: CompactTile, part: SoftmaxSlice, head: Head, scale: Tensor) -> Tensor:
    """(R,) -> scale * (softmax - onehot) weight, (R, H) float32."""
    pool, weight = compact.by_rows, head.weight
    precision = head_blocks(weight).precision
    out = scale.new_empty((scale.numel(), weight.shape[1]))
    gather_product(pool, weight, mean_row(pool.dropped_list, weight), scale, out, precision, add=False)
    dense_product(pool.overflow, part.tile, weight, scale * part.factor, out, precision)
    return out


def write_weight_product(
    compact: CompactTile,
    part: SoftmaxSlice,
    hidden_states: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    add: bool,
) -> None:
    """Packed rows (R, H), (R,) -> out (V, H) = or += (softmax - onehot)^T (scale * X)."""
    pool, dtype = compact.by_columns, part.tile.dtype
    assert pool is not None
    precision = head_blocks(hidden_states).precision
    source = scale_packed(hidden_states, scale, dtype)
    gather_product(pool, source, mean_row(pool.dropped_list, source), None, out, precision, add=add)
    of_tile = scale_packed(hidden_states, scale * part.factor, dtype)
    dense_product(pool.overflow, part.tile.T, of_tile, None, out, precision)


def statistics(shares: list[Tensor], vocab_size: int) -> Tensor:
    """Rows, slots, dropped mass, overflow of each tile -> density, mean dropped mass, share of rows that overflowed."""
    num_rows, slots, dropped, overflow = torch.stack(shares).unbind(1)
    is_compact = 1 - overflow
    blocks = ((num_rows / BLOCK).ceil() * is_compact).sum()
    density = (slots * is_compact).sum() / (blocks * vocab_size).clamp_min(1)
    mass = (dropped * is_compact).sum() / (num_rows * is_compact).sum().clamp_min(1)
    return torch.stack([density, mass, (num_rows * overflow).sum() / num_rows.sum().clamp_min(1)])
