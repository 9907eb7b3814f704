"""A kernel as a GPU gets it: what it needs of an SM, and its machine code."""

from __future__ import annotations

import re
from typing import NamedTuple

from bench.compiled import compiled, cuobjdump, read_nvidia
from bench.gpus import Gpu
from bench.machine_code import Code, parse
from bench.recording import Variant


class NoRule(ValueError):
    """For a kernel that this model knows nothing of."""


class Kernel(NamedTuple):
    """A compiled variant."""

    registers: int
    spills: int
    shared: int
    warps: int
    stages: int
    code: Code

    def blocks_per_sm(self, gpu: Gpu) -> int:
        by_registers = gpu.registers // (max(8, -(-self.registers // 8) * 8) * self.warps * 32)
        return max(1, min(32, 64 // self.warps, by_registers, gpu.shared_bytes // (self.shared + 1024)))


_kernels: dict[tuple[str, str, str], Kernel] = {}


def kernel_of(variant: Variant, target: str) -> Kernel:
    """Compiled once per process."""
    key = (variant.source.hash(), str(variant.options), target)
    if key not in _kernels:
        binary = compiled(variant, target)
        registers, spills, _ = read_nvidia(binary)
        sass, metadata = cuobjdump("--dump-sass", binary), binary.metadata
        code = parse(sass)
        if not code.mmas and re.search(r"\b(HGMMA|HMMA|QGMMA|IMMA|DMMA)\b", sass):
            raise NoRule(f"{variant.name} has other matrix instructions than HGMMA, or has them in no loop")
        _kernels[key] = Kernel(registers, spills, metadata.shared, metadata.num_warps, metadata.num_stages, code)
    return _kernels[key]


def describe(kernel: Kernel, gpu: Gpu) -> str:
    code = kernel.code
    short, long = code.counts
    around = f"{short}" if short == long else f"{short}-{long}"
    where = f"{around} instructions"
    if code.loop is not None:
        where = f"{code.loop_count} instructions a round, {around} around the loop"
    spills = f", {kernel.spills} bytes spilled" if kernel.spills else ""
    return f"{where}; {kernel.registers} registers, {kernel.blocks_per_sm(gpu)} blocks per SM{spills}"
