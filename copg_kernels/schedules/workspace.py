"""How much memory a schedule may take above its inputs and outputs, and what it does with it."""

from __future__ import annotations

import torch

from copg_kernels.schedules.tile_ops import accumulation_dtype, operand_dtype, vocab_step

# Large enough that a slice of the vocabulary keeps the GEMMs at full speed, small against the logits it replaces:
# 16,384 tokens of a 4,096-wide bf16 head get slices of 10,752 entries. On a CPU it holds the logits of 1,024 tokens of
# a 32,000-entry vocabulary, so that closed groups of 2 x 256 tokens go two at a time.
_DEFAULT_BYTES = {"triton": 512 * 2**20, "torch": 128 * 2**20}


def default_workspace_bytes(backend: str) -> int:
    """The budget where the caller names none."""
    return _DEFAULT_BYTES[backend]


def bytes_per_entry(num_rows: int, hidden_size: int, dtype: torch.dtype, backend: str) -> int:
    """Workspace of one vocabulary entry in the backward pass: its column of the tile and, for 16-bit operands, its row
    of dW before rounding and (in the twins) its row of the weight in float32."""
    operand = operand_dtype(dtype, backend)
    float32_rows = (dtype != accumulation_dtype(dtype)) + (dtype != operand)
    return num_rows * operand.itemsize + float32_rows * hidden_size * 4


def least_workspace_bytes(
    num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device, backend: str
) -> int:
    """The smallest budget that works: one step of the vocabulary for all rows."""
    return bytes_per_entry(num_rows, hidden_size, dtype, backend) * vocab_step(device, dtype, backend)


def slice_width(
    workspace_bytes: int,
    num_rows: int,
    head_shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> int:
    """Vocabulary entries per slice: as many whole steps as the budget holds."""
    V, H = head_shape
    step = vocab_step(device, dtype, backend)
    entries = workspace_bytes // bytes_per_entry(num_rows, H, dtype, backend)
    return min(V, max(step, entries // step * step))
