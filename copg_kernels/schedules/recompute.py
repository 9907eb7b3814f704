"""Gradients for any upstream gradient per token, by recomputing the logits: three units of GEMM work.

for each slice of the vocabulary, all tokens at once:
    tile   = softmax - onehot of the slice          recomputed, in the workspace; with the entropy's part, if any
    dX    += tile W[slice]                          float32, scaled by the tokens' coefficients at the end
    dW[slice] = tile^T (coefficient * X)            written once
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.head import Head
from copg_kernels.kernels.matmul import addmm_fp32_, mm_fp32
from copg_kernels.kernels.row_slopes import RowSlopes, slopes_of_both, slopes_of_logps
from copg_kernels.kernels.softmax_minus_label import TILE_SCALE
from copg_kernels.schedules.tile_ops import accumulation_dtype, counted_rows, operand_dtype, tile_ops
from copg_kernels.schedules.workspace import kept_elements, slice_width, tile_in


class Needs(NamedTuple):
    """Which gradients the caller wants."""

    hidden_states: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Empty tensors where not wanted."""

    hidden_states: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)


def token_logps_bwd(
    dlogps: Tensor | None,
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    per_token_logps: Tensor,
    lse: Tensor,
    needs: Needs,
    *,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    dentropy: Tensor | None = None,
    entropy: Tensor | None = None,
    dhidden_dtype: torch.dtype | None = None,
    dhead_dtype: torch.dtype | None = None,
) -> Gradients:
    """(T,) upstream gradient, (T,) log-probs, (2, T) lse -> gradients of hidden states, weight and bias.

    dentropy, where the (T,) entropy has an upstream gradient too; dlogps may then be None.
    They are rounded once, to dhidden_dtype and dhead_dtype: the operands' unless said otherwise.
    """
    ops, dtype = tile_ops(backend), hidden_states.dtype
    accumulation, operand = accumulation_dtype(dtype), operand_dtype(dtype, backend)
    packed, rows = counted_rows(hidden_states, labels, ignore_index, backend)
    R, (V, H) = rows.row_index.numel(), head.weight.shape
    dhidden_dtype, dhead_dtype = dhidden_dtype or dtype, dhead_dtype or dtype
    if R == 0:
        return _zeros(hidden_states, head, needs, dhidden_dtype, dhead_dtype)
    gradients = Gradients(
        hidden_states.new_empty((0,), dtype=dhidden_dtype),  # made last
        hidden_states.new_empty(head.weight.shape if needs.weight else (0,), dtype=dhead_dtype),
        hidden_states.new_empty(head.weight.shape[:1] if needs.bias else (0,), dtype=dhead_dtype),
    )

    upstream, slopes = _upstream(dlogps, dentropy, per_token_logps, entropy, lse)
    # The tile's rows carry the factor exp(residual of lse): see softmax_minus_label.
    coefficient = upstream.to(accumulation) * -head.slope * (-lse[1]).exp()
    # Whatever reaches an ignored token, NaN included, goes no further.
    coefficient, unit = _in_units(coefficient.where(labels != ignore_index, 0.0), operand)
    packed_coefficient = coefficient.index_select(0, rows.row_index)
    dhidden = hidden_states.new_zeros((R if needs.hidden_states else 0, H), dtype=accumulation)
    if needs.weight:
        scaled_hidden = ops.scale_rows(hidden_states, rows.row_index, packed_coefficient, operand)

    width = slice_width(workspace_bytes, R, (V, H), dtype, hidden_states.device, backend)
    workspace = hidden_states.new_empty((kept_elements(R, width, backend),), dtype=operand)
    for start in range(0, V, width):
        stop = min(start + width, V)
        tile = tile_in(workspace, R, stop - start, backend)
        ops.softmax_minus_label(packed, head, rows, slopes, lse, start, tile)
        if needs.hidden_states:
            addmm_fp32_(dhidden, tile, head.weight[start:stop].to(operand))
        if needs.weight:
            write_product(tile.T, scaled_hidden, unit, gradients.weight[start:stop])
        if needs.bias:
            column = packed_coefficient.to(operand).unsqueeze(1)
            write_product(tile.T, column, unit, gradients.bias[start:stop].unsqueeze(1))
    if needs.hidden_states:
        dhidden = ops.scale_rows(dhidden, rows.position, coefficient * unit, dhidden_dtype)
        gradients = gradients._replace(hidden_states=dhidden)
    return gradients


def _upstream(
    dlogps: Tensor | None, dentropy: Tensor | None, per_token_logps: Tensor, entropy: Tensor | None, lse: Tensor
) -> tuple[Tensor, RowSlopes]:
    """(T,) each -> what each token's slopes are multiplied by, and these."""
    if dentropy is None:
        assert dlogps is not None
        return dlogps, slopes_of_logps(per_token_logps)
    assert entropy is not None
    return slopes_of_both(dlogps, dentropy, per_token_logps, entropy, lse)


def _zeros(
    hidden_states: Tensor, head: Head, needs: Needs, dhidden_dtype: torch.dtype, dhead_dtype: torch.dtype
) -> Gradients:
    """Where no row counts."""
    return Gradients(
        hidden_states.new_zeros(hidden_states.shape if needs.hidden_states else (0,), dtype=dhidden_dtype),
        hidden_states.new_zeros(head.weight.shape if needs.weight else (0,), dtype=dhead_dtype),
        hidden_states.new_zeros(head.weight.shape[:1] if needs.bias else (0,), dtype=dhead_dtype),
    )


def _in_units(coefficient: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """The coefficients and the unit they are expressed in: coefficient * unit is the true one.

    In float16 the coefficients, often 1e-4 and less, are taken relative to the power of two above the largest, so that
    coefficient * X neither overflows nor underflows.
    """
    unit = coefficient.new_full((), 1 / TILE_SCALE.get(operand, 1.0))
    if operand != torch.float16:
        return coefficient, unit
    exponent = torch.frexp(coefficient.abs().amax()).exponent
    largest = torch.ldexp(torch.ones_like(unit), exponent)
    return coefficient / largest, unit * largest


def write_product(a: Tensor, b: Tensor, unit: Tensor, out: Tensor) -> None:
    """out = (a @ b) * unit, summed in the accumulation dtype and rounded to out's dtype once.

    bfloat16 operands of a bfloat16 result need no float32 matrix in between: the GEMM's accumulators are that.
    """
    product = out
    accumulation = accumulation_dtype(out.dtype)
    if not out.is_contiguous() or (out.dtype != accumulation and (out.dtype != a.dtype or a.dtype in TILE_SCALE)):
        product = out.new_empty(out.shape, dtype=accumulation)
    mm_fp32(a, b, product)
    if a.dtype in TILE_SCALE:
        product.mul_(unit)
    if product is not out:
        out.copy_(product)
