"""Seconds that a pass takes on a GPU by its compiled code and its bytes: from the least to the most.

What paper cannot tell is a range: whether memory and arithmetic, or one tile's end and the next one's products, go on
at a time, and how fast the L2 is. `RULES` says it in words.
"""

from __future__ import annotations

from math import ceil, prod
from typing import NamedTuple

from bench.gpus import Gpu, Range
from bench.kernel_code import Kernel, describe, kernel_of
from bench.machine_code import SCHEDULERS, Work
from bench.passes import Operand, Pass, TorchOp
from bench.recording import Launch
from bench.tile_costs import tile_bytes, tile_operations, tile_seconds
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
Any other kernel: its bytes, or its instructions, its loop as often as it takes to move them. At most: its slow
  instructions do not overlap, and of what takes less the share of one block on the SM is not hidden. A small grid has
  few bytes in flight.
A redo, or a factor of 1, that leaves nothing to do is its empty blocks. Entries of a compact tile are density x all
  of them, evenly.
The host is always ahead of the GPU, and no pass runs beside another."""

# Launches that read a flag and return: references were near enough, compact tiles fit into their slots,
# the loss's own gradient is 1.
RETURNS = {("softmax_minus_label", "only_ptr"), ("dense_product", "overflow_ptr"), ("scale_gradient", "factor_ptr")}
# Of a matrix, one entry of a row is touched, in a sector of 32 bytes.
ONE_PER_ROW = {("place_labels", "tile_ptr")}
# Have room for MOST_KEPT of the softmax, and hold `density` of it.
OF_ENTRIES = ("values_ptr", "entries_ptr")
CUBLAS_TILES = {(128, 256): 1.0, (128, 128): 1.05}  # with what the smaller one costs
SECTOR = 32


class Cost(NamedTuple):
    name: str
    seconds: Range
    operations: float  # FLOP of matrix products
    bytes: float  # of operands and results; of a kernel with matrix instructions what its tiles ask of the L2
    about: str
    l2: Range = Range(0, 0)  # of the seconds, where there are matrix instructions: what its tiles ask of the L2 takes


def cost(one: Pass, gpu: Gpu, density: float) -> Cost:
    if isinstance(one, TorchOp):
        seconds = _product(one, gpu) if one.product else Range(one.bytes / gpu.hbm.best, one.bytes / gpu.hbm.worst)
        return Cost(one.name, _launched(seconds, gpu), operations(one, gpu, density), one.bytes, "")
    name, kernel = one.variant.name, kernel_of(one.variant, gpu.target)
    if _returns(one):
        rounds = prod(one.grid) / (gpu.sms * kernel.blocks_per_sm(gpu)) / gpu.clock.best
        empty = Range(gpu.empty_block.best * rounds, gpu.empty_block.worst * rounds)
        return Cost(f"{name}, nothing to do", _launched(empty, gpu), 0, 0, f"{prod(one.grid)} blocks")
    about, l2 = describe(kernel, gpu), Range(0, 0)
    if not kernel.code.mmas:
        moved, seconds = _touched(one, density), _streaming(one, kernel, gpu, density)
    else:
        moved, seconds = tile_bytes(one, kernel, gpu, density), tile_seconds(one, kernel, gpu, density)
        l2 = Range(moved / gpu.l2.best, moved / gpu.l2.worst)
    return Cost(name, _launched(seconds, gpu), operations(one, gpu, density), moved, about, l2)


def operations(one: Pass, gpu: Gpu, density: float) -> float:
    """FLOP of its matrix products, of whole tiles."""
    if isinstance(one, TorchOp):
        return 2 * prod(one.product) if one.product else 0
    kernel = kernel_of(one.variant, gpu.target)
    return tile_operations(one, gpu, density) if kernel.code.mmas and not _returns(one) else 0


def _returns(launch: Launch) -> bool:
    given = {(launch.variant.name, name) for name, value in launch.arguments.items() if value is not None}
    return bool(given & RETURNS)


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
    code, blocks = kernel.code, prod(launch.grid)
    moved, threads = _touched(launch, density), kernel.warps * 32
    each = moved / blocks / threads  # bytes of a thread
    resident = min(blocks, gpu.sms * kernel.blocks_per_sm(gpu)) * threads
    warps = ceil(blocks / gpu.sms) * kernel.warps / SCHEDULERS / gpu.clock.best
    rounds = each / code.moved if code.moved else 1
    loop = code.loop or Work(0, 0)

    def of_bytes(rate: float, in_flight: float, latency: float) -> float:
        under_way = each if code.loop is None else in_flight
        return moved / min(rate, resident * max(under_way, in_flight) * gpu.clock.best / latency)

    low = of_bytes(gpu.hbm.best, gpu.in_flight.best, gpu.latency.best)
    high = of_bytes(gpu.hbm.worst, gpu.in_flight.worst, gpu.latency.worst)
    least, most = code.shortest.issued + rounds * loop.issued, code.longest.alone + rounds * loop.alone
    shorter, longer = sorted((high, most * warps))
    return Range(max(low, least * warps), longer + shorter / kernel.blocks_per_sm(gpu))


def _touched(launch: Launch, density: float) -> float:
    """Bytes: of each tensor once."""
    operands = {name: value for name, value in launch.arguments.items() if isinstance(value, Operand)}
    return sum(_share(launch, name, density) * operand.bytes for name, operand in operands.items())


def _share(launch: Launch, name: str, density: float) -> float:
    """Of a tensor."""
    operand, arguments = launch.arguments[name], launch.arguments
    if (launch.variant.name, name) in ONE_PER_ROW:
        return operand.shape[0] * SECTOR / operand.bytes
    if name in OF_ENTRIES:
        return density / MOST_KEPT
    product = arguments.get("product_ptr")
    if product is not None:  # of a slice of the vocabulary: what spans all of it, by its entries or its tiles
        V = arguments["V"]
        spans = operand.shape[-1] >= V or operand.shape[0] == ceil(V / arguments["BLOCK_V"])
        return product.shape[1] / V if spans else 1.0
    return 2.0 if name == "out_ptr" and arguments.get("ADD") else 1.0
