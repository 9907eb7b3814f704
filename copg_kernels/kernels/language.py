"""Triton where it is installed; elsewhere names that let the kernel files import, so that the twins can run."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS and Windows have no wheel

    class tl:  # type: ignore[no-redef]
        constexpr = staticmethod(lambda value: value)

    triton = TensorDescriptor = None

    def jit(kernel):
        return kernel


__all__ = ["INTERPRETING", "TensorDescriptor", "jit", "tl", "triton"]

# Read once: Triton decides at import which kind of function `jit` makes.
INTERPRETING = triton is not None and triton.knobs.runtime.interpret
