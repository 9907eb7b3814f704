"""NVIDIA's machine code as cuobjdump prints it: what a tile costs in its GEMM's loop, and what before and after it.

Blocks of threads that a mask or a flag sends elsewhere make the count a range: of all ways through the code from the
loop to the end the shortest and the longest. Of other loops one round is counted. Branches of threads that wait for
each other are not followed, nor is an EXIT under a condition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# Lanes per cycle and scheduler, where they are fewer than a warp's 32 (CUDA programming guide, arithmetic
# instructions of compute capability 9.0): comparisons, selections, integers 16; special functions 4.
SLOW = {"MUFU": 8} | dict.fromkeys(
    ("FSEL", "SEL", "FSETP", "ISETP", "FMNMX", "IMNMX", "VIMNMX", "LOP3", "SHF", "IADD3", "PRMT", "PLOP3", "LEA"), 2
)
SCHEDULERS = 4
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
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
    """Instructions of a warp: of a round of its loop, and of all else on the shortest and the longest way."""

    loop: Work | None  # around the matrix instructions; without any, the loop that moves most
    loop_count: int
    mmas: list[Mma]
    moved: int  # bytes that a thread loads and stores in a round
    shortest: Work  # per tile, where a block has many
    longest: Work
    counts: tuple[int, int]  # of the instructions of both
    many_tiles: bool  # in a loop around that of the matrix instructions


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
    if matrix:
        around = sorted((loop for loop in loops if loop.first <= matrix[0] <= loop.last), key=_length)
    else:
        around = sorted(loops, key=lambda loop: -_moved(instructions[loop.first : loop.last]))[:1]
    if not around:
        short, long = (_way(instructions, 0, None, pick) for pick in (min, max))
        return Code(None, 0, [], 0, _work(short), _work(long), (len(short), len(long)), False)
    inner = around[0]
    outer = next((loop for loop in around[1:] if loop.first <= inner.first and loop.last > inner.last), None)
    return _code(instructions, inner, outer)


def _code(instructions: list[Instruction], inner: _Loop, outer: _Loop | None) -> Code:
    body, rounds = (_way(instructions, inner.first, inner.last, pick) for pick in (min, max))
    # What only some rounds do is counted once per tile: in a loop over all tiles that is the end of each.
    at_times = [instruction for instruction in rounds if instruction not in body]
    ways = []
    for pick in (min, max):
        before = _way(instructions, outer.first if outer else 0, inner.first, pick)
        ways.append(before + at_times + _way(instructions, inner.last + 1, outer.last if outer else None, pick))
    mmas = [mma for instruction in body if (mma := _mma(instruction)) is not None]
    counts = (len(ways[0]), len(ways[1]))
    works = (_work(ways[0]), _work(ways[1]))
    return Code(_work(body), len(body), mmas, _moved(body), *works, counts, outer is not None)


def _loops(instructions: list[Instruction]) -> list[_Loop]:
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    found = []
    for last, instruction in enumerate(instructions):
        first = at.get(instruction.target) if instruction.target is not None else None
        if first is not None and first < last:
            found.append(_Loop(first, last))
    return found


def _length(loop: _Loop) -> int:
    return loop.last - loop.first


def _moved(instructions: Iterable[Instruction]) -> int:
    """Bytes from and to global memory, of a thread."""
    names = [instruction.name.split(".") for instruction in instructions]
    moving = [name for name in names if name[0] in ("LDG", "STG")]
    return sum(next((_BYTES[part] for part in name if part in _BYTES), 4) for name in moving)


def _way(instructions: list[Instruction], first: int, last: int | None, pick: Callable) -> list[Instruction]:
    """The shortest (min) or longest (max) way from `first` to `last`; where that is None, to an EXIT for all."""
    best: dict[int, tuple[int, int]] = {}  # index: instructions to the end, and the next one's
    for i, following in _ends_first(instructions, first, last):
        ways = [(best[j][0] + 1, j) for j in following if j in best]
        if _ends(instructions, i, last):
            best[i] = (1, -1)
        elif ways:
            best[i] = pick(ways)
    if first not in best:
        raise ValueError(f"no way through the code from {instructions[first].address:#x}")
    way, i = [], first
    while i >= 0:
        way.append(instructions[i])
        i = best[i][1]
    return way


def _ends_first(instructions: list[Instruction], first: int, last: int | None) -> list[tuple[int, list[int]]]:
    """What can be reached from `first`, each after what follows it, without the branches that close a loop."""
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    found: list[tuple[int, list[int]]] = []
    done: set[int] = set()
    under_way: dict[int, Iterator[int]] = {first: iter(_next(instructions, first, at))}
    while under_way:
        i = next(reversed(under_way))
        following = next(under_way[i], None)
        if following is None or _ends(instructions, i, last):
            del under_way[i]
            done.add(i)
            found.append((i, [j for j in _next(instructions, i, at) if j in done]))
        elif following not in done and following not in under_way:
            under_way[following] = iter(_next(instructions, following, at))
    return found


def _ends(instructions: list[Instruction], i: int, last: int | None) -> bool:
    if last is not None:
        return i == last
    return instructions[i].name == "EXIT" and not instructions[i].guarded


def _next(instructions: list[Instruction], i: int, at: dict[int, int]) -> list[int]:
    """An EXIT under a condition is one of threads that have nothing to do."""
    instruction = instructions[i]
    leaves = instruction.name in ("EXIT", "BRA", "RET") and not instruction.guarded
    target = at.get(instruction.target) if instruction.target is not None else None
    follows = [] if leaves or i + 1 == len(instructions) else [i + 1]
    return follows if target is None else [*follows, target]


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
