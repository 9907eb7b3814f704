"""Gradients from a compact softmax: no logit twice, any upstream gradient, any grouping; a few percent of two units.

    forward    logits once; of each block their significant entries stay, with the mass of the others
    backward   products with these entries and gathered rows of W and X, plus one rank-1 term for that mass

Found while logits stream by in `sparse_rows` (torch backend), in tiles that are compacted in `sparse_tiles` (kernels).
What does not become compact is computed exactly.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.schedules import sparse_rows, sparse_tiles
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.tile_ops import tile_ops


class Sparsity(NamedTuple):
    """What became of the softmax's entries."""

    density: Tensor  # () share of them that is kept, rows that overflowed left out
    dropped: Tensor  # () mass a row loses, on average
    overflow: Tensor  # () share of rows that were computed exactly


def token_logps(
    hidden_states: Tensor, head: Head, labels: Tensor, needs: Needs, *, backend: str, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """(T, H), (T,) -> per_token_logps (T,), lse (2, T), and the compact softmax for `token_logps_bwd`."""
    partials, rows, compact = _schedule(backend).compact_rows(
        hidden_states, head, labels, needs, give_up=False, **options
    )
    return *tile_ops(backend).merge_splits_fwd(partials, rows), compact


def token_logps_bwd(*operands: Any, backend: str, **options: Any) -> Gradients:
    """dlogps, hidden_states, head, labels, per_token_logps, lse, compact, needs -> gradients; empty: not needed."""
    return _schedule(backend).token_logps_bwd(*operands, **options)


def copg(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    completions: Completions,
    ignore_index: int,
    needs: Needs,
    *,
    sparse_eps: float,
    workspace_bytes: int,
    backend: str,
) -> tuple[Contrast, Gradients, Tensor] | None:
    """Contrast, gradients of its loss, statistics; None where nothing is compact, so that exact ones cost less."""
    options = dict(ignore_index=ignore_index, workspace_bytes=workspace_bytes)
    found = _schedule(backend).compact_rows(
        hidden_states, head, labels, needs, sparse_eps=sparse_eps, give_up=True, **options
    )
    if found is None:
        return None
    partials, rows, compact = found
    contrast = tile_ops(backend).contrast_fwd(partials, rows, completions)
    coefficients = torch.repeat_interleave(
        contrast.coefficients, completions.cu_seqlens.diff(), output_size=labels.numel()
    )
    operands = (coefficients, hidden_states, head, labels, contrast.per_token_logps, contrast.lse, compact, needs)
    gradients = token_logps_bwd(*operands, backend=backend, **options)
    return contrast, gradients, statistics(compact, head.weight.shape[0], backend)


def statistics(compact: Any, vocab_size: int, backend: str) -> Tensor:
    """(3,): see Sparsity."""
    return _schedule(backend).statistics(compact, vocab_size)


def _schedule(backend: str) -> ModuleType:
    return {"torch": sparse_rows, "triton": sparse_tiles}[backend]
