"""Products with the compact tile: out = scale * (values^T source[entries] + dropped mean^T), block by block.

    dX: source is the head's weight, a block's list its significant columns
    dW: source is the scaled hidden states, a block's list its significant rows; the tile's factors among the scales
        where the values are those of the tile
    mean: the average row of the source over what was left out

Output-stationary: each element is written once, summed over the slots in their order, in float32. Where the compact
tile overflowed the result is 0, and `dense_product` adds what is exact; elsewhere that one does nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import device_kind
from copg_kernels.kernels.compact_tile import Pool
from copg_kernels.kernels.count_significant import BLOCK
from copg_kernels.kernels.language import FENCES_COPIES, NO_FUSION, jit, tl, triton

# By bytes per element: in float32 the other half of the registers goes to addresses.
BLOCK_H = {2: 128, 4: 64}
# Slots per step. Each step computes addresses: of 16 bits that is most of its instructions, in float32 few beside those
# that split the operands.
BLOCK_K = {2: 64, 4: 32}


@jit
def _gather_product_kernel(
    entries_ptr,  # (slots,) int32
    values_ptr,  # (slots, BLOCK), or the tile (entries, members)
    offsets_ptr,  # (blocks + 1,) int32
    order_ptr,  # (blocks,) int32
    overflow_ptr,  # (1,) int32
    source_ptr,  # (entries, H)
    dropped_ptr,  # (members,) float32
    mean_ptr,  # (H,) float32
    scale_ptr,  # (members,) float32, or None
    out_ptr,  # (members, H)
    num_members,
    H,
    stride_values,
    stride_source,
    IN_TILE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. My block and its slots; none where they overflowed.
    block = tl.load(order_ptr + tl.program_id(0))
    is_compact = 1 - tl.load(overflow_ptr)
    start = tl.load(offsets_ptr + block)
    stop = start + (tl.load(offsets_ptr + block + 1) - start) * is_compact
    offs_i = tl.arange(0, BLOCK)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    column, mask_column = offs_i, offs_i >= 0
    if IN_TILE:
        # The vocabulary, padded: whole vectors are within the mask or beyond it.
        column = block * BLOCK + offs_i
        mask_column = column < tl.cdiv(num_members, 16) * 16

    # 2. values^T times the gathered rows.
    acc = tl.zeros((BLOCK, BLOCK_H), dtype=tl.float32)
    for first in range(start, stop, BLOCK_K):
        slots = first + tl.arange(0, BLOCK_K)
        mask_k = slots < stop
        index = tl.load(entries_ptr + slots, mask=mask_k, other=0).to(tl.int64)
        row = index if IN_TILE else slots.to(tl.int64)
        values_ptrs = values_ptr + row[None, :] * stride_values + column[:, None]
        values = tl.load(values_ptrs, mask=mask_k[None, :] & mask_column[:, None], other=0.0)
        source_ptrs = source_ptr + index[:, None] * stride_source + offs_h[None, :]
        gathered = tl.load(source_ptrs, mask=mask_k[:, None] & mask_h[None, :], other=0.0)
        acc = tl.dot(values, gathered, acc, input_precision=PRECISION)

    # 3. What was left out, the scale, and the one write.
    members = (block * BLOCK + offs_i).to(tl.int64)
    mask_i = members < num_members
    dropped = tl.load(dropped_ptr + members, mask=mask_i, other=0.0) * is_compact
    acc += dropped[:, None] * tl.load(mean_ptr + offs_h, mask=mask_h, other=0.0)[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + members, mask=mask_i, other=0.0)[:, None]
    out_ptrs = out_ptr + members[:, None] * H + offs_h[None, :]
    mask = mask_i[:, None] & mask_h[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc, mask=mask)


def block_width(source: Tensor) -> int:
    """BLOCK_H for this source; less where its elements are loaded one by one."""
    return BLOCK_H[source.element_size()] if source.stride(0) % 16 == 0 else 32


def launch_options(device: torch.device) -> dict[str, int]:
    """Compile options. Left alone, Triton 3.6's assembler gives float32 on sm_80 32 registers and spills the rest."""
    kind, options = device_kind(device), dict(num_warps=8) | NO_FUSION
    if kind != "gfx942":
        options |= dict(maxnreg=255)
    if kind in ("sm_90", "sm_100") and not FENCES_COPIES:
        # Through registers then, with a fence, but one load after the other.
        options |= dict(num_stages=1)
    return options


def gather_product(
    pool: Pool, source: Tensor, mean: Tensor, scale: Tensor | None, out: Tensor, precision: str, *, add: bool
) -> None:
    """Compact tile, (entries, H), (H,), (members,) -> out (members, H), or added to it."""
    members, H = out.shape
    assert out.is_contiguous() and source.stride(1) == 1
    block_h = block_width(source)
    _gather_product_kernel[(triton.cdiv(members, BLOCK), triton.cdiv(H, block_h))](
        pool.entries, pool.values, pool.offsets, pool.order, pool.overflow, source, pool.dropped, mean, scale, out,
        members, H, pool.values.stride(0), source.stride(0), IN_TILE=pool.in_tile,
        ADD=add, PRECISION=precision, BLOCK=BLOCK, BLOCK_H=block_h, BLOCK_K=BLOCK_K[source.element_size()],
        **launch_options(out.device),
    )  # fmt: skip
