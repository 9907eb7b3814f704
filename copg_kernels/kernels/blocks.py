"""Block sizes of the head's GEMM tile, one visible table: device kind x bytes per operand element.

The forward and the backward kernel read the same entry, so that both see bit-identical logits. The entries are
chosen by compilation, not yet by timing on hardware: no register spills, shared memory within the device's limit, and
the widest tensor-core instruction (`python -m tests.compile_report` prints what each one compiles to).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.tuned import settings_of, widest_block

# Row blocks that share a slice of the head's weight while it is in L2: 8 x 256 rows of 4,096 bf16 are 16 MiB.
GROUP_N = 8


def split_for(cache_bytes: int) -> int:
    """Vocabulary entries per split of the torch twins: so many that 2,048 float32 rows fill 4/5 of a cache.

    The pass over a slice then finds it where the product has left it. A machine that does not tell gets what 32 MiB
    give. There it matters little: on two cores of an EPYC, 256 to 2,048 rows, V = 32,000, slices of 800 to 32,000 took
    1.00 to 1.15 GEMMs for log-probs, with medians closer together than the rounds.
    """
    entries = (cache_bytes or 32 * 2**20) * 4 // 5 // (2048 * 4)
    return min(8192, max(1024, entries // 128 * 128))


def last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the last level that Linux knows of; 0 where it does not say, and on other systems."""
    try:
        sizes = [path.read_text().strip() for path in sorted(folder.glob("index*/size"))]
        return int(sizes[-1].removesuffix("K")) * 1024
    except (IndexError, ValueError, OSError):
        return 0


SPLIT_TORCH = split_for(last_cache_bytes())


class Blocks(NamedTuple):
    """Tile of BLOCK_N rows x BLOCK_V vocabulary entries, contracted BLOCK_H at a time."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int
    tiles_per_split: int
    """Vocabulary tiles one program walks through: fixed, so that no log-prob depends on the batch around it.

    Few, so that no multiprocessor waits long for the last one: for heads of 128,256 to 256,000 entries, 1,024 to 65,536
    rows and 132 multiprocessors, the longest sum of tiles on one is on average 1.02 of their share at 8, 1.06 at 32."""
    use_tma: bool
    precision: str
    """`input_precision` of tl.dot: tf32x3 keeps float32 products on NVIDIA's tensor cores at float32 accuracy."""
    bias_on_acc: bool = False
    """Whether a bias is added to the accumulator as a whole, or to its parts: as it comes out without spills."""
    max_registers: int | None = None
    """Per thread, where the assembler, left alone, aims at an occupancy that it has to spill for."""


BLOCKS: dict[tuple[str, int], Blocks] = {
    ("sm_80", 2): Blocks(128, 128, 64, 8, 3, 8, False, "ieee", bias_on_acc=True),
    ("sm_80", 4): Blocks(64, 64, 32, 4, 3, 16, False, "tf32x3", max_registers=255),
    ("sm_90", 2): Blocks(256, 128, 64, 8, 3, 8, True, "ieee", bias_on_acc=True),
    ("sm_90", 4): Blocks(64, 64, 32, 4, 3, 16, False, "tf32x3"),
    # Smaller than on sm_90, and with the deeper BLOCK_H: 256 x 128, and 64 with more stages, spill here.
    ("sm_100", 2): Blocks(128, 128, 128, 8, 2, 8, True, "ieee", max_registers=255),
    ("sm_100", 4): Blocks(64, 64, 32, 4, 3, 16, False, "tf32x3", max_registers=224),
    # Also what 8.6 and 8.9 get. Without TMA, whose barriers Triton 3.6 keeps in local memory on this target.
    ("sm_120", 2): Blocks(128, 128, 32, 8, 4, 8, False, "ieee", max_registers=255),
    ("sm_120", 4): Blocks(64, 64, 32, 4, 2, 16, False, "tf32x3"),
    ("gfx942", 2): Blocks(128, 128, 64, 8, 2, 8, False, "ieee"),
    ("gfx942", 4): Blocks(64, 64, 32, 4, 2, 16, False, "ieee"),
    # Small tiles: a few hundred vocabulary entries already make several tiles and splits.
    ("interpreter", 2): Blocks(16, 32, 32, 1, 1, 2, True, "ieee"),
    ("interpreter", 4): Blocks(16, 32, 32, 1, 1, 2, False, "ieee"),
}

# For heads whose rows are no multiples of 16 elements, or overlap: each element is loaded by itself, and its address
# takes the registers of a larger tile. Such heads are rare, and not fast.
IRREGULAR: dict[tuple[str, int], Blocks] = {
    (kind, itemsize): Blocks(
        64, 64, 16, 4, 1, 16, False, blocks.precision, max_registers=None if kind == "gfx942" else 255
    )
    for (kind, itemsize), blocks in BLOCKS.items()
} | {("interpreter", itemsize): Blocks(16, 32, 32, 1, 1, 2, False, "ieee") for itemsize in (2, 4)}


def device_kind(device: torch.device) -> str:
    """The table's row for a device: the newest entry whose instructions and shared memory the device has."""
    if INTERPRETING:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory per block where 8.0 has 163.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def head_blocks(weight: Tensor) -> Blocks:
    """The entry for a head's weight (V, H) and hidden states like it; a regular head's tuned one where there is one."""
    kind, itemsize = device_kind(weight.device), weight.element_size()
    if not is_regular(weight):
        return IRREGULAR[kind, itemsize]
    tuned = settings_of(weight).blocks
    return BLOCKS[kind, itemsize] if tuned is None else Blocks(**tuned)


def vocab_block(device: torch.device, dtype: torch.dtype) -> int:
    """The widest tile of any head on `device`, a multiple of all others."""
    # Powers of two: the largest is a multiple of the others.
    return max(BLOCKS[device_kind(device), dtype.itemsize].BLOCK_V, widest_block(device, dtype))


def is_regular(weight: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes and elements and do not overlap: vector loads and TMA need that."""
    (_, H), stride = weight.shape, weight.stride(0)
    return weight.data_ptr() % 16 == 0 and H % 16 == 0 and stride % 16 == 0 and stride >= H
