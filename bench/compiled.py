"""A kernel compiled for a GPU that need not be there, and what its binary says: registers, spills, machine code.

cuobjdump, which reads the binaries, comes with Triton's package.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from bench.recording import TARGETS, Variant

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(variant: Variant, target: str) -> Any:
    """Triton's CompiledKernel, from its cache on the disk where that has it."""
    return triton.compile(variant.source, target=TARGETS[target], options=variant.options)


def read_nvidia(kernel: Any) -> tuple[int, int, str]:
    """Registers, the stack that a thread spills to, and PTX."""
    usage = cuobjdump("--dump-resource-usage", kernel)
    registers, stack = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    return registers, stack, kernel.asm["ptx"]


def cuobjdump(option: str, kernel: Any) -> str:
    if not CUOBJDUMP.exists():
        raise FileNotFoundError(f"no cuobjdump at {CUOBJDUMP}: this Triton comes without NVIDIA's tools")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump says nothing like {pattern}: {text[:400]}")
    return match[1]
