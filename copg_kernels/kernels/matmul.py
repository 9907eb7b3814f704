"""Tensor-core products with a float32 result: cuBLAS (or MKL) does these better than a kernel of ours.

Operands may be float32, bfloat16 or float16; the sum and the result are float32 (float64 for float64 operands).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

_lock = Lock()
_before: list[tuple] = []


@contextmanager
def sums_in_full() -> Iterator[None]:
    """Within, cuBLAS sums in float32 to the end: split over K it would add partial sums in 16 bits, which torch allows.

    The settings are the process's. They come back when the last thread leaves.
    """
    with _lock:
        _before.append(_shortcuts())
        (_, bfloat16_split_k), (_, float16_split_k), _ = _before[0]
        _allow((False, bfloat16_split_k), (False, float16_split_k), False)
    try:
        yield
    finally:
        with _lock:
            settings = _before.pop()
            if not _before:
                _allow(*settings)


def _shortcuts() -> tuple[tuple[bool, bool], tuple[bool, bool], bool]:
    """Reductions in bfloat16 and in float16, each with whether K may be split, and accumulation in float16."""
    cublas = torch.backends.cuda.matmul
    return (
        (cublas.allow_bf16_reduced_precision_reduction, cublas.allow_bf16_reduced_precision_reduction_split_k),
        (cublas.allow_fp16_reduced_precision_reduction, cublas.allow_fp16_reduced_precision_reduction_split_k),
        cublas.allow_fp16_accumulation,
    )


def _allow(bfloat16: tuple[bool, bool], float16: tuple[bool, bool], accumulation: bool) -> None:
    cublas = torch.backends.cuda.matmul
    cublas.allow_bf16_reduced_precision_reduction = bfloat16
    cublas.allow_fp16_reduced_precision_reduction = float16
    cublas.allow_fp16_accumulation = accumulation


def mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, (M, K) x (K, N) -> (M, N); M or K is 0 where a rank holds no row of the head."""
    if a.numel() == 0:
        return out.zero_()
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_fp32_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b."""
    if a.numel() == 0:
        return out
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))
