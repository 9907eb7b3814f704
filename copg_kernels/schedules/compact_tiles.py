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
from copg_kernels.kernels.compact_tile import Columns, Pool, compact_tile
from copg_kernels.kernels.count_significant import BLOCK
from copg_kernels.kernels.dense_product import dense_product
from copg_kernels.kernels.gather_product import gather_product
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.matmul import mm_fp32
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice
from copg_kernels.kernels.scale_rows import scale_packed
from copg_kernels.kernels.significant_columns import MOST_KEPT
from copg_kernels.schedules.recompute import Needs

# Where values are copied for both directions, which mostly keep about as much as each other (a base model, at 2^-14: 21
# and 20 % of the vocabulary), the room for both is not twice the room for one.
MOST_OF_BOTH = 1.5


class CompactTile(NamedTuple):
    by_rows: Pool
    by_columns: Pool | None  # where the head is trained
    shares: Tensor  # (4,) see `statistics`


def compacted(part: SoftmaxSlice, rows: PackedRows, eps: float, needs: Needs, *, in_tile: bool) -> CompactTile:
    """The whole vocabulary's tile -> its entries of at least eps; in_tile: it stays until the head's product."""
    R, V = part.tile.shape
    capacity = MOST_KEPT * max(-(-R // BLOCK) * V, -(-V // BLOCK) * R)
    columns = Columns.UNWANTED
    if needs.weight or needs.bias and not in_tile:
        columns = Columns.IN_TILE if in_tile else Columns.COPIED
        capacity *= 1.0 if in_tile else MOST_OF_BOTH
    by_rows, by_columns = compact_tile(part, rows, eps, max(1, int(capacity)), columns)
    overflow = by_rows.overflow if by_columns is None else by_rows.overflow | by_columns.overflow
    numbers = (rows.num_rows, by_rows.offsets[-1:], by_rows.dropped.sum().view(1), overflow)
    return CompactTile(by_rows, by_columns, torch.cat([number.float() for number in numbers]))


def mean_row(mass: Tensor, source: Tensor, factor: Tensor | None = None) -> Tensor:
    """(N,) float32 weights, (N, H) -> (H,) float32: the mean row, each over its factor; 0 where there is no mass."""
    share = mass / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)
    if factor is not None:
        share = torch.where(factor > 0, share / factor, 0.0)
    out = mass.new_empty((1, source.shape[1]))
    return mm_fp32(share.to(source.dtype).unsqueeze(0), source, out).squeeze(0)


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
    pool = compact.by_columns
    assert pool is not None and pool.in_tile
    precision = head_blocks(hidden_states).precision
    source = scale_packed(hidden_states, scale * part.factor, part.tile.dtype)
    mean = mean_row(pool.dropped_list, source, part.factor)
    gather_product(pool, source, mean, None, out, precision, add=add)
    dense_product(pool.overflow, part.tile.T, source, None, out, precision)


def statistics(shares: list[Tensor], vocab_size: int) -> Tensor:
    """Rows, slots, dropped mass, overflow of each tile -> density, mean dropped mass, share of rows that overflowed."""
    num_rows, slots, dropped, overflow = torch.stack(shares).unbind(1)
    is_compact = 1 - overflow
    blocks = ((num_rows / BLOCK).ceil() * is_compact).sum()
    density = (slots * is_compact).sum() / (blocks * vocab_size).clamp_min(1)
    mass = (dropped * is_compact).sum() / (num_rows * is_compact).sum().clamp_min(1)
    return torch.stack([density, mass, (num_rows * overflow).sum() / num_rows.sum().clamp_min(1)])
