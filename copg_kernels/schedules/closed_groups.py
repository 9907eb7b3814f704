"""Loss and gradients of whole groups from one computation of their logits: three units of GEMM work, or two.

A token's coefficient depends on every completion of its group, and on nothing else. So tokens go through in chunks of
whole groups, and a chunk's tiles stay until its coefficients are known:

    tile   = exp(logits of the chunk)             the whole vocabulary, in the workspace
    c      = coefficients of the chunk's tokens   from the tile's row sums, by the contrast
    dX     = c * (softmax - onehot) W             scaled by c afterwards
    dW    += (softmax - onehot)^T (c * X)         in float32 over several chunks; of a single one, written once

Nothing is recomputed. The softmax is the tile times a factor per row, which goes where c goes. An entropy bonus has the
same coefficient for every token, known from the start; its part goes into the tile as soon as c is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.place_labels import SoftmaxSlice
from copg_kernels.kernels.row_slopes import RowSlopes, slopes_of_both, slopes_of_logps
from copg_kernels.kernels.row_statistics import Partials, Wanted
from copg_kernels.schedules import compact_tiles, forward, frozen_head, recompute, sparse_softmax
from copg_kernels.schedules.chunks import Batch, Chunk, batch_of, chunks_of
from copg_kernels.schedules.compact_tiles import CompactTile
from copg_kernels.schedules.kept_tiles import (
    add_weight_product_,
    bias_product,
    write_hidden_product,
    write_weight_product,
)
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.tile_ops import (
    accumulation_dtype,
    can_keep_tiles,
    counted_rows,
    kept_dtype,
    operand_dtype,
    tile_ops,
)
from copg_kernels.schedules.workspace import kept_elements


def copg(
    batch: Batch,
    needs: Needs,
    *,
    sparse_eps: float | None,
    workspace_bytes: int,
    backend: str,
    entropy: bool = False,
    entropy_coef: float = 0.0,
) -> tuple[Contrast, Gradients, int, Tensor]:
    """Contrast, gradients in `kept_dtype` (empty where not needed), the units of GEMM work they take, statistics (3,).

    entropy and entropy_coef only of an exact softmax. The bonus is in the gradients and in the loss.

    A group whose logits exceed the workspace takes the whole batch another way: with a frozen head the derivatives of
    the log-probs wait for their coefficients, with a trainable one the logits are computed again.
    """
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    statistics = batch.hidden_states.new_zeros(3, dtype=accumulation_dtype(batch.hidden_states.dtype))
    if entropy_coef:
        dentropy = slope_of_bonus(entropy_coef, batch)
        contrast, gradients, units = _exact(batch, needs, **options, entropy=True, dentropy=dentropy)
        return with_bonus(contrast, dentropy), gradients, units, statistics
    if sparse_eps is not None and any(needs):
        found = _sparse(batch, needs, sparse_eps, **options)
        if found is not None:
            contrast, gradients, statistics = found
            return contrast, Gradients(*(g.to(kept_dtype(batch.hidden_states.dtype)) for g in gradients)), 1, statistics
        statistics[2] = 1
    return *_exact(batch, needs, **options, entropy=entropy), statistics


def slope_of_bonus(entropy_coef: float, batch: Batch) -> Tensor:
    """dloss / dentropy of each counted token, () float64: their mean, times -entropy_coef, is part of the loss."""
    return -entropy_coef / (batch.labels != batch.ignore_index).sum().double().clamp(min=1)


def with_bonus(contrast: Contrast, dentropy: Tensor) -> Contrast:
    """The entropy's part in the loss."""
    bonus = dentropy * contrast.entropy.sum(dtype=torch.float64)
    return contrast._replace(loss=(contrast.loss + bonus).to(contrast.loss.dtype))


def _sparse(
    batch: Batch, needs: Needs, sparse_eps: float, *, workspace_bytes: int, backend: str
) -> tuple[Contrast, Gradients, Tensor] | None:
    """With the kernels from tiles of whole groups, where these fit the workspace; else any way the tokens come."""
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    chunks = chunks_of(batch, needs, **options) if backend == "triton" else None
    if chunks is None:
        return sparse_softmax.copg(*batch, needs, sparse_eps=sparse_eps, **options)
    return in_chunks(batch, chunks, needs, tile_ops(backend).contrast_fwd, backend, sparse_eps)


def _exact(
    batch: Batch, needs: Needs, *, workspace_bytes: int, backend: str, entropy: bool, dentropy: Tensor | None = None
) -> tuple[Contrast, Gradients, int]:
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    if not any(needs):
        return forward.copg(*batch, **options, entropy=entropy), empty_gradients(batch, needs), 1
    units = 1 + needs.hidden_states + needs.weight
    chunks = chunks_of(batch, needs, **options)
    if chunks is not None:
        contrast_fwd = tile_ops(backend).contrast_fwd
        bonus: dict[str, Any] = dict(entropy=entropy, dentropy=dentropy)
        contrast, gradients, _ = in_chunks(batch, chunks, needs, contrast_fwd, backend, **bonus)
        return contrast, gradients, units
    if dentropy is None and not (needs.weight or needs.bias) and can_keep_tiles(batch.hidden_states.dtype, backend):
        contrast, u = frozen_head.copg(*batch, **options, entropy=entropy)
        gradients = empty_gradients(batch, needs)
        return contrast, gradients._replace(hidden_states=scaled_slopes(u, contrast, batch)), units
    contrast = forward.copg(*batch, **options, entropy=entropy)
    return contrast, recomputed(batch, contrast, needs, **options, dentropy=dentropy), 1 + units


def in_chunks(
    batch: Batch,
    chunks: list[Chunk],
    needs: Needs,
    contrast: Callable[[Partials, PackedRows, Completions], Contrast],
    backend: str,
    sparse_eps: float | None = None,
    *,
    entropy: bool = False,
    dentropy: Tensor | None = None,
    dhidden_dtype: torch.dtype | None = None,
) -> tuple[Contrast, Gradients, Tensor]:
    """Outputs of the contrast and gradients of its loss, in `kept_dtype`, a chunk at a time; statistics (3,).

    With sparse_eps, which needs the kernels, from the tiles' compact form. With dentropy, a number, the gradients have
    the part of the tokens' entropy, to which the loss has that derivative. The gradient of the hidden states comes in
    dhidden_dtype where that is given, for a sum over ranks that hold shards of the head.
    """
    hidden_states, head, ops = batch.hidden_states, batch.head, tile_ops(backend)
    gradients = empty_gradients(batch, needs, one_chunk=len(chunks) == 1, dhidden_dtype=dhidden_dtype)
    most_tokens = max(chunk.tokens.stop - chunk.tokens.start for chunk in chunks)
    workspace = hidden_states.new_empty(
        (kept_elements(most_tokens, head.weight.shape[0], backend),), dtype=operand_dtype(hidden_states.dtype, backend)
    )
    contrasts, shares = [], []
    for index, chunk in enumerate(chunks):
        part = batch_of(chunk, batch)
        packed, rows = counted_rows(part.hidden_states, part.labels, part.ignore_index, backend)
        options = dict(wanted=Wanted(entropy), keeps_slope=dentropy is None)
        partials, tiles = ops.exp_tiles(packed, head, rows, workspace, **options)
        contrasts.append(contrast(partials, rows, part.completions))
        upstream, slopes = _upstream(contrasts[-1], part, dentropy)
        slices = ops.place_labels(tiles, packed, head, rows, slopes, contrasts[-1].lse)
        # Whatever an ignored token holds, NaN included, goes no further.
        per_token = upstream.where(part.labels != part.ignore_index, 0.0) * -head.slope
        scale = per_token.index_select(0, rows.row_index)
        if sparse_eps is None:
            compact = None
        else:
            compact = compact_tiles.compacted(slices[0], rows, sparse_eps, needs, in_tile=True)
            shares.append(compact.shares)
        tile = _Tile(slices, compact, packed, scale, backend)
        if needs.hidden_states:
            _write_hidden_product(tile, head, rows, per_token, gradients.hidden_states[chunk.tokens])
        if needs.weight:
            _write_weight_product(tile, gradients.weight, add=index > 0)
        if needs.bias:
            bias = bias_product(slices, scale)
            gradients.bias.copy_(bias if index == 0 else gradients.bias + bias)
    kept = kept_dtype(hidden_states.dtype)
    statistics = compact_tiles.statistics(shares, head.weight.shape[0]) if shares else scale.new_zeros(3)
    of_head = (gradient.to(kept) for gradient in gradients[1:])
    return _joined(contrasts), Gradients(gradients.hidden_states, *of_head), statistics


def _upstream(contrast: Contrast, part: Batch, dentropy: Tensor | None) -> tuple[Tensor, RowSlopes]:
    """(T,) what each token's slopes are multiplied by, and these."""
    dlogps = of_tokens(contrast.coefficients, part)
    if dentropy is None:
        return dlogps, slopes_of_logps(contrast.per_token_logps)
    dentropies = dentropy.expand_as(dlogps)
    return slopes_of_both(dlogps, dentropies, contrast.per_token_logps, contrast.entropy, contrast.lse)


class _Tile(NamedTuple):
    """Softmax minus one-hot of a chunk, and what goes into its products."""

    slices: list[SoftmaxSlice]  # of the vocabulary; a single one with the kernels
    compact: CompactTile | None
    hidden_states: Tensor  # as `counted_rows` gives them
    scale: Tensor  # (R,) of the packed rows
    backend: str


def _write_hidden_product(tile: _Tile, head: Head, rows: PackedRows, per_token: Tensor, out: Tensor) -> None:
    if tile.compact is None:
        write_hidden_product(tile.slices, head, rows, per_token, out, tile.backend)
    else:
        product = compact_tiles.hidden_product(tile.compact, tile.slices[0], head, tile.scale)
        tile_ops(tile.backend).scale_rows(product, rows.position, (per_token != 0).to(per_token.dtype), out.dtype, out)


def _write_weight_product(tile: _Tile, out: Tensor, *, add: bool) -> None:
    if tile.compact is None:
        write = add_weight_product_ if add else write_weight_product
        write(tile.slices, tile.hidden_states, tile.scale, out, tile.backend)
    else:
        operands = (tile.compact, tile.slices[0], tile.hidden_states, tile.scale, out)
        compact_tiles.write_weight_product(*operands, add=add)


def empty_gradients(
    batch: Batch, needs: Needs, *, one_chunk: bool = True, dhidden_dtype: torch.dtype | None = None
) -> Gradients:
    """Where gradients go; that of the head over several chunks in the accumulation dtype."""
    hidden_states, weight = batch.hidden_states, batch.head.weight
    kept = kept_dtype(hidden_states.dtype)
    summed = kept if one_chunk else accumulation_dtype(hidden_states.dtype)
    return Gradients(
        hidden_states.new_empty(hidden_states.shape if needs.hidden_states else (0,), dtype=dhidden_dtype or kept),
        hidden_states.new_empty(weight.shape if needs.weight else (0,), dtype=summed),
        hidden_states.new_empty(weight.shape[:1] if needs.bias else (0,), dtype=accumulation_dtype(summed)),
    )


def of_tokens(coefficients: Tensor, batch: Batch) -> Tensor:
    """(N,) -> (T,)"""
    lengths = batch.completions.cu_seqlens.diff()
    return torch.repeat_interleave(coefficients, lengths, output_size=batch.labels.numel())


def scaled_slopes(u: Tensor, contrast: Contrast, batch: Batch) -> Tensor:
    """(T, H) derivatives of the log-probs -> gradient of the hidden states."""
    return (u * of_tokens(contrast.coefficients, batch).unsqueeze(1)).to(kept_dtype(u.dtype))


def recomputed(
    batch: Batch,
    contrast: Contrast,
    needs: Needs,
    *,
    workspace_bytes: int,
    backend: str,
    dentropy: Tensor | None = None,
) -> Gradients:
    """Gradients from logits that are computed again; of a contrast with the coefficients that count."""
    # float16 has no room for a gradient before the loss scale has met it.
    kept = kept_dtype(batch.hidden_states.dtype)
    return recompute.token_logps_bwd(
        of_tokens(contrast.coefficients, batch),
        batch.hidden_states,
        batch.head,
        batch.labels,
        contrast.per_token_logps,
        contrast.lse,
        needs,
        ignore_index=batch.ignore_index,
        workspace_bytes=workspace_bytes,
        backend=backend,
        dentropy=None if dentropy is None else dentropy.expand_as(contrast.per_token_logps),
        entropy=contrast.entropy,
        dhidden_dtype=kept,
        dhead_dtype=kept,
    )


def _joined(contrasts: list[Contrast]) -> Contrast:
    """One Contrast of all chunks. The loss of each is already its share of the mean over all groups."""
    joined = {
        name: torch.cat([getattr(contrast, name) for contrast in contrasts], dim=-1)
        for name in Contrast._fields
        if name != "loss"
    }
    losses = torch.stack([contrast.loss for contrast in contrasts])
    return Contrast(loss=losses.double().sum().to(losses.dtype), **joined)
