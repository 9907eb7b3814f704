"""Log-probabilities of a head whose vocabulary is spread over ranks, and their gradients from recomputed logits.

forward    each rank: statistics of its own entries' logits         gathered: see `shards`
           all ranks: merged in rank order, like splits of one vocabulary
backward   each rank: its entries' softmax from the lse of all      dW of its own rows
           dX of its own entries                                    (T, H) in float32, summed over the ranks
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials, Wanted, partials_of_no_entries
from copg_kernels.schedules import recompute
from copg_kernels.schedules.forward import forward_width
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.shards import IGNORED, Shards
from copg_kernels.schedules.tile_ops import accumulation_dtype, counted_rows, tile_ops


def token_logps(
    hidden_states: Tensor,
    shard: Head,
    labels: Tensor,
    shards: Shards,
    *,
    workspace_bytes: int,
    backend: str,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H), head (V_r, H), (T,) labels of the shard -> per_token_logps (T,), lse (2, T), entropy (T,) or empty.

    0 where ignored.
    """
    ops, wanted = tile_ops(backend), Wanted(entropy)
    partials, rows = _statistics(hidden_states, shard, labels, shards, workspace_bytes, backend, wanted)
    per_token_logps, lse = ops.merge_splits_fwd(partials, rows)
    if not entropy:
        return per_token_logps, lse, lse.new_empty(0)
    return per_token_logps, lse, ops.token_statistics_fwd(partials, rows, per_token_logps).entropy


def copg(
    hidden_states: Tensor,
    shard: Head,
    labels: Tensor,
    completions: Completions,
    shards: Shards,
    *,
    workspace_bytes: int,
    backend: str,
    entropy: bool = False,
) -> Contrast:
    """As `forward.copg`, the same bits on all ranks."""
    wanted = Wanted(entropy)
    partials, rows = _statistics(hidden_states, shard, labels, shards, workspace_bytes, backend, wanted)
    return tile_ops(backend).contrast_fwd(partials, rows, completions)


def token_logps_bwd(
    dlogps: Tensor | None,
    hidden_states: Tensor,
    shard: Head,
    labels: Tensor,
    per_token_logps: Tensor,
    lse: Tensor,
    needs: Needs,
    shards: Shards,
    *,
    workspace_bytes: int,
    backend: str,
    dentropy: Tensor | None = None,
    entropy: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """As `recompute.token_logps_bwd`; weight and bias are the shard's, hidden_states the sum over all shards.

    All are rounded once, to dtype: the operands' unless said otherwise.
    """
    dtype, accumulation = dtype or hidden_states.dtype, accumulation_dtype(hidden_states.dtype)
    if shard.weight.shape[0]:
        gradients = recompute.token_logps_bwd(
            dlogps,
            hidden_states,
            shard,
            labels,
            per_token_logps,
            lse,
            needs,
            ignore_index=IGNORED,
            workspace_bytes=workspace_bytes,
            backend=backend,
            dentropy=dentropy,
            entropy=entropy,
            dhidden_dtype=accumulation,
            dhead_dtype=dtype,
        )
    else:
        dhidden = torch.zeros_like(hidden_states, dtype=accumulation, memory_format=torch.contiguous_format)
        gradients = Gradients(dhidden, torch.zeros_like(shard.weight, dtype=dtype), dhidden.new_zeros(0, dtype=dtype))
    if needs.hidden_states:
        gradients = gradients._replace(hidden_states=shards.summed(gradients.hidden_states).to(dtype))
    return gradients


def _statistics(
    hidden_states: Tensor,
    shard: Head,
    labels: Tensor,
    shards: Shards,
    workspace_bytes: int,
    backend: str,
    wanted: Wanted,
) -> tuple[Partials, PackedRows]:
    """Of all ranks' entries."""
    hidden_states, rows = counted_rows(hidden_states, labels, IGNORED, backend)
    if shard.weight.shape[0]:
        width = forward_width(shard, rows, workspace_bytes, backend)
        partials = tile_ops(backend).linear_logps_fwd(hidden_states, shard, rows, width, wanted=wanted)
    else:
        label_logits = hidden_states.new_empty(rows.labels.shape, dtype=accumulation_dtype(hidden_states.dtype))
        dtype = torch.float64 if backend == "torch" else torch.float32
        partials = partials_of_no_entries(label_logits, dtype, wanted)
    return shards.merged(partials, rows), rows
