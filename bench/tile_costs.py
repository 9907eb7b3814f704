"""Seconds of a kernel with matrix instructions: tiles of a product, each a loop with something around it."""

from __future__ import annotations

import heapq
from math import ceil, prod
from typing import NamedTuple

from bench.gpus import Gpu, Range
from bench.kernel_code import Kernel, NoRule
from bench.machine_code import SCHEDULERS
from bench.recording import Launch


def tile_seconds(launch: Launch, kernel: Kernel, gpu: Gpu, density: float) -> Range:
    """A kernel with matrix instructions."""
    per_sm = kernel.blocks_per_sm(gpu)
    grid = _grid(launch, per_sm, gpu, density)
    one, code = _round(kernel, grid, gpu), kernel.code
    assert code.loop is not None
    rounds = ceil(grid.K / one.depth)
    warps = kernel.warps / SCHEDULERS
    issued = code.loop.issued * warps
    waits = (gpu.latency.best / per_sm, gpu.latency.worst) if kernel.stages == 1 else (0.0, 0.0)
    least = max(one.products, issued, one.read / gpu.shared.best, waits[0])
    most = max(one.products, issued, (one.read + one.loaded) / gpu.shared.best / gpu.cublas_share) + waits[1]
    loop = Range(rounds * least, rounds * most)
    start = gpu.latency if code.many_tiles else gpu.tile_latency
    around = Range(code.shortest.issued * warps + start.best, code.longest.alone * warps + start.worst)
    tile = Range(max(loop.low, around.low) if per_sm > 1 else loop.low + around.low, loop.high + around.high)
    of_l2 = tile_bytes(launch, kernel, gpu, density)
    cycles = tile.times(grid.makespan / gpu.clock.best)
    return Range(max(cycles.low, of_l2 / gpu.l2.best), max(cycles.high, of_l2 / gpu.l2.worst))


def tile_operations(launch: Launch, gpu: Gpu, density: float) -> float:
    """FLOP, of whole tiles."""
    grid = _grid(launch, 1, gpu, density)
    return 2 * grid.M * grid.N * grid.K * grid.tiles


def tile_bytes(launch: Launch, kernel: Kernel, gpu: Gpu, density: float) -> float:
    """Bytes that the tiles ask of the L2."""
    grid = _grid(launch, 1, gpu, density)
    one = _round(kernel, grid, gpu)
    return grid.tiles * ceil(grid.K / one.depth) * one.loaded


class _Grid(NamedTuple):
    """Tiles of a launch: what each multiplies, and how many come after another."""

    M: int
    N: int
    K: float
    tiles: int
    makespan: int  # tiles of the fullest SM


def _grid(launch: Launch, per_sm: int, gpu: Gpu, density: float) -> _Grid:
    """Of the head's kernels, or of a product with a compact tile."""
    arguments = launch.arguments
    if "BLOCK_V" in arguments:
        M, N = arguments["BLOCK_N"], arguments["BLOCK_V"]
        width = arguments.get("padded_width") or arguments["V"]
        rows, columns = ceil(arguments["R"] / M), ceil(width / N)
        each = arguments.get("TILES_PER_SPLIT", 1)
        lengths = [min(each, columns - start) for start in range(0, columns, each) for _ in range(rows)]
        return _Grid(M, N, arguments["H"], rows * columns, makespan(lengths, gpu.sms * per_sm) * per_sm)
    if not {"BLOCK", "BLOCK_H", "source_ptr"} <= set(arguments):
        raise NoRule(f"what the tiles of {launch.variant.name} are is not in bench/tile_costs.py")
    M, N = arguments["BLOCK"], arguments["BLOCK_H"]
    tiles = prod(launch.grid)
    entries = arguments["source_ptr"].shape[0]
    return _Grid(M, N, density * entries, tiles, makespan([1] * tiles, gpu.sms * per_sm) * per_sm)


def makespan(lengths: list[int], places: int) -> int:
    """When the last is done, if each goes where a place is free first, in their order."""
    if len(set(lengths)) == 1:
        return ceil(len(lengths) / places) * lengths[0]
    ends = [0] * places
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


class _Round(NamedTuple):
    """One of a tile's loop, in a block."""

    products: float  # cycles
    depth: float  # along what is summed over
    loaded: float  # bytes
    read: float  # bytes of shared memory


def _round(kernel: Kernel, grid: _Grid, gpu: Gpu) -> _Round:
    groups, mmas = kernel.warps // 4, kernel.code.mmas
    fma = groups * sum(mma.M * mma.N * mma.K for mma in mmas)
    depth = fma / (grid.M * grid.N)
    read = 2 * groups * sum((mma.M * mma.a_in_shared + mma.N) * mma.K for mma in mmas)
    return _Round(fma / gpu.fma_per_cycle.best / gpu.cublas_share, depth, (grid.M + grid.N) * depth * 2, read)
