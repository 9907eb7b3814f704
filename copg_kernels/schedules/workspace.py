"""How much memory a schedule may take above its inputs and outputs, and what it does with it."""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import SPLIT_TORCH
from copg_kernels.kernels.head import row_stride
from copg_kernels.schedules.tile_ops import accumulation_dtype, operand_dtype, vocab_step
from copg_kernels.tuned import settings_of

# On a CPU the logits of 1,024 tokens of a 32,000-entry vocabulary, so that closed groups of 2 x 256 tokens go two at a
# time.
_DEFAULT_BYTES = {"triton": 2**30, "torch": 128 * 2**20}
# Each chunk reads and writes all of dW in float32. At this size of a chunk that is 5 % of its products on an H200,
# whatever the head (computed, not yet measured).
_TOKENS_PER_CHUNK = 4096


def default_workspace_bytes(backend: str, weight: Tensor | None = None) -> int:
    """The budget where the caller names none: on a GPU 1 GiB, or what 4,096 tokens of this head's vocabulary need.

    The tuned one, where there is one.
    """
    least = _DEFAULT_BYTES[backend]
    if weight is None or backend == "torch":
        return least
    tuned = settings_of(weight).workspace_bytes
    if tuned is not None:
        return tuned
    per_token = kept_bytes_per_token(weight.shape[0], weight.dtype, weight.device, backend)
    return max(least, _TOKENS_PER_CHUNK * per_token)


def bytes_per_entry(num_rows: int, hidden_size: int, dtype: torch.dtype, backend: str) -> int:
    """Workspace of one vocabulary entry in the backward pass: its column of the tile, its row of dW before rounding
    (float16, and 16-bit operands of the twins) and, in these twins, its row of the weight in float32."""
    operand = operand_dtype(dtype, backend)
    float32_rows = (dtype != accumulation_dtype(dtype) and (dtype != operand or dtype == torch.float16)) + (
        dtype != operand
    )
    return num_rows * operand.itemsize + float32_rows * hidden_size * 4


def kept_bytes_per_token(vocab_size: int, dtype: torch.dtype, device: torch.device, backend: str) -> int:
    """Workspace of one token whose exponentials are kept: its row of the tile and, in the kernels, the statistics of
    each of its tiles."""
    if backend == "torch":
        return vocab_size * accumulation_dtype(dtype).itemsize
    num_tiles = -(-vocab_size // vocab_step(device, dtype, backend))
    return row_stride(vocab_size) * dtype.itemsize + num_tiles * 8


def balanced(num_tokens: int, most_tokens: int) -> int:
    """Tokens per chunk, most_tokens at most: no more chunks than that takes, and none of them a small rest.

    A multiple of 256 where there is room for it: GEMMs are fastest on whole tiles.
    """
    chunks = max(1, -(-num_tokens // most_tokens))
    tokens = -(-num_tokens // chunks)
    whole_tiles = -(-tokens // 256) * 256
    return max(1, whole_tiles if whole_tiles <= most_tokens else tokens)


def kept_elements(num_tokens: int, vocab_size: int, backend: str) -> int:
    """Elements of the tile of so many tokens."""
    return num_tokens * (vocab_size if backend == "torch" else row_stride(vocab_size))


def tile_in(workspace: Tensor, num_rows: int, width: int, backend: str) -> Tensor:
    """(num_rows, width) at the start of the flat workspace, its rows as far apart as the backend wants them."""
    stride = width if backend == "torch" else row_stride(width)
    return workspace[: num_rows * stride].view(num_rows, stride)[:, :width]


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
    """Vocabulary entries per slice: as many whole steps as the budget holds, and the twins' split at most.

    The twins' forward pass takes the same slices of the same rows, so that a logit which is computed again has the bits
    of the first one: a GEMM of another shape may sum in another order, and at logits of 4e4 that is 4e-3 of a
    probability.
    """
    V, H = head_shape
    step = vocab_step(device, dtype, backend)
    entries = workspace_bytes // max(1, bytes_per_entry(num_rows, H, dtype, backend))
    most = V if backend == "triton" else min(V, SPLIT_TORCH)
    return min(most, max(step, entries // step * step))
