"""Products with softmax minus one-hot where its tile is still there: what closed groups and a frozen head share."""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.head import Head
from copg_kernels.kernels.matmul import addmm_fp32_, mm_fp32
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice
from copg_kernels.schedules.recompute import write_product
from copg_kernels.schedules.tile_ops import accumulation_dtype, operand_dtype, tile_ops


def write_hidden_product(
    slices: list[SoftmaxSlice], head: Head, rows: PackedRows, scale: Tensor, out: Tensor, backend: str
) -> None:
    """(T,) -> out (T, H) = scale * (softmax - onehot) weight, rounded once; 0 where scale is 0."""
    operand, accumulation = operand_dtype(head.weight.dtype, backend), accumulation_dtype(head.weight.dtype)
    num_rows, H = rows.row_index.numel(), head.weight.shape[1]
    factor = slices[0].factor if len(slices) == 1 else slices[0].factor.new_ones(num_rows)
    total = None
    for part in slices:
        weight = head.weight[part.start : part.stop].to(operand)
        product = mm_fp32(part.tile, weight, weight.new_empty((num_rows, H), dtype=accumulation))
        if len(slices) > 1:
            product.mul_(part.factor.unsqueeze(1))
        total = product if total is None else total.add_(product)
    # The factor waits for the pass that puts rows into their places, as one more pass would cost a hundredth.
    of_tokens = torch.zeros_like(scale).index_copy_(0, rows.row_index, factor)
    tile_ops(backend).scale_rows(total, rows.position, scale * of_tokens, out.dtype, out)


def write_weight_product(
    slices: list[SoftmaxSlice], hidden_states: Tensor, scale: Tensor, out: Tensor, backend: str
) -> None:
    """out (V, H) = (softmax - onehot)^T (scale * X), rounded once; hidden_states as `counted_rows` gives them."""
    for part in slices:
        scaled = tile_ops(backend).scale_packed(hidden_states, scale * part.factor, part.tile.dtype)
        write_product(part.tile.T, scaled, scale.new_ones(()), out[part.start : part.stop])


def add_weight_product_(
    slices: list[SoftmaxSlice], hidden_states: Tensor, scale: Tensor, out: Tensor, backend: str
) -> None:
    """out (V, H), in the accumulation dtype, += the same."""
    for part in slices:
        scaled = tile_ops(backend).scale_packed(hidden_states, scale * part.factor, part.tile.dtype)
        addmm_fp32_(out[part.start : part.stop], part.tile.T, scaled)


def bias_product(slices: list[SoftmaxSlice], scale: Tensor) -> Tensor:
    """(softmax - onehot)^T scale, (V,) in the accumulation dtype."""
    columns = []
    for part in slices:
        column = (scale * part.factor).to(part.tile.dtype).unsqueeze(1)
        out = column.new_empty((part.stop - part.start, 1), dtype=scale.dtype)
        columns.append(mm_fp32(part.tile.T, column, out).squeeze(1))
    return torch.cat(columns)
