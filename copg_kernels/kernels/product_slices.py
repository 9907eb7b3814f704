"""The other way to the head's logits: cuBLAS multiplies, a slice of the vocabulary at a time, in float32.

The kernels then read the product instead of computing it, and do the rest as ever. A float32 number is written and read
once more per logit, in exchange for a GEMM that nobody has to tune, and that can use what Triton does not know of a
GPU. Which way is faster is the GPU's to say (`copg_kernels.tune`).

A product's bits may depend on the number of rows, as cuBLAS chooses its algorithm by it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import Blocks, device_kind, head_blocks
from copg_kernels.kernels.matmul import mm_fp32
from copg_kernels.tuned import settings_of

# 8,192 columns of 8,192 rows: enough for a GEMM at full speed. Much less would be read from the L2, and multiplied
# slower. Where rows are so many that this is less than one split, a split is taken.
SLICE_BYTES = 2**28


def way_of(weight: Tensor, path: str) -> str:
    """ "fused" or "sliced", for the path "logps" or "loss" of `tuned.Settings`."""
    way = getattr(settings_of(weight), path)
    if way == "sliced" and weight.is_cuda and weight.dtype == torch.float32 and _drops_digits():
        return "fused"  # which keeps them all
    return way


def _drops_digits() -> bool:
    """Whether torch.mm may take TF32, 10 of a float32's 23 bits. `allow_tf32` raises where it was set by this name."""
    return torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none")


def blocks_of(weight: Tensor, way: str, *, many_numbers: bool = False) -> Blocks:
    """The entry that kernels take: of a kernel that only reads, a tile that is small and as wide.

    many_numbers: of a kernel that computes all of `Wanted`. Where operands come through registers, these do not suffice
    for as many rows as in the widest tiles. A logit does not depend on the rows beside it.
    """
    blocks = head_blocks(weight)
    # Left alone, the assembler aims at an occupancy that it has to spill for.
    most_registers = 128 if way == "sliced" else 255
    registers = None if device_kind(weight.device) in ("gfx942", "interpreter") else most_registers
    if way == "fused" and many_numbers and blocks.BLOCK_N > 64 and not blocks.use_tma:
        return blocks._replace(BLOCK_N=blocks.BLOCK_N // 2, max_registers=registers)
    if way == "fused":
        return blocks
    return blocks._replace(
        BLOCK_N=min(blocks.BLOCK_N, 32),
        num_warps=4,
        num_stages=1,
        use_tma=False,
        bias_on_acc=False,
        max_registers=registers,
    )


def products(
    hidden_states: Tensor, weight: Tensor, start: int, stop: int, blocks: Blocks, way: str
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Slices of [start, stop): where each starts and stops, and x W^T of it, (R, width) float32; fused, one without.

    Slices are whole splits of the vocabulary. Each is overwritten by the next.
    """
    if way == "fused":
        yield start, stop, None
        return
    num_rows, split = hidden_states.shape[0], blocks.BLOCK_V * blocks.tiles_per_split
    width = max(1, SLICE_BYTES // (4 * max(1, num_rows) * split)) * split
    memory = hidden_states.new_empty((num_rows * min(width, stop - start),), dtype=torch.float32)
    for first in range(start, stop, width):
        last = min(first + width, stop)
        out = memory[: num_rows * (last - first)].view(num_rows, last - first)
        yield first, last, mm_fp32(hidden_states, weight[first:last].T, out)
