"""NVIDIA's machine code as cuobjdump prints it: what a tile costs in its GEMM's loop, and what before and after it.

Blocks of threads that a mask or a flag sends elsewhere make the count a range: of all ways through the code from the
loop to the end the shortest and the longest. A branch backwards, other than that of the loops around the GEMM, waits
for a barrier and is not followed. Nor is an EXIT under a condition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Lanes per cycle and scheduler, where they are fewer than a warp's 32 (CUDA programming guide, arithmetic
# instructions of compute capability 9.0): comparisons, selections, integers 16; special functions 4.
SLOW = {"MUFU": 8} | dict.fromkeys(
    ("FSEL", "SEL", "FSETP", "ISETP", "FMNMX", "IMNMX", "VIMNMX", "LOP3", "SHF", "IADD3", "PRMT", "PLOP3", "LEA"), 2
)
SCHEDULERS = 4
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_HGMMA = re.compile(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")


class Instruction(NamedTuple):
    address: int
    guarded: bool  # by a predicate
    name: str  # with its modifiers
    operands: str

    @property
    def target(self) -> int | None:
        """Of a branch."""
        found = re.search(r"(0x[0-9a-f]+)", self.operands) if self.name in ("BRA", "BRA.U", "BRA.UNI") else None
        return int(found[1], 16) if found else None


class Mma(NamedTuple):
    """A matrix instruction of a group of four warps."""

    M: int
    N: int
    K: int
    a_in_shared: bool


class Work(NamedTuple):
    """Of one warp."""

    issued: float  # cycles of a scheduler that starts one instruction each
    alone: float  # cycles if no two instructions overlap that take a unit longer


class Code(NamedTuple):
    """Instructions of a warp; the loop's are those of one round."""

    loop: Work | None  # None: no matrix instruction within a loop
    loop_count: int
    mmas: list[Mma]
    shortest: Work  # all else, per tile
    longest: Work
    counts: tuple[int, int]  # of the instructions of both
    straight: bool  # no loop at all: a thread's loads are all under way at a time
    many_tiles: bool  # a block goes through tiles, in a loop around that of the GEMM


class _Loop(NamedTuple):
    first: int  # index of an instruction
    last: int  # the branch back


def parse(sass: str) -> Code:
    instructions = [
        Instruction(int(address, 16), bool(guard), name, operands)
        for address, guard, name, operands in _LINE.findall(sass)
    ]
    loops = _loops(instructions)
    matrix = [i for i, instruction in enumerate(instructions) if instruction.name.startswith("HGMMA")]
    around = sorted((loop for loop in loops if matrix and _holds(loop, matrix[0])), key=lambda x: x.last - x.first)
    if not around:
        short, long = (_way(instructions, 0, None, pick) for pick in (min, max))
        return Code(None, 0, [], _work(short), _work(long), (len(short), len(long)), not loops, False)
    inner = around[0]
    outer = next((loop for loop in around[1:] if loop.first <= inner.first and loop.last > inner.last), None)
    body, rounds = (_way(instructions, inner.first, inner.last, pick) for pick in (min, max))
    # What only some rounds do is counted once per tile: in a loop over all tiles that is the end of each.
    at_times = [instruction for instruction in rounds if instruction not in body]
    ways = []
    for pick in (min, max):
        before = _way(instructions, outer.first if outer else 0, inner.first, pick)
        ways.append(before + at_times + _way(instructions, inner.last + 1, outer.last if outer else None, pick))
    mmas = [mma for instruction in body if (mma := _mma(instruction)) is not None]
    counts = (len(ways[0]), len(ways[1]))
    return Code(_work(body), len(body), mmas, _work(ways[0]), _work(ways[1]), counts, False, outer is not None)


def _loops(instructions: list[Instruction]) -> list[_Loop]:
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    found = []
    for last, instruction in enumerate(instructions):
        first = at.get(instruction.target) if instruction.target is not None else None
        if first is not None and first < last:
            found.append(_Loop(first, last))
    return found


def _holds(loop: _Loop, index: int) -> bool:
    return loop.first <= index <= loop.last


def _way(instructions: list[Instruction], first: int, last: int | None, pick: Callable) -> list[Instruction]:
    """The shortest (min) or longest (max) way from `first` to `last`; where that is None, to an EXIT for all."""
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    stop = len(instructions) - 1 if last is None else last
    best: dict[int, tuple[int, int | None]] = {}  # index: instructions to the end, the next one
    for i in range(stop, first - 1, -1):
        if i == last or (last is None and instructions[i].name == "EXIT" and not instructions[i].guarded):
            best[i] = (1, None)
            continue
        ways = [(best[j][0] + 1, j) for j in _next(instructions, i, at) if j in best]
        if ways:
            best[i] = pick(ways)
    if first not in best:
        raise ValueError(f"no way through the code from {instructions[first].address:#x}")
    way, i = [], first
    while i is not None:
        way.append(instructions[i])
        i = best[i][1]  # type: ignore[assignment]
    return way


def _next(instructions: list[Instruction], i: int, at: dict[int, int]) -> list[int]:
    """Forwards only."""
    instruction = instructions[i]
    follows = [] if instruction.name in ("EXIT", "BRA", "RET") and not instruction.guarded else [i + 1]
    if instruction.name == "EXIT" and instruction.guarded:
        follows = [i + 1]
    target = at.get(instruction.target) if instruction.target is not None else None
    return [*follows, *([target] if target is not None and target > i else [])]


def _work(instructions: Iterable[Instruction]) -> Work:
    names = [instruction.name.split(".")[0] for instruction in instructions]
    return Work(len(names), sum(SLOW.get(name, 1) for name in names))


def _mma(instruction: Instruction) -> Mma | None:
    found = _HGMMA.match(instruction.name)
    if found is None:
        return None
    operands = instruction.operands.split(",")
    M, N, K = map(int, found.groups())
    # R0, gdesc[a and b], R0   or, with the left operand in registers,   R0, R4, gdesc[b], R0
    return Mma(M, N, K, "gdesc" in operands[1])
