"""A gradient that waited for the backward pass, times the loss's own, in place.

Nearly always that is 1, and nothing needs to be done; only the device knows. So the kernel is launched always, and
returns where it is: a copy of the head's gradient would cost a twentieth of a GEMM, and its memory once more.
"""

from __future__ import annotations

from torch import Tensor

from copg_kernels.kernels.language import NO_FUSION, jit, tl, triton

BLOCK = 4096
# So few, in a loop, because each program that returns at once still has to be started.
MOST_PROGRAMS = 1024


@jit
def _scale_gradient_kernel(
    gradient_ptr,  # (num_elements,), in and out
    factor_ptr,  # () of any floating-point dtype
    num_elements,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(start, num_elements, step):
        offs = first + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + offs, mask=offs < num_elements, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + offs, (gradient * factor).to(gradient_ptr.dtype.element_ty), mask=offs < num_elements)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient *= factor (), rounded once."""
    assert gradient.is_contiguous()
    num_elements = gradient.numel()
    if num_elements:
        programs = min(MOST_PROGRAMS, triton.cdiv(num_elements, BLOCK))
        _scale_gradient_kernel[(programs,)](gradient, factor, num_elements, BLOCK=BLOCK, **NO_FUSION)
    return gradient
