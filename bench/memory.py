"""Peak memory of a pass, above its inputs and what it returns.

CUDA counts its own allocations. A CPU process has one high-water mark that only grows; Linux lets it be reset.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch
from torch import Tensor

from bench.providers import Run

RESET_MARK = Path("/proc/self/clear_refs")


def cuda_peak(run: Run) -> tuple[tuple[Tensor, ...], int]:
    """What `run` returns, and bytes. It has run before, so no library workspace is charged to it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = run()
    torch.cuda.synchronize()
    return returned, torch.cuda.max_memory_allocated() - before - _num_bytes(returned)


def host_peak(run: Run) -> tuple[tuple[Tensor, ...], int | None]:
    """What `run` returns, and by how much this process's resident memory grew above that; None where none can say."""
    if not RESET_MARK.exists():
        return run(), None
    gc.collect()
    _return_free_pages()
    RESET_MARK.write_text("5")
    before = _status_bytes("VmRSS")
    returned = run()
    return returned, max(0, _status_bytes("VmHWM") - before - _num_bytes(returned))


def unweighed(run: Run) -> tuple[tuple[Tensor, ...], None]:
    return run(), None


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _return_free_pages() -> None:
    # glibc keeps freed blocks; without this a pass could live off what the one before it left.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
