"""Log-probabilities and the contrastive loss: one unit of GEMM work, no logits kept."""

from __future__ import annotations

from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import NOTHING, Wanted
from copg_kernels.kernels.token_statistics import TokenStatistics, no_statistics
from copg_kernels.schedules.tile_ops import counted_rows, tile_ops
from copg_kernels.schedules.workspace import slice_width


def token_logps(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    *,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    wanted: Wanted = NOTHING,
) -> tuple[Tensor, Tensor, TokenStatistics]:
    """(T, H), (T,) -> per_token_logps (T,), lse (2, T), (T,) of each statistic that is wanted; 0 where ignored."""
    ops = tile_ops(backend)
    hidden_states, rows = counted_rows(hidden_states, labels, ignore_index, backend)
    width = forward_width(head, rows, workspace_bytes, backend)
    partials = ops.linear_logps_fwd(hidden_states, head, rows, width, wanted=wanted)
    per_token_logps, lse = ops.merge_splits_fwd(partials, rows)
    if not any(wanted):
        return per_token_logps, lse, no_statistics(per_token_logps)
    return per_token_logps, lse, ops.token_statistics_fwd(partials, rows, per_token_logps, head.weight.shape[0])


def forward_width(head: Head, rows: PackedRows, workspace_bytes: int, backend: str) -> int:
    """The slices that `recompute` will take."""
    weight, num_rows = head.weight, rows.row_index.numel()
    V, H = weight.shape
    return slice_width(workspace_bytes, num_rows, (V, H), weight.dtype, weight.device, backend)


def copg(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    completions: Completions,
    ignore_index: int,
    *,
    workspace_bytes: int,
    backend: str,
    entropy: bool = False,
) -> Contrast:
    """(T, H), (T,), completions -> loss, per-completion outputs, and what the backward pass needs."""
    ops = tile_ops(backend)
    hidden_states, rows = counted_rows(hidden_states, labels, ignore_index, backend)
    width = forward_width(head, rows, workspace_bytes, backend)
    partials = ops.linear_logps_fwd(hidden_states, head, rows, width, wanted=Wanted(entropy))
    return ops.contrast_fwd(partials, rows, completions)
