"""Loss and gradients of whole groups where ranks hold shards of the head: three units of GEMM work over the ranks.

As `closed_groups`, with an exchange before a chunk's tiles are dropped:

    tile   = exp(logits of the chunk)             a rank's own entries, in its workspace
    all ranks: statistics of the tiles            gathered; the contrast of them is the same on every rank, to the bit
    dW    += (softmax - onehot)^T (c * X)         a rank's own rows
    dX     = c * (softmax - onehot) W             in the accumulation dtype, summed over the ranks once for the batch

All ranks must go through the same chunks, which therefore follow from the largest shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.schedules import frozen_head, vocab_parallel
from copg_kernels.schedules.chunks import Batch, chunks_of
from copg_kernels.schedules.closed_groups import (
    empty_gradients,
    in_chunks,
    of_tokens,
    scaled_slopes,
    slope_of_bonus,
    with_bonus,
)
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.shards import Shards
from copg_kernels.schedules.tile_ops import accumulation_dtype, can_keep_tiles, kept_dtype, tile_ops


def copg(
    batch: Batch,
    needs: Needs,
    shards: Shards,
    *,
    workspace_bytes: int,
    backend: str,
    entropy: bool = False,
    entropy_coef: float = 0.0,
) -> tuple[Contrast, Gradients, int]:
    """Of a batch whose head and labels are the shard's: contrast, gradients in `kept_dtype`, units of GEMM work.

    A group that does not fit takes the whole batch the ways that `closed_groups.copg` has for it.
    """
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    if not entropy_coef:
        return _exact(batch, needs, shards, **options, entropy=entropy)
    dentropy = slope_of_bonus(entropy_coef, batch)
    contrast, gradients, units = _exact(batch, needs, shards, **options, entropy=True, dentropy=dentropy)
    return with_bonus(contrast, dentropy), gradients, units


def _exact(
    batch: Batch,
    needs: Needs,
    shards: Shards,
    *,
    workspace_bytes: int,
    backend: str,
    entropy: bool,
    dentropy: Tensor | None = None,
) -> tuple[Contrast, Gradients, int]:
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    if not any(needs):
        return vocab_parallel.copg(*batch[:4], shards, **options, entropy=entropy), empty_gradients(batch, needs), 1
    units = 1 + needs.hidden_states + needs.weight
    chunks = chunks_of(batch, needs, **options, vocab_size=shards.most_rows)
    if chunks is not None:
        contrast_fwd = _contrast_of_all(shards, backend)
        summed = accumulation_dtype(batch.hidden_states.dtype)
        bonus: dict[str, Any] = dict(entropy=entropy, dentropy=dentropy)
        contrast, gradients, _ = in_chunks(batch, chunks, needs, contrast_fwd, backend, **bonus, dhidden_dtype=summed)
        return contrast, _complete(gradients, shards, batch.hidden_states), units
    if dentropy is None and not (needs.weight or needs.bias) and can_keep_tiles(batch.hidden_states.dtype, backend):
        contrast, u = frozen_head.copg(*batch, **options, entropy=entropy, shards=shards)
        gradients = empty_gradients(batch, needs)
        return contrast, gradients._replace(hidden_states=scaled_slopes(u, contrast, batch)), units
    contrast = vocab_parallel.copg(*batch[:4], shards, **options, entropy=entropy)
    return contrast, _recomputed(batch, contrast, needs, shards, **options, dentropy=dentropy), 1 + units


def _contrast_of_all(shards: Shards, backend: str) -> Callable[[Partials, PackedRows, Completions], Contrast]:
    """The contrast of a chunk, from the statistics of all ranks."""

    def contrast_fwd(partials: Partials, rows: PackedRows, completions: Completions) -> Contrast:
        return tile_ops(backend).contrast_fwd(shards.merged(partials, rows), rows, completions)

    return contrast_fwd


def _complete(gradients: Gradients, shards: Shards, hidden_states: Tensor) -> Gradients:
    """That of the hidden states from all ranks' entries, rounded once."""
    dhidden = shards.summed(gradients.hidden_states)
    return gradients._replace(hidden_states=dhidden.to(kept_dtype(hidden_states.dtype)))


def _recomputed(
    batch: Batch,
    contrast: Contrast,
    needs: Needs,
    shards: Shards,
    *,
    workspace_bytes: int,
    backend: str,
    dentropy: Tensor | None,
) -> Gradients:
    return vocab_parallel.token_logps_bwd(
        of_tokens(contrast.coefficients, batch),
        *batch[:3],
        contrast.per_token_logps,
        contrast.lse,
        needs,
        shards,
        workspace_bytes=workspace_bytes,
        backend=backend,
        dentropy=None if dentropy is None else dentropy.expand_as(contrast.per_token_logps),
        entropy=contrast.entropy,
        dtype=kept_dtype(batch.hidden_states.dtype),
    )
