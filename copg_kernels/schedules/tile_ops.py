"""The tile operations a schedule is made of, once as Triton kernels and once as their torch twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import vocab_block
from copg_kernels.kernels.contrast import contrast_fwd, contrast_fwd_torch
from copg_kernels.kernels.exp_tile import exp_tiles, exp_tiles_torch
from copg_kernels.kernels.linear_logps_fwd import linear_logps_fwd, linear_logps_fwd_torch
from copg_kernels.kernels.merge_splits import merge_splits_fwd, merge_splits_fwd_torch
from copg_kernels.kernels.pack_rows import PackedRows, pack_rows
from copg_kernels.kernels.place_labels import place_labels, place_labels_torch
from copg_kernels.kernels.scale_rows import scale_packed, scale_packed_torch, scale_rows, scale_rows_torch
from copg_kernels.kernels.softmax_minus_label import softmax_minus_label, softmax_minus_label_torch
from copg_kernels.kernels.token_statistics import token_statistics_fwd, token_statistics_fwd_torch


class TileOps(NamedTuple):
    """One implementation of every tile operation."""

    linear_logps_fwd: Callable
    merge_splits_fwd: Callable
    token_statistics_fwd: Callable
    contrast_fwd: Callable
    exp_tiles: Callable
    place_labels: Callable
    softmax_minus_label: Callable
    scale_rows: Callable
    scale_packed: Callable


_TRITON = TileOps(
    linear_logps_fwd,
    merge_splits_fwd,
    token_statistics_fwd,
    contrast_fwd,
    exp_tiles,
    place_labels,
    softmax_minus_label,
    scale_rows,
    scale_packed,
)
_TORCH = TileOps(
    linear_logps_fwd_torch,
    merge_splits_fwd_torch,
    token_statistics_fwd_torch,
    contrast_fwd_torch,
    exp_tiles_torch,
    place_labels_torch,
    softmax_minus_label_torch,
    scale_rows_torch,
    scale_packed_torch,
)


def tile_ops(backend: str) -> TileOps:
    """ "triton" or "torch", already resolved."""
    return {"triton": _TRITON, "torch": _TORCH}[backend]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 operands, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients wait in for the backward pass: float16 has no room for them before a loss scale."""
    return torch.float32 if dtype == torch.float16 else dtype


def can_keep_tiles(dtype: torch.dtype, backend: str) -> bool:
    """Whether a tile of exponentials can be kept: not in the kernels' float16, see exp_tile."""
    return not (backend == "triton" and dtype == torch.float16)


def operand_dtype(dtype: torch.dtype, backend: str) -> torch.dtype:
    """What the GEMMs multiply: the operands themselves on tensor cores, the accumulation dtype in the twins."""
    return dtype if backend == "triton" else accumulation_dtype(dtype)


def counted_rows(hidden_states: Tensor, labels: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, PackedRows]:
    """The rows as the backend's tile operations want them.

    Both get them packed. Kernels read their number on the device, the twins get these rows alone.
    """
    rows = pack_rows(labels, ignore_index, exact=backend == "torch")
    if backend == "triton":
        return pack_hidden(hidden_states, rows), rows
    if rows.row_index.numel() < labels.numel():
        hidden_states = hidden_states.index_select(0, rows.row_index)
    return hidden_states.to(accumulation_dtype(hidden_states.dtype)), rows


def pack_hidden(hidden_states: Tensor, rows: PackedRows) -> Tensor:
    """(T, H) -> (R, H) in packed order, 0 for the ignored rows at the end, whatever they hold."""
    counted = torch.arange(rows.row_index.numel(), device=hidden_states.device) < rows.num_rows
    return scale_rows(hidden_states, rows.row_index, counted.float(), hidden_states.dtype)


def vocab_step(device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Slices of the vocabulary start at multiples of this."""
    return vocab_block(device, dtype) if backend == "triton" else 256
