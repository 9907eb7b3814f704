"""Loss and gradients of whole groups from one computation of their logits: three units of GEMM work, or two.

A token's coefficient depends on every completion of its group, and on nothing else. So tokens go through in chunks of
whole groups, and a chunk's tiles stay until its coefficients are known:

    tile   = exp(logits of the chunk)             the whole vocabulary, in the workspace
    c      = coefficients of the chunk's tokens   from the tile's row sums, by the contrast
    dX     = c * (softmax - onehot) W             scaled by c afterwards
    dW    += (softmax - onehot)^T (c * X)         in float32 over several chunks; of a single one, written once

Nothing is recomputed. The softmax is the tile times a factor per row, which goes where c goes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.schedules import forward, frozen_head, recompute, sparse_softmax
from copg_kernels.schedules.kept_tiles import (
    add_weight_product_,
    bias_product,
    hidden_product,
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
from copg_kernels.schedules.workspace import kept_bytes_per_token, kept_elements


class Batch(NamedTuple):
    """What a loss is computed from; also of a chunk."""

    hidden_states: Tensor  # (T, H)
    head: Head
    labels: Tensor  # (T,)
    completions: Completions
    ignore_index: int


class Chunk(NamedTuple):
    """Consecutive whole groups: which groups, completions and tokens."""

    groups: slice
    completions: slice
    tokens: slice


def plan_chunks(
    cu_seqlens: list[int], cu_groups: list[int], bytes_per_token: int, workspace_bytes: int
) -> list[Chunk] | None:
    """As many groups per chunk as their logits fit workspace_bytes; None where a single group does not."""
    max_tokens = workspace_bytes // bytes_per_token
    edges = [cu_seqlens[completion] for completion in cu_groups]
    if any(stop - start > max_tokens for start, stop in pairwise(edges)):
        return None
    firsts = [0]
    for group in range(1, len(edges) - 1):
        if edges[group + 1] - edges[firsts[-1]] > max_tokens:
            firsts.append(group)
    return [
        Chunk(slice(a, b), slice(cu_groups[a], cu_groups[b]), slice(edges[a], edges[b]))
        for a, b in pairwise([*firsts, len(edges) - 1])
    ]


def copg(
    batch: Batch, needs: Needs, *, sparse_eps: float | None, workspace_bytes: int, backend: str
) -> tuple[Contrast, Gradients, int, Tensor]:
    """Contrast, gradients in `kept_dtype` (empty where not needed), the units of GEMM work they take, statistics (3,).

    A group whose logits exceed the workspace takes the whole batch another way: with a frozen head the derivatives of
    the log-probs wait for their coefficients, with a trainable one the logits are computed again.
    """
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    statistics = batch.completions.rewards.new_zeros(3)
    if not any(needs):
        return forward.copg(*batch, **options), _empty_gradients(batch, needs), 1, statistics
    if sparse_eps is not None:
        found = sparse_softmax.copg(*batch, needs, sparse_eps=sparse_eps, **options)
        if found is not None:
            contrast, gradients, statistics = found
            return contrast, Gradients(*(g.to(kept_dtype(batch.hidden_states.dtype)) for g in gradients)), 1, statistics
        statistics[2] = 1
    return *_exact(batch, needs, **options), statistics


def _exact(batch: Batch, needs: Needs, *, workspace_bytes: int, backend: str) -> tuple[Contrast, Gradients, int]:
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    units = 1 + needs.hidden_states + needs.weight
    chunks = chunks_of(batch, needs, **options)
    if chunks is not None:
        return *in_chunks(batch, chunks, needs, tile_ops(backend).contrast_fwd, backend), units
    if not (needs.weight or needs.bias) and can_keep_tiles(batch.hidden_states.dtype, backend):
        contrast, u = frozen_head.copg(*batch, **options)
        gradients = _empty_gradients(batch, needs)
        return contrast, gradients._replace(hidden_states=scaled_slopes(u, contrast, batch)), units
    contrast = forward.copg(*batch, **options)
    return contrast, recomputed(batch, contrast, needs, **options), 1 + units


def chunks_of(batch: Batch, needs: Needs, *, workspace_bytes: int, backend: str) -> list[Chunk] | None:
    """The plan for this batch; None where no tile can be kept.

    On a GPU it reads the boundaries, and so waits for the device, only if they are not all equal and the batch does not
    fit as a whole: as it also does where its tile takes no more than the workspace and the float32 dW that chunks of
    16-bit operands would need.
    """
    completions, dtype, weight = batch.completions, batch.hidden_states.dtype, batch.head.weight
    if not can_keep_tiles(dtype, backend):
        return None
    num_tokens, num_completions = batch.labels.numel(), completions.rewards.numel()
    bytes_per_token = kept_bytes_per_token(weight.shape[0], dtype, weight.device, backend)
    spared = weight.numel() * 4 if needs.weight and kept_dtype(dtype).itemsize < 4 and backend == "triton" else 0
    if num_tokens * bytes_per_token <= workspace_bytes + spared:
        return [Chunk(slice(0, completions.cu_groups.numel() - 1), slice(0, num_completions), slice(0, num_tokens))]
    if completions.equal_sizes is not None:
        length, group_size = completions.equal_sizes
        cu_seqlens = [*range(0, num_tokens + 1, length)]
        cu_groups = [*range(0, num_completions + 1, group_size)]
    elif weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    else:
        cu_seqlens, cu_groups = completions.cu_seqlens.tolist(), completions.cu_groups.tolist()
    return plan_chunks(cu_seqlens, cu_groups, bytes_per_token, workspace_bytes)


def in_chunks(
    batch: Batch,
    chunks: list[Chunk],
    needs: Needs,
    contrast: Callable[[Partials, PackedRows, Completions], Contrast],
    backend: str,
) -> tuple[Contrast, Gradients]:
    """Outputs of the contrast and gradients of its loss, in `kept_dtype`, a chunk at a time."""
    hidden_states, head, ops = batch.hidden_states, batch.head, tile_ops(backend)
    gradients = _empty_gradients(batch, needs, one_chunk=len(chunks) == 1)
    most_tokens = max(chunk.tokens.stop - chunk.tokens.start for chunk in chunks)
    workspace = hidden_states.new_empty(
        (kept_elements(most_tokens, head.weight.shape[0], backend),), dtype=operand_dtype(hidden_states.dtype, backend)
    )
    contrasts = []
    for index, chunk in enumerate(chunks):
        part = _batch_of(chunk, batch)
        packed, rows = counted_rows(part.hidden_states, part.labels, part.ignore_index, backend)
        partials, tiles = ops.exp_tiles(packed, head, rows, workspace)
        contrasts.append(contrast(partials, rows, part.completions))
        _, _, _, _, coefficients, per_token_logps, lse = contrasts[-1]
        slices = ops.place_labels(tiles, packed, head, rows, per_token_logps, lse)
        scale = of_tokens(coefficients, part).index_select(0, rows.row_index) * -head.slope
        if needs.hidden_states:
            dhidden = hidden_product(slices, head, scale, backend)
            counted = (part.labels != part.ignore_index).to(scale.dtype)
            out = gradients.hidden_states[chunk.tokens]
            out.copy_(ops.scale_rows(dhidden, rows.position, counted, out.dtype))
        if needs.weight:
            write = write_weight_product if index == 0 else add_weight_product_
            write(slices, packed, rows, scale, gradients.weight, backend)
        if needs.bias:
            bias = bias_product(slices, scale)
            gradients.bias.copy_(bias if index == 0 else gradients.bias + bias)
    kept = kept_dtype(hidden_states.dtype)
    return _joined(contrasts), Gradients(*(gradient.to(kept) for gradient in gradients))


def _empty_gradients(batch: Batch, needs: Needs, *, one_chunk: bool = True) -> Gradients:
    """Where gradients go; that of the head over several chunks in the accumulation dtype."""
    hidden_states, weight = batch.hidden_states, batch.head.weight
    kept = kept_dtype(hidden_states.dtype)
    summed = kept if one_chunk else accumulation_dtype(hidden_states.dtype)
    return Gradients(
        hidden_states.new_empty(hidden_states.shape if needs.hidden_states else (0,), dtype=kept),
        hidden_states.new_empty(weight.shape if needs.weight else (0,), dtype=summed),
        hidden_states.new_empty(weight.shape[:1] if needs.bias else (0,), dtype=accumulation_dtype(summed)),
    )


def _batch_of(chunk: Chunk, batch: Batch) -> Batch:
    first, last = chunk.completions.start, chunk.completions.stop
    completions = batch.completions
    completions = completions._replace(
        cu_seqlens=completions.cu_seqlens[first : last + 1] - chunk.tokens.start,
        cu_groups=completions.cu_groups[chunk.groups.start : chunk.groups.stop + 1] - first,
        ref_logps=completions.ref_logps[first:last],
        rewards=completions.rewards[first:last],
    )
    return batch._replace(
        hidden_states=batch.hidden_states[chunk.tokens], labels=batch.labels[chunk.tokens], completions=completions
    )


def of_tokens(coefficients: Tensor, batch: Batch) -> Tensor:
    """(N,) -> (T,)"""
    lengths = batch.completions.cu_seqlens.diff()
    return torch.repeat_interleave(coefficients, lengths, output_size=batch.labels.numel())


def scaled_slopes(u: Tensor, contrast: Contrast, batch: Batch) -> Tensor:
    """(T, H) derivatives of the log-probs -> gradient of the hidden states."""
    return (u * of_tokens(contrast.coefficients, batch).unsqueeze(1)).to(kept_dtype(u.dtype))


def recomputed(batch: Batch, contrast: Contrast, needs: Needs, *, workspace_bytes: int, backend: str) -> Gradients:
    """Gradients from logits that are computed again; of a contrast with the coefficients that count."""
    gradients = recompute.token_logps_bwd(
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
    )
    return Gradients(*(gradient.to(kept_dtype(gradient.dtype)) for gradient in gradients))


def _joined(contrasts: list[Contrast]) -> Contrast:
    """One Contrast of all chunks. The loss of each is already its share of the mean over all groups."""
    joined = {
        name: torch.cat([getattr(contrast, name) for contrast in contrasts], dim=-1)
        for name in Contrast._fields
        if name != "loss"
    }
    return Contrast(loss=torch.stack([contrast.loss for contrast in contrasts]).sum(), **joined)
