"""Triton's interpreter with a GPU's arithmetic, where its own is not what a kernel means.

Left alone it multiplies the bits of bfloat16 as if they were integers, and cuts off what a store would round. Its
float32 products come from numpy, whose BLAS may sum a row in another order in another place of the tile. Here `tl.dot`
takes the numbers, sums in float64 and rounds once, and a store rounds to nearest even.

It also prepares `triton.language` again at every call of every helper, which takes a third of the time: here once.
"""

from __future__ import annotations

import numpy as np


def install() -> None:
    """For every kernel this process interprets."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    truncate, prepare_and_call = InterpreterBuilder.create_fp_trunc, InterpretedFunction.__call__

    def numbers(handle: TensorHandle) -> np.ndarray:
        data = handle.data
        if handle.dtype.scalar == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float64)

    def dot(self, a, b, accumulator, *_):
        total = np.matmul(numbers(a), numbers(b)) + accumulator.data
        return TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)

    def round_to(self, source, to):
        if to.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return truncate(self, source, to)
        return TensorHandle(_nearest_bfloat16(source.data), tl.bfloat16)

    def call(self, *args, **kwargs):
        if tl.core.is_builtin(tl.core.load):
            return prepare_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_fp_trunc = round_to


def _nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, to even where two are as near; NaN stays NaN."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
