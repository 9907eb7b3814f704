"""A head whose vocabulary is spread over the ranks of a process group: what each computes, and what they exchange.

    forward    each rank: statistics of its own entries' logits         (3, R) numbers, gathered by all
               all ranks: merged in rank order, like splits of one vocabulary
    backward   each rank: its entries' softmax from the lse of all      dW of its own rows
               dX of its own entries                                    (T, H) in float32, summed over the ranks

A label that another rank holds is a negative number here: no column of the tile is its own, so the tile operations and
the recompute schedule run on a shard as they are.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.schedules import recompute
from copg_kernels.schedules.forward import forward_width
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.tile_ops import accumulation_dtype, counted_rows, tile_ops

_IGNORED, _HELD_ELSEWHERE = -100, -1
# The maximum of no logits: finite, because (-inf) - (-inf) is NaN.
_LOWEST = -1e38


def shard_labels(labels: Tensor, ignore_index: int, first_row: int, num_rows: int) -> Tensor:
    """Labels of the whole vocabulary -> row of the shard, _HELD_ELSEWHERE or _IGNORED."""
    local = labels - first_row
    local = local.where((local >= 0) & (local < num_rows), _HELD_ELSEWHERE)
    return local.where(labels != ignore_index, _IGNORED)


def token_logps(
    hidden_states: Tensor,
    shard: Head,
    labels: Tensor,
    group: dist.ProcessGroup,
    *,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(T, H), head (V_r, H), (T,) labels of the shard -> per_token_logps (T,), lse (2, T); 0 where ignored."""
    ops = tile_ops(backend)
    hidden_states, rows = counted_rows(hidden_states, labels, _IGNORED, backend)
    if shard.weight.shape[0]:
        width = forward_width(shard, rows, workspace_bytes, backend)
        partials = ops.linear_logps_fwd(hidden_states, shard, rows, width)
    else:
        partials = _partials_of_nothing(hidden_states, rows, backend)
    return ops.merge_splits_fwd(_gather(_merge_shard(partials, rows), group), rows)


def token_logps_bwd(
    dlogps: Tensor,
    hidden_states: Tensor,
    shard: Head,
    labels: Tensor,
    per_token_logps: Tensor,
    lse: Tensor,
    needs: Needs,
    group: dist.ProcessGroup,
    *,
    workspace_bytes: int,
    backend: str,
) -> Gradients:
    """As `recompute.token_logps_bwd`; weight and bias are the shard's, hidden_states the sum over all shards."""
    dtype, accumulation = hidden_states.dtype, accumulation_dtype(hidden_states.dtype)
    if shard.weight.shape[0]:
        gradients = recompute.token_logps_bwd(
            dlogps,
            hidden_states,
            shard,
            labels,
            per_token_logps,
            lse,
            needs,
            ignore_index=_IGNORED,
            workspace_bytes=workspace_bytes,
            backend=backend,
            dhidden_dtype=accumulation,
        )
    else:
        dhidden = torch.zeros_like(hidden_states, dtype=accumulation, memory_format=torch.contiguous_format)
        gradients = Gradients(dhidden, torch.zeros_like(shard.weight), hidden_states.new_zeros((0,)))
    if needs.hidden_states and labels.numel():
        dhidden = gradients.hidden_states
        dist.all_reduce(dhidden, group=group)
        gradients = gradients._replace(hidden_states=dhidden.to(dtype))
    return gradients


def _partials_of_nothing(hidden_states: Tensor, rows: PackedRows, backend: str) -> Partials:
    """The statistics of a shard without rows."""
    accumulation = accumulation_dtype(hidden_states.dtype)
    R, dtype = rows.row_index.numel(), torch.float64 if backend == "torch" else torch.float32
    return Partials(
        hidden_states.new_full((1, R), _LOWEST, dtype=dtype),
        hidden_states.new_zeros((1, R), dtype=dtype),
        hidden_states.new_empty((R,), dtype=accumulation),
    )


def _merge_shard(partials: Partials, rows: PackedRows) -> Partials:
    """The splits of one shard -> one split; the label's logit is -inf where another rank holds it."""
    top = partials.max.amax(0)
    total = (partials.sum * (partials.max - top).exp()).sum(0)
    held = partials.label_logits.where(rows.labels >= 0, float("-inf"))
    return Partials(top.unsqueeze(0), total.unsqueeze(0), held)


def _gather(partials: Partials, group: dist.ProcessGroup) -> Partials:
    """One split of every rank, in rank order."""
    num_ranks, (_, R) = dist.get_world_size(group), partials.max.shape
    if R == 0:
        return partials
    mine = torch.cat([*partials[:2], partials.label_logits.to(partials.max.dtype).unsqueeze(0)])
    gathered = mine.new_empty((num_ranks, 3, R))
    dist.all_gather(list(gathered.unbind()), mine, group=group)
    tops, totals, label_logits = gathered.unbind(1)
    return Partials(tops.contiguous(), totals.contiguous(), label_logits.amax(0).to(partials.label_logits.dtype))
