"""A batch in chunks of whole groups, each as large as the workspace allows."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.schedules.recompute import Needs
from copg_kernels.schedules.tile_ops import can_keep_tiles, kept_dtype
from copg_kernels.schedules.workspace import kept_bytes_per_token


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
    firsts = _first_groups(edges, max_tokens)
    # The smallest chunks of that number: a small rest would cost as much as a whole one in passes over dW.
    low, high = -(-edges[-1] // len(firsts)), max_tokens
    while low < high:
        middle = (low + high) // 2
        found = _first_groups(edges, middle)
        low, high = (low, middle) if len(found) == len(firsts) else (middle + 1, high)
    firsts = _first_groups(edges, high)
    return [
        Chunk(slice(a, b), slice(cu_groups[a], cu_groups[b]), slice(edges[a], edges[b]))
        for a, b in pairwise([*firsts, len(edges) - 1])
    ]


def _first_groups(edges: list[int], max_tokens: int) -> list[int]:
    """The first group of each chunk, if each takes as many groups as max_tokens hold, or one."""
    firsts = [0]
    for group in range(1, len(edges) - 1):
        if edges[group + 1] - edges[firsts[-1]] > max_tokens:
            firsts.append(group)
    return firsts


def chunks_of(
    batch: Batch, needs: Needs, *, workspace_bytes: int, backend: str, vocab_size: int | None = None
) -> list[Chunk] | None:
    """The plan for this batch; None where no tile can be kept.

    vocab_size is that of the head, unless ranks hold shards of it and plan by the largest.

    On a GPU it reads the boundaries, and so waits for the device, only if they are not all equal and the batch does not
    fit as a whole: as it also does where its tile takes no more than the workspace and the float32 dW that chunks of
    16-bit operands would need.
    """
    completions, dtype, weight = batch.completions, batch.hidden_states.dtype, batch.head.weight
    if not can_keep_tiles(dtype, backend):
        return None
    num_tokens, num_completions = batch.labels.numel(), completions.rewards.numel()
    V, H = weight.shape if vocab_size is None else (vocab_size, weight.shape[1])
    bytes_per_token = kept_bytes_per_token(V, dtype, weight.device, backend)
    spared = V * H * 4 if needs.weight and kept_dtype(dtype).itemsize < 4 and backend == "triton" else 0
    if num_tokens * bytes_per_token <= workspace_bytes + spared:
        return [Chunk(slice(0, completions.cu_groups.numel() - 1), slice(0, num_completions), slice(0, num_tokens))]
    if completions.equal_sizes is not None:
        length, group_size = completions.equal_sizes
        cu_seqlens = [*range(0, num_tokens + 1, length)]
        cu_groups = [*range(0, num_completions + 1, group_size)]
    elif capturing(weight):
        return None
    else:
        cu_seqlens, cu_groups = completions.cu_seqlens.tolist(), completions.cu_groups.tolist()
    return plan_chunks(cu_seqlens, cu_groups, bytes_per_token, workspace_bytes)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being made of what runs: then nothing can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def batch_of(chunk: Chunk, batch: Batch) -> Batch:
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
