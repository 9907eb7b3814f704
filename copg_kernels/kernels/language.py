"""Triton where it is installed; elsewhere names that let the kernel files import, so that the twins can run."""

from __future__ import annotations

import inspect

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS and Windows have no wheel

    class tl:  # type: ignore[no-redef]
        constexpr = staticmethod(lambda value: value)

    triton = TensorDescriptor = None


__all__ = ["FENCES_COPIES", "INTERPRETING", "LN_2", "LOG2_E", "NO_FUSION", "TensorDescriptor", "jit", "tl", "triton"]

# No fused multiply-add at the compiler's choice: it would make the bits of a number depend on the kernel and on the
# version of Triton.
NO_FUSION = dict(enable_fp_fusion=False)

# exp(x) = exp2(x * LOG2_E) with the hardware's exp2: tl.exp would also keep results that are no normal float32.
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

# Read once: Triton decides at import which kind of function `jit` makes.
INTERPRETING = triton is not None and triton.knobs.runtime.interpret

# Whether operands copied into shared memory in the background are fenced before the matrix instructions of Hopper and
# Blackwell, which read it by another path, may see them: Triton 3.6 leaves that out. tests/compile_report.py looks.
FENCES_COPIES = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

# Left alone, Triton compiles a kernel once more for integers that are 1 or multiples of 16, and for pointers that are
# multiples of 16 bytes. These integers change from batch to batch, or make no kernel faster, and of the pointers only
# those to matrices are read in vectors that matter.
_INTEGERS_OF_A_BATCH = {
    "T", "R", "V", "num_groups", "num_splits", "num_tiles", "first_tile",
    "num_members", "num_entries", "num_elements", "num_slots", "capacity",
}  # fmt: skip
_MATRICES = {"product_ptr", "source_ptr", "out_ptr", "tile_ptr", "values_ptr"}


def jit(kernel):
    """triton.jit, for one compilation whatever the size of the batch."""
    if triton is None:
        return kernel
    names = inspect.signature(kernel).parameters
    pointers = [name for name in names if name.endswith("_ptr") and name not in _MATRICES]
    return triton.jit(
        kernel,
        do_not_specialize=[name for name in names if name in _INTEGERS_OF_A_BATCH],
        do_not_specialize_on_alignment=pointers,
    )
