"""The head's logits, one tile at a time: the only place where hidden states meet the head's weight.

    z = cap(logit_scale * (x W^T + bias)) / temperature,    cap(u) = softcap * tanh(u / softcap)

The Triton tile keeps its float32 accumulator in registers; the torch twin writes it into a bounded workspace. Forward
and backward call the same tile, the twin on the same rows and slices (`workspace.slice_width`), so a recomputed logit
has the bits of the first one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.blocks import Blocks
from copg_kernels.kernels.language import LOG2_E, NO_FUSION, TensorDescriptor, jit, tl


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
def head_logits(
    hidden,  # (R, H), packed: a tensor descriptor, or a pointer; None where the product is there
    product_ptr,  # (R, width) float32, or None where the kernel multiplies
    start_n,  # first of the tile's rows
    weight,  # (V, H): a tensor descriptor, or a pointer; None like hidden
    bias_ptr,  # (V,), or None
    tile,  # vocabulary tile index
    first_tile,  # vocabulary tile with which the product starts
    R,
    V,
    H,
    stride_weight,
    stride_product,
    logit_scale,
    inv_softcap,
    inv_temperature,
    BIAS_ON_ACC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z of one tile, as four [BLOCK_N, BLOCK_V / 4] float32 parts side by side; past V so low that exp(z) = 0.

    In parts, because an epilogue over 128 accumulator registers per thread would spill.
    """
    STEP: tl.constexpr = BLOCK_V // 4
    start = tile * BLOCK_V
    if product_ptr is None:
        acc = _multiply(
            hidden, start_n, weight, tile, R, V, H, stride_weight,
            USE_TMA, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        if BIAS_ON_ACC:
            offs_v = start + tl.arange(0, BLOCK_V)
            acc += tl.load(bias_ptr + tl.minimum(offs_v, V - 1)).to(tl.float32)[None, :]
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
        part0, part1 = tl.split(tl.permute(tl.reshape(left, (BLOCK_N, 2, BLOCK_V // 4)), (0, 2, 1)))
        part2, part3 = tl.split(tl.permute(tl.reshape(right, (BLOCK_N, 2, BLOCK_V // 4)), (0, 2, 1)))
    else:
        product_ptr -= first_tile * BLOCK_V  # so that an entry's index is that of its column
        part0 = _read(product_ptr, start_n, start, R, V, stride_product, EVEN_V, BLOCK_N, STEP)
        part1 = _read(product_ptr, start_n, start + STEP, R, V, stride_product, EVEN_V, BLOCK_N, STEP)
        part2 = _read(product_ptr, start_n, start + 2 * STEP, R, V, stride_product, EVEN_V, BLOCK_N, STEP)
        part3 = _read(product_ptr, start_n, start + 3 * STEP, R, V, stride_product, EVEN_V, BLOCK_N, STEP)
    # fmt: off
    BIAS_ON_PART: tl.constexpr = bias_ptr is not None and not BIAS_ON_ACC
    z0 = _finish(part0, bias_ptr, start, V, logit_scale, inv_softcap, inv_temperature,
                 BIAS_ON_PART, HAS_SCALE, HAS_CAP, EVEN_V)
    z1 = _finish(part1, bias_ptr, start + STEP, V, logit_scale, inv_softcap, inv_temperature,
                 BIAS_ON_PART, HAS_SCALE, HAS_CAP, EVEN_V)
    z2 = _finish(part2, bias_ptr, start + 2 * STEP, V, logit_scale, inv_softcap, inv_temperature,
                 BIAS_ON_PART, HAS_SCALE, HAS_CAP, EVEN_V)
    z3 = _finish(part3, bias_ptr, start + 3 * STEP, V, logit_scale, inv_softcap, inv_temperature,
                 BIAS_ON_PART, HAS_SCALE, HAS_CAP, EVEN_V)
    # fmt: on
    return z0, z1, z2, z3


@jit
def _multiply(
    hidden,
    start_n,
    weight,
    tile,
    R,
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
    """x W^T of one tile, [BLOCK_N, BLOCK_V] float32; of rows and columns that do not exist, those of the last."""
    # Clamped instead of masked: the loads stay plain asynchronous copies, and the caller masks columns once.
    offs_x = tl.minimum(start_n + tl.arange(0, BLOCK_N), R - 1).to(tl.int64) * H
    offs_w = tl.minimum(tile * BLOCK_V + tl.arange(0, BLOCK_V), V - 1).to(tl.int64) * stride_weight
    offs_h = tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start_h in range(0, H, BLOCK_H):
        columns = (start_h + offs_h)[None, :]
        if USE_TMA:
            x = hidden.load([start_n, start_h])
            w = weight.load([tile * BLOCK_V, start_h])
        elif EVEN_H:
            x = tl.load(hidden + offs_x[:, None] + columns)
            w = tl.load(weight + offs_w[:, None] + columns)
        else:
            x = tl.load(hidden + offs_x[:, None] + columns, mask=columns < H, other=0.0)
            w = tl.load(weight + offs_w[:, None] + columns, mask=columns < H, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@jit
def _read(
    product_ptr,
    start_n,
    start_v,
    R,
    V,
    stride_product,
    EVEN_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_N, BLOCK_C] of a product that is there, 0 where there is none."""
    offs_n, offs_v = start_n + tl.arange(0, BLOCK_N), start_v + tl.arange(0, BLOCK_C)
    mask = (offs_n < R)[:, None]
    if not EVEN_V:
        mask &= (offs_v < V)[None, :]
    return tl.load(product_ptr + offs_n.to(tl.int64)[:, None] * stride_product + offs_v[None, :], mask=mask, other=0.0)


@jit
def _finish(
    product,  # [BLOCK_N, BLOCK_C] float32
    bias_ptr,
    start_v,  # vocabulary entry of its first column
    V,
    logit_scale,
    inv_softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """Product -> z; past V so low that exp(z) = 0."""
    offs_c = tl.arange(0, product.shape[1])
    z = product
    if HAS_BIAS:
        z += tl.load(bias_ptr + start_v + offs_c, mask=offs_c < V - start_v, other=0.0).to(tl.float32)[None, :]
    if HAS_CAP:
        # tanh(u) = 1 - 2 / (exp(2u) + 1): exp(2u) = inf gives 1, and 0 gives -1.
        tanh = 1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2_E * logit_scale * inv_softcap)) + 1.0)
        z = tanh * (inv_temperature / inv_softcap)
    elif HAS_SCALE:
        z *= logit_scale * inv_temperature
    if not EVEN_V:
        z = tl.where((offs_c < V - start_v)[None, :], z, lowest_logit(inv_softcap, inv_temperature, HAS_CAP))
    return z


@jit
def lowest_logit(inv_softcap, inv_temperature, HAS_CAP: tl.constexpr):
    """What stands for a logit whose exponential is 0.

    It is finite under a cap: the exponential of -inf is 0, the cap's derivative there infinite, and their product NaN.
    """
    return -1e15 * (inv_temperature / inv_softcap) if HAS_CAP else float("-inf")


@jit
def cap_slope(z, inv_softcap, inv_temperature):
    """Derivative of the cap, 1 - tanh^2, from the finished logit; finite past V."""
    tanh = z * (inv_softcap / inv_temperature)
    return (1.0 - tanh) * (1.0 + tanh)


@jit
def store_part(
    tile,  # (R, padded width): a tensor descriptor, or a pointer
    value,  # [BLOCK_N, BLOCK_C] float32, rounded as it is stored
    start_n,
    start_c,
    R,
    padded_width,
    stride_tile,
    USE_TMA: tl.constexpr,
):
    """value -> tile[start_n:, start_c:], within its bounds."""
    if USE_TMA:
        tile.store([start_n, start_c], value)
    else:
        offs_n, offs_c = tl.arange(0, value.shape[0]), start_c + tl.arange(0, value.shape[1])
        mask = (start_n + offs_n < R)[:, None] & (offs_c < padded_width)[None, :]
        # 64 bits to the block of rows, 32 within it: 64-bit addresses of every element would spill.
        block = tile + tl.cast(start_n, tl.int64) * stride_tile
        tl.store(block + (offs_n[:, None] * stride_tile + offs_c[None, :]), value, mask=mask)


def tile_arguments(hidden_states: Tensor, head: Head, blocks: Blocks, start: int, product: Tensor | None) -> dict:
    """Keyword arguments of a kernel around `head_logits` that follow from the operands, packed rows (R, H) first.

    start is the vocabulary entry of the first tile, and product x W^T from there on, where it is not the kernel's job.
    """
    (R, H), V = hidden_states.shape, head.weight.shape[0]
    assert hidden_states.is_contiguous()
    hidden, weight = (hidden_states, head.weight) if product is None else (None, None)
    if product is None and blocks.use_tma:
        hidden = TensorDescriptor.from_tensor(hidden, [blocks.BLOCK_N, blocks.BLOCK_H])
        weight = TensorDescriptor.from_tensor(weight, [blocks.BLOCK_V, blocks.BLOCK_H])
    return dict(
        hidden=hidden,
        product_ptr=product,
        weight=weight,
        bias_ptr=head.bias,
        first_tile=start // blocks.BLOCK_V,
        R=R,
        V=V,
        H=H,
        stride_weight=head.weight.stride(0),
        stride_product=0 if product is None else product.stride(0),
        logit_scale=float(head.logit_scale),
        inv_softcap=0.0 if head.softcap is None else 1.0 / head.softcap,
        inv_temperature=1.0 / head.temperature,
        BIAS_ON_ACC=head.bias is not None and blocks.bias_on_acc,
        HAS_SCALE=head.slope != 1.0,
        HAS_CAP=head.softcap is not None,
        USE_TMA=blocks.use_tma,
        EVEN_V=V % blocks.BLOCK_V == 0,
        EVEN_H=blocks.use_tma or H % blocks.BLOCK_H == 0,
        PRECISION=blocks.precision,
        BLOCK_N=blocks.BLOCK_N,
        BLOCK_V=blocks.BLOCK_V,
        BLOCK_H=blocks.BLOCK_H,
        **compile_options(blocks),
    )


def compile_options(blocks: Blocks) -> dict:
    """The same for every kernel around `head_logits`: else the bits of a logit would depend on the kernel."""
    options = dict(num_warps=blocks.num_warps, num_stages=blocks.num_stages) | NO_FUSION
    return options if blocks.max_registers is None else options | dict(maxnreg=blocks.max_registers)


def out_arguments(tile: Tensor, blocks: Blocks) -> dict:
    """Keyword arguments of a kernel that writes `tile`, as `padded` makes it, by `store_part`."""
    out = TensorDescriptor.from_tensor(tile, [blocks.BLOCK_N, blocks.BLOCK_V // 4]) if blocks.use_tma else tile
    return dict(tile=out, padded_width=tile.shape[1], stride_tile=tile.stride(0))


def row_stride(width: int) -> int:
    """Elements from one row of a tile to the next: a GEMM library is slow on rows that are not aligned, and stores of
    single elements would need more registers than there are."""
    return -(-width // 64) * 64


def padded(tile: Tensor) -> Tensor:
    """(R, width), rows of `row_stride` -> the same with the columns past its width that kernels write: zeros."""
    R, width = tile.shape
    return tile.as_strided((R, -(-width // 16) * 16), tile.stride())


def logits_tile_torch(hidden_states: Tensor, head: Head, start: int, stop: int, out: Tensor) -> Tensor | None:
    """Twin of `head_logits`: z[:, start:stop] into out; returns the cap's derivative, if any."""
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


def finish_torch(product: Tensor, head: Head) -> Tensor:
    """x W^T + bias -> z, out of place: for a few numbers."""
    z = product * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature
