"""Loss and gradients of whole groups from one computation of their logits: three units of GEMM work, or two.

A token's coefficient depends on every completion of its group, and on nothing else. So tokens go through in chunks of
whole groups, and a chunk's tiles stay until its coefficients are known:

    tiles  = exp(logits of the chunk)             the whole vocabulary, in the workspace
    c      = coefficients of the chunk's tokens   from the tiles' row sums, by the contrast
    dX     = c * (softmax - onehot) W             scaled by c afterwards
    dW    += (softmax - onehot)^T (c * X)

Nothing is recomputed. The softmax is the tile times a factor per row, which goes where c goes. Torch backend only: on a
GPU the recompute schedule serves until kernels that keep their tile have been timed there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast, contrast_fwd_torch
from copg_kernels.kernels.exp_tile import ExpTile, exp_tile_torch, place_labels_torch
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.linear_logps_fwd import SPLIT_TORCH, Partials
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.schedules import forward, recompute
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.tile_ops import accumulation_dtype, counted_rows


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


def copg(batch: Batch, needs: Needs, *, workspace_bytes: int, backend: str) -> tuple[Contrast, Gradients, int]:
    """Contrast, gradients, and the units of GEMM work that they take in all.

    Gradients stay empty where none is needed and on a GPU, whose backward pass recomputes. Where a group's logits
    exceed the workspace they are recomputed at once.
    """
    num_gradients = needs.hidden_states + needs.weight
    in_forward = backend == "torch" and any(needs)
    chunks = chunks_of(batch, workspace_bytes) if in_forward else None
    if chunks is not None:
        return *in_chunks(batch, chunks, needs, contrast_fwd_torch), 1 + num_gradients

    hidden_states, head, labels, completions, ignore_index = batch
    options: dict[str, Any] = dict(ignore_index=ignore_index, workspace_bytes=workspace_bytes, backend=backend)
    contrast = forward.copg(hidden_states, head, labels, completions, **options)
    accumulation = accumulation_dtype(hidden_states.dtype)
    gradients = Gradients(*(hidden_states.new_empty(0, dtype=accumulation) for _ in needs))
    if in_forward:
        recomputed = recompute.token_logps_bwd(
            of_tokens(contrast.coefficients, batch),
            hidden_states,
            head,
            labels,
            contrast.per_token_logps,
            contrast.lse,
            needs,
            **options,
        )
        gradients = Gradients(*(gradient.to(accumulation) for gradient in recomputed))
    return contrast, gradients, 2 + num_gradients if any(needs) else 1


def chunks_of(batch: Batch, workspace_bytes: int) -> list[Chunk] | None:
    """The plan for this batch."""
    completions, itemsize = batch.completions, accumulation_dtype(batch.hidden_states.dtype).itemsize
    return plan_chunks(
        completions.cu_seqlens.tolist(),
        completions.cu_groups.tolist(),
        batch.head.weight.shape[0] * itemsize,
        workspace_bytes,
    )


def in_chunks(
    batch: Batch,
    chunks: list[Chunk],
    needs: Needs,
    contrast: Callable[[Partials, PackedRows, Completions], Contrast],
) -> tuple[Contrast, Gradients]:
    """Outputs of the contrast and gradients of its loss, in the accumulation dtype, a chunk at a time."""
    hidden_states, weight = batch.hidden_states, batch.head.weight
    accumulation = accumulation_dtype(hidden_states.dtype)
    gradients = Gradients(
        hidden_states.new_empty(hidden_states.shape if needs.hidden_states else (0,), dtype=accumulation),
        hidden_states.new_zeros(weight.shape if needs.weight else (0,), dtype=accumulation),
        hidden_states.new_zeros(weight.shape[:1] if needs.bias else (0,), dtype=accumulation),
    )
    most_tokens = max(chunk.tokens.stop - chunk.tokens.start for chunk in chunks)
    workspace = hidden_states.new_empty((most_tokens * weight.shape[0],), dtype=accumulation)
    contrasts = []
    for chunk in chunks:
        part = _batch_of(chunk, batch)
        packed, rows = counted_rows(part.hidden_states, part.labels, part.ignore_index, "torch")
        tiles = list(tiles_of(packed, part.head, rows, workspace))
        contrasts.append(contrast(partials_of(tiles, packed), rows, part.completions))
        dhidden = _add_gradients(part, packed, rows, tiles, contrasts[-1], needs, gradients)
        if needs.hidden_states:
            gradients.hidden_states[chunk.tokens] = 0
            gradients.hidden_states[chunk.tokens].index_copy_(0, rows.row_index, dhidden)
    return _joined(contrasts), gradients


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


def _add_gradients(
    batch: Batch,
    packed: Tensor,
    rows: PackedRows,
    tiles: list[ExpTile],
    contrast: Contrast,
    needs: Needs,
    gradients: Gradients,
) -> Tensor:
    """dX of a chunk's counted rows; its share of dW and dbias is added to the gradients."""
    coefficient = of_tokens(contrast.coefficients, batch)[rows.row_index] * -batch.head.slope
    logps = contrast.per_token_logps[rows.row_index]
    lse = contrast.lse.double().sum(0)[rows.row_index]
    dhidden = torch.zeros_like(packed)
    for tile in tiles:
        scale = place_labels_torch(tile, logps, lse) * coefficient
        if needs.hidden_states:
            weight = batch.head.weight[tile.start : tile.stop].to(packed.dtype)
            dhidden.add_((tile.tile @ weight).mul_(scale.unsqueeze(1)))
        if needs.weight:
            gradients.weight[tile.start : tile.stop].addmm_(tile.tile.T, packed * scale.unsqueeze(1))
        if needs.bias:
            gradients.bias[tile.start : tile.stop].addmv_(tile.tile.T, scale)
    return dhidden


def tiles_of(packed: Tensor, head: Head, rows: PackedRows, workspace: Tensor) -> Iterator[ExpTile]:
    """The slices of the vocabulary side by side in the workspace, each one contiguous."""
    R, V = packed.shape[0], head.weight.shape[0]
    for start, stop in pairwise([*range(0, V, SPLIT_TORCH), V]):
        out = workspace[R * start : R * stop].view(R, stop - start)
        yield exp_tile_torch(packed, head, rows.labels, start, stop, out)


def partials_of(tiles: list[ExpTile], packed: Tensor) -> Partials:
    label_logits = packed.new_empty(packed.shape[:1])
    for tile in tiles:
        label_logits[tile.held] = tile.label_logits
    return Partials(
        torch.stack([tile.base for tile in tiles]), torch.stack([tile.sums for tile in tiles]), label_logits
    )


def _joined(contrasts: list[Contrast]) -> Contrast:
    """One Contrast of all chunks. The loss of each is already its share of the mean over all groups."""
    joined = {
        name: torch.cat([getattr(contrast, name) for contrast in contrasts], dim=-1)
        for name in Contrast._fields
        if name != "loss"
    }
    return Contrast(loss=torch.stack([contrast.loss for contrast in contrasts]).sum(), **joined)
