"""Peak memory of each pass, above its inputs and what it returns.

CUDA counts its own allocations. A CPU process has one high-water mark that only grows, so each provider gets
a process of its own, which resets the mark (Linux) once inputs are loaded and libraries are awake:

    python -m bench.memory inputs.pt <provider> <pass>...        prints {"log-probs": bytes, ...}
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.inputs import BenchInputs, Shape, make_inputs
from bench.loaders import LOADERS
from bench.providers import Provider, bind

ROOT = Path(__file__).resolve().parents[1]
RESET_MARK = Path("/proc/self/clear_refs")
WARM_UP = Shape("warm-up", 64, 16, 8, 4)


def cuda_peaks(provider: Provider, inputs: BenchInputs, passes: list[str]) -> dict[str, int]:
    """Bytes by pass. The provider has run before, so no library workspace is charged to it."""
    peaks = {}
    runs = bind(provider, inputs)
    for name in passes:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = runs[name]()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before - _num_bytes(returned)
    return peaks


def host_peaks_in_child(inputs_file: Path, provider_name: str, passes: list[str]) -> dict[str, int]:
    """Bytes by pass, measured by a process that does nothing else. Empty where that fails or is no Linux."""
    if not RESET_MARK.exists():
        return {}
    command = [sys.executable, "-m", "bench.memory", str(inputs_file), provider_name, *passes]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        print(f"memory of {provider_name} was not measured:\n{child.stderr}", file=sys.stderr)
        return {}
    return json.loads(child.stdout.splitlines()[-1])


def host_peak(run: Callable[[], tuple[Tensor, ...]]) -> int:
    """Growth of this process's resident memory while `run` runs, less what it returns."""
    gc.collect()
    _return_free_pages()
    RESET_MARK.write_text("5")
    before = _status_bytes("VmRSS")
    returned = run()
    return max(0, _status_bytes("VmHWM") - before - _num_bytes(returned))


def _child_main(inputs_file: str, provider_name: str, *passes: str) -> None:
    inputs = BenchInputs(*torch.load(inputs_file))
    inputs.hidden_states.requires_grad_()
    inputs.lm_head_weight.requires_grad_()
    provider = LOADERS[provider_name](torch.device("cpu"))
    # Thread pools and code pages come with the first call, and a compiler with the first call at a shape.
    # Others warm up on a tiny shape, so that a buffer they keep for the real one is charged to them.
    small = make_inputs(WARM_UP, "flat", inputs.hidden_states.dtype, "cpu")
    warm_up = bind(provider, inputs if provider.compiles_per_shape else small)
    for name in passes:
        warm_up[name]()
    runs = bind(provider, inputs)
    print(json.dumps({name: host_peak(runs[name]) for name in passes}))


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


if __name__ == "__main__":
    _child_main(*sys.argv[1:])
