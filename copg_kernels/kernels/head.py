"""The head's logits, one tile at a time: the only place where hidden states meet the head's weight.

    z = cap(logit_scale * (x W^T + bias)) / temperature,    cap(u) = softcap * tanh(u / softcap)

The Triton tile keeps its float32 accumulator in registers; the torch twin writes it into a bounded workspace. Forward
and backward call the same tile, so a recomputed logit has the bits of the first one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import Blocks
from copg_kernels.kernels.language import TensorDescriptor, jit, tl


class Head(NamedTuple):
    """How logits come out of hidden states."""

    weight: Tensor  # (V, H), rows contiguous
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    temperature: float

    @property
    def slope(self) -> float:
        """dz/du without the cap's derivative: what a gradient picks up on its way to x W^T + bias."""
        return self.logit_scale / self.temperature


@jit
def head_product(
    hidden_ptr,  # (T, H)
    row_offsets,  # [BLOCK_N] int64, offsets of the tile's rows in hidden_ptr
    weight,  # (V, H): a tensor descriptor, or a pointer
    tile,  # vocabulary tile index
    V,
    H,
    stride_weight,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """x W^T of one tile, as two [BLOCK_N, BLOCK_V / 2] float32 halves; columns past V hold no logits.

    In halves, because an epilogue over 128 accumulator registers per thread would spill.
    """
    # Clamped instead of masked: the loads stay plain asynchronous copies, and the caller masks columns once.
    offs_w = tl.minimum(tile * BLOCK_V + tl.arange(0, BLOCK_V), V - 1).to(tl.int64) * stride_weight
    offs_h = tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start_h in range(0, H, BLOCK_H):
        columns = (start_h + offs_h)[None, :]
        hidden_ptrs = hidden_ptr + row_offsets[:, None] + columns
        if EVEN_H:
            x = tl.load(hidden_ptrs)
        else:
            x = tl.load(hidden_ptrs, mask=columns < H, other=0.0)
        if USE_TMA:
            w = weight.load([tile * BLOCK_V, start_h])
        elif EVEN_H:
            w = tl.load(weight + offs_w[:, None] + columns)
        else:
            w = tl.load(weight + offs_w[:, None] + columns, mask=columns < H, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
    part0, part1 = tl.split(tl.permute(tl.reshape(left, (BLOCK_N, 2, BLOCK_V // 4)), (0, 2, 1)))
    part2, part3 = tl.split(tl.permute(tl.reshape(right, (BLOCK_N, 2, BLOCK_V // 4)), (0, 2, 1)))
    return part0, part1, part2, part3


@jit
def finish_logits(
    product,  # [BLOCK_N, BLOCK_C] float32
    bias_ptr,  # (V,)
    start_v,  # vocabulary entry of its first column
    V,
    logit_scale,
    inv_softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Product -> z; -inf past V."""
    offs_c = tl.arange(0, product.shape[1])
    if HAS_BIAS:
        bias = tl.load(bias_ptr + start_v + offs_c, mask=offs_c < V - start_v, other=0.0)
        product += bias.to(tl.float32)[None, :]
    if HAS_CAP:
        # tanh(u) = 1 - 2 / (exp(2u) + 1): exp(2u) = inf gives 1, and 0 gives -1.
        tanh = 1.0 - 2.0 / (tl.exp(product * (2.0 * logit_scale * inv_softcap)) + 1.0)
        z = tanh * (inv_temperature / inv_softcap)
    else:
        z = product * (logit_scale * inv_temperature)
    return tl.where((offs_c < V - start_v)[None, :], z, float("-inf"))


@jit
def cap_slope(z, inv_softcap, inv_temperature):
    """Derivative of the cap, 1 - tanh^2, from the finished logit."""
    tanh = z * (inv_softcap / inv_temperature)
    return (1.0 - tanh) * (1.0 + tanh)


def tile_arguments(hidden_states: Tensor, head: Head, blocks: Blocks) -> dict:
    """Keyword arguments of a kernel around `head_product` that follow from the operands."""
    V, H = head.weight.shape
    use_tma = blocks.use_tma and _fits_tma(head.weight)
    weight = head.weight
    if use_tma:
        weight = TensorDescriptor.from_tensor(weight, [blocks.BLOCK_V, blocks.BLOCK_H])
    return dict(
        hidden_ptr=hidden_states,
        stride_hidden=hidden_states.stride(0),
        weight=weight,
        bias_ptr=head.bias,
        V=V,
        H=H,
        stride_weight=head.weight.stride(0),
        logit_scale=float(head.logit_scale),
        inv_softcap=0.0 if head.softcap is None else 1.0 / head.softcap,
        inv_temperature=1.0 / head.temperature,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.softcap is not None,
        USE_TMA=use_tma,
        EVEN_H=H % blocks.BLOCK_H == 0,
        PRECISION=blocks.precision,
        BLOCK_N=blocks.BLOCK_N,
        BLOCK_V=blocks.BLOCK_V,
        BLOCK_H=blocks.BLOCK_H,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def _fits_tma(weight: Tensor) -> bool:
    """A tensor descriptor needs a base and a row stride in multiples of 16 bytes."""
    return weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0


def logits_tile_torch(hidden_states: Tensor, head: Head, start: int, stop: int, out: Tensor) -> Tensor | None:
    """Twin of `head_product` and `finish_logits`: z[:, start:stop] into out; returns the cap's derivative, if any."""
    weight = head.weight[start:stop].to(out.dtype)
    if head.bias is None:
        torch.mm(hidden_states, weight.T, out=out)
    else:
        torch.addmm(head.bias[start:stop].to(out.dtype), hidden_states, weight.T, out=out)
    if head.softcap is None:
        if head.slope != 1.0:
            out.mul_(head.slope)
        return None
    out.mul_(head.logit_scale / head.softcap)
    slope = out.cosh().square_().reciprocal_()
    out.tanh_().mul_(head.softcap / head.temperature)
    return slope
