"""Tensor-core products with a float32 result: cuBLAS (or MKL) does these better than a kernel of ours.

Operands may be float32, bfloat16 or float16; the sum and the result are float32 (float64 for float64 operands).
"""

from __future__ import annotations

import torch
from torch import Tensor


def mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, (M, K) x (K, N) -> (M, N)."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_fp32_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))
