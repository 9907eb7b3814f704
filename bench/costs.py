"""Seconds that a pass takes on a GPU by its compiled code and its bytes: from the least to the most.

What paper cannot tell is a range: whether memory and arithmetic, or one tile's end and the next one's products, go on
at a time, and how fast the L2 is. `RULES` says it in words.
"""

from __future__ import annotations

import heapq
from math import ceil, prod
from typing import NamedTuple

from torch import Tensor

from bench.compiled import compiled, cuobjdump, read_nvidia
from bench.gpus import Gpu, Range
from bench.machine_code import SCHEDULERS, Code, parse
from bench.passes import Pass, TorchOp
from bench.recording import Launch, Variant
from copg_kernels.kernels.significant_columns import MOST_KEPT

RULES = """\
A GEMM of torch: its operations at cuBLAS's rate, or its bytes if they take longer. At most: whole waves of tiles of
  128 x 256, or of 128 x 128 at 5 % more, and what it writes beyond bfloat16 not at the same time. With fewer tiles
  than SMs up to 3 times as long.
A kernel with matrix instructions, per tile: rounds of its loop, and the instructions around it. A round takes what its
  products take at cuBLAS's share of the peak, its instructions, or its shared memory. At least: reads of shared memory
  only, its slow instructions overlap, blocks on the same SM hide each other's ends. At most: the copies into shared
  memory need the same ports, and nothing overlaps. Then as many tiles after another as the fullest SM has, and no less
  than all operands at the L2's rate: their bytes are those in the breakdown.
A loop of num_stages=1 waits for its loads in every round.
Any other kernel: its bytes, or its instructions; at most, both after another. A small grid has few bytes in flight.
A redo that finds nothing to do is its empty blocks. Entries of a compact tile are density x all of them, evenly.
The host is always ahead of the GPU, and no pass runs beside another."""

# Launches that read a flag and return: every row's reference was near enough, every compact tile fit into its slots.
RETURNS = {"softmax_minus_label": "only_ptr", "dense_product": "overflow_ptr"}
# Of a matrix, one entry of a row is touched, in a sector of 32 bytes.
ONE_PER_ROW = {("place_labels", "tile_ptr")}
# Have room for MOST_KEPT of the softmax, and hold `density` of it.
OF_ENTRIES = ("values_ptr", "entries_ptr")
CUBLAS_TILES = {(128, 256): 1.0, (128, 128): 1.05}  # with what the smaller one costs
SECTOR = 32


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


class Cost(NamedTuple):
    name: str
    seconds: Range
    operations: float  # FLOP of matrix products
    bytes: float  # of operands and results; of a kernel with matrix instructions what its tiles ask of the L2
    about: str


def cost(one: Pass, gpu: Gpu, density: float) -> Cost:
    if isinstance(one, TorchOp):
        seconds = _product(one, gpu) if one.product else Range(one.bytes / gpu.hbm.best, one.bytes / gpu.hbm.worst)
        return Cost(one.name, _launched(seconds, gpu), operations(one, gpu, density), one.bytes, "")
    name, kernel = one.variant.name, kernel_of(one.variant, gpu.target)
    if _returns(one):
        rounds = prod(one.grid) / (gpu.sms * kernel.blocks_per_sm(gpu)) / gpu.clock.best
        empty = Range(gpu.empty_block.best * rounds, gpu.empty_block.worst * rounds)
        return Cost(f"{name}, nothing to do", _launched(empty, gpu), 0, 0, f"{prod(one.grid)} blocks")
    about = describe(kernel, gpu)
    if kernel.code.loop is None:
        moved, seconds = _touched(one, density), _streaming(one, kernel, gpu, density)
    else:
        moved, seconds = _loaded(one, kernel, gpu, density), _tiles(one, kernel, gpu, density)
        about += f"; its L2 alone {1e3 * moved / gpu.l2.best:.1f} - {1e3 * moved / gpu.l2.worst:.1f} ms"
    return Cost(name, _launched(seconds, gpu), operations(one, gpu, density), moved, about)


def operations(one: Pass, gpu: Gpu, density: float) -> float:
    """FLOP of its matrix products, of whole tiles."""
    if isinstance(one, TorchOp):
        return 2 * prod(one.product) if one.product else 0
    if _returns(one) or kernel_of(one.variant, gpu.target).code.loop is None:
        return 0
    grid = _grid(one, 1, gpu, density)
    return 2 * grid.M * grid.N * grid.K * grid.tiles


def _returns(launch: Launch) -> bool:
    flag = RETURNS.get(launch.variant.name)
    return flag is not None and launch.arguments.get(flag) is not None


_kernels: dict[tuple[str, str, str], Kernel] = {}


def kernel_of(variant: Variant, target: str) -> Kernel:
    """Compiled once per process."""
    key = (variant.source.hash(), str(variant.options), target)
    if key not in _kernels:
        binary = compiled(variant, target)
        registers, spills, _ = read_nvidia(binary)
        code, metadata = parse(cuobjdump("--dump-sass", binary)), binary.metadata
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


def _launched(seconds: Range, gpu: Gpu) -> Range:
    return Range(max(seconds.low, gpu.launch.best), max(seconds.high, gpu.launch.worst))


def _product(work: TorchOp, gpu: Gpu) -> Range:
    """A GEMM of cuBLAS."""
    assert work.product is not None
    M, N, K = work.product
    seconds = 2 * M * N * K / gpu.cublas.best
    low = max(seconds, work.bytes / gpu.hbm.best)
    if ceil(M / 128) * ceil(N / 128) < gpu.sms:
        return Range(low, 3 * max(seconds, work.bytes / gpu.hbm.worst))
    waves = {tile: ceil(M / tile[0]) * ceil(N / tile[1]) / gpu.sms for tile in CUBLAS_TILES}
    fullest = min(factor * ceil(waves[tile]) / waves[tile] for tile, factor in CUBLAS_TILES.items())
    beyond_bfloat16 = max(0, work.out_bytes - 2 * M * N) / gpu.hbm.worst
    return Range(low, max(seconds * fullest, work.bytes / gpu.hbm.worst) + beyond_bfloat16)


def _streaming(launch: Launch, kernel: Kernel, gpu: Gpu, density: float) -> Range:
    """A kernel without matrix instructions."""
    moved, blocks = _touched(launch, density), prod(launch.grid)
    threads = kernel.warps * 32
    resident = min(blocks, gpu.sms * kernel.blocks_per_sm(gpu)) * threads
    warps = ceil(blocks / gpu.sms) * kernel.warps / SCHEDULERS / gpu.clock.best

    def of_bytes(rate: float, in_flight: float, latency: float) -> float:
        if kernel.code.straight:
            in_flight = max(in_flight, moved / blocks / threads)
        return moved / min(rate, resident * in_flight * gpu.clock.best / latency)

    low = of_bytes(gpu.hbm.best, gpu.in_flight.best, gpu.latency.best)
    high = of_bytes(gpu.hbm.worst, gpu.in_flight.worst, gpu.latency.worst)
    return Range(max(low, kernel.code.shortest.issued * warps), high + kernel.code.longest.alone * warps)


def _touched(launch: Launch, density: float) -> float:
    """Bytes: of each tensor once."""
    tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
    return sum(_share(launch, name, density) * x.numel() * x.element_size() for name, x in tensors.items())


def _share(launch: Launch, name: str, density: float) -> float:
    """Of a tensor."""
    if (launch.variant.name, name) in ONE_PER_ROW:
        tensor = launch.arguments[name]
        return SECTOR / (tensor.shape[1] * tensor.element_size())
    if name in OF_ENTRIES:
        return density / MOST_KEPT
    return 2.0 if name == "out_ptr" and launch.arguments.get("ADD") else 1.0


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
        return _Grid(M, N, arguments["H"], rows * columns, _makespan(lengths, gpu.sms * per_sm) * per_sm)
    if not {"BLOCK", "BLOCK_H", "source_ptr"} <= set(arguments):
        raise ValueError(f"no rule for the tiles of {launch.variant.name}: bench/costs.py, _grid")
    M, N = arguments["BLOCK"], arguments["BLOCK_H"]
    tiles = prod(launch.grid)
    entries = len(arguments["source_ptr"])
    return _Grid(M, N, density * entries, tiles, _makespan([1] * tiles, gpu.sms * per_sm) * per_sm)


def _makespan(lengths: list[int], places: int) -> int:
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


def _tiles(launch: Launch, kernel: Kernel, gpu: Gpu, density: float) -> Range:
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
    of_l2 = _loaded(launch, kernel, gpu, density)
    cycles = tile.times(grid.makespan / gpu.clock.best)
    return Range(max(cycles.low, of_l2 / gpu.l2.best), max(cycles.high, of_l2 / gpu.l2.worst))


def _loaded(launch: Launch, kernel: Kernel, gpu: Gpu, density: float) -> float:
    """Bytes that the tiles ask of the L2."""
    grid = _grid(launch, 1, gpu, density)
    one = _round(kernel, grid, gpu)
    return grid.tiles * ceil(grid.K / one.depth) * one.loaded
