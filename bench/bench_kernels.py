"""Each tile operation by itself: Triton kernels on a GPU, their torch twins elsewhere.

    pytest bench/bench_kernels.py                      "gemm" is the torch.mm that an operation contains

The shape is Llama-3's head on a GPU and bench/run.py's first CPU shape otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.inputs import SHAPES
from bench.tiles import Tiles, make_tiles
from copg_kernels.kernels.compact_tile import Columns, Pool, compact_tile
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.count_significant import BLOCK
from copg_kernels.kernels.gather_product import gather_product
from copg_kernels.kernels.row_slopes import slopes_of_logps
from copg_kernels.kernels.row_statistics import Partials

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKEND = "triton" if CUDA else "torch"


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    shape, dtype = (SHAPES["llama-3"], torch.bfloat16) if CUDA else (SHAPES["cpu-32k"], torch.float32)
    return make_tiles(shape, dtype, DEVICE, BACKEND)


@pytest.fixture(scope="module")
def partials(tiles: Tiles) -> Partials:
    return tiles.forward()


def bench(benchmark: Any, run: Callable[[], object]) -> None:
    """Host time up to the end of the device's work: at a millisecond a call, that is exact enough."""

    def synchronized() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=20 if CUDA else 5, warmup_rounds=3 if CUDA else 1)


@pytest.mark.benchmark(group="logits -> row statistics")
def test_linear_logps_fwd(benchmark: Any, tiles: Tiles) -> None:
    bench(benchmark, tiles.forward)


@pytest.mark.benchmark(group="logits -> row statistics")
def test_logits_gemm(benchmark: Any, tiles: Tiles) -> None:
    weight = tiles.head.weight
    logits = torch.mm(tiles.hidden_states, weight.T)
    bench(benchmark, lambda: torch.mm(tiles.hidden_states, weight.T, out=logits))


@pytest.mark.benchmark(group="row statistics -> log-probs")
def test_merge_splits(benchmark: Any, tiles: Tiles, partials: Partials) -> None:
    bench(benchmark, lambda: tiles.ops.merge_splits_fwd(partials, tiles.rows))


@pytest.mark.benchmark(group="row statistics -> log-probs")
def test_contrast(benchmark: Any, tiles: Tiles, partials: Partials) -> None:
    inputs = tiles.inputs
    groups = torch.arange(0, len(inputs.rewards) + 1, inputs.group_size, dtype=torch.int32, device=DEVICE)
    completions = Completions(
        inputs.cu_seqlens, groups, inputs.ref_logps, inputs.rewards, inputs.beta, False, len(groups) - 1
    )
    bench(benchmark, lambda: tiles.ops.contrast_fwd(partials, tiles.rows, completions))


@pytest.mark.benchmark(group="tile that stays")
def test_exp_tiles(benchmark: Any, tiles: Tiles) -> None:
    workspace = tiles.kept_workspace()
    bench(benchmark, lambda: tiles.ops.exp_tiles(tiles.hidden_states, tiles.head, tiles.rows, workspace))


@pytest.mark.benchmark(group="tile that stays")
def test_kept_logits_gemm(benchmark: Any, tiles: Tiles) -> None:
    test_logits_gemm(benchmark, tiles)


@pytest.mark.benchmark(group="tile that stays")
def test_place_labels(benchmark: Any, tiles: Tiles) -> None:
    operands = (tiles.hidden_states, tiles.head, tiles.rows)
    partials, kept = tiles.ops.exp_tiles(*operands, tiles.kept_workspace())
    token_logps, lse = tiles.ops.merge_splits_fwd(partials, tiles.rows)
    slopes = slopes_of_logps(token_logps)
    bench(benchmark, lambda: tiles.ops.place_labels(kept, *operands, slopes, lse))


def compact(tiles: Tiles) -> Callable[[Columns], tuple[Pool, Pool | None]]:
    operands = (tiles.hidden_states, tiles.head, tiles.rows)
    partials, kept = tiles.ops.exp_tiles(*operands, tiles.kept_workspace())
    token_logps, lse = tiles.ops.merge_splits_fwd(partials, tiles.rows)
    (part,) = tiles.ops.place_labels(kept, *operands, slopes_of_logps(token_logps), lse)
    capacity = int(0.6 * part.tile.numel() / BLOCK)
    return lambda columns: compact_tile(part, tiles.rows, 2.0**-14, capacity, columns)


@pytest.mark.benchmark(group="compact tile")
@pytest.mark.skipif(not CUDA, reason="needs the kernels")
@pytest.mark.parametrize("columns", Columns, ids=lambda columns: columns.name.lower())
def test_compact_tile(benchmark: Any, tiles: Tiles, columns: Columns) -> None:
    bench(benchmark, partial(compact(tiles), columns))


@pytest.mark.benchmark(group="compact tile")
@pytest.mark.skipif(not CUDA, reason="needs the kernels")
@pytest.mark.parametrize("columns", Columns, ids=["dX", "dW, in tile", "dW, copied"])
def test_product_with_a_compact_tile(benchmark: Any, tiles: Tiles, columns: Columns) -> None:
    pool = compact(tiles)(columns)[columns != Columns.UNWANTED]
    assert pool is not None
    source = tiles.head.weight if columns == Columns.UNWANTED else tiles.hidden_states
    out = torch.empty(pool.dropped.numel(), source.shape[1], device=DEVICE)
    mean = torch.zeros(source.shape[1], device=DEVICE)
    bench(benchmark, lambda: gather_product(pool, source, mean, None, out, "ieee", add=False))


@pytest.mark.benchmark(group="gradient tile, one slice of the vocabulary")
def test_softmax_minus_label(benchmark: Any, tiles: Tiles, partials: Partials) -> None:
    token_logps, lse = tiles.ops.merge_splits_fwd(partials, tiles.rows)
    slopes, out = slopes_of_logps(token_logps), tiles.gradient_tile()
    bench(
        benchmark,
        lambda: tiles.ops.softmax_minus_label(tiles.hidden_states, tiles.head, tiles.rows, slopes, lse, 0, out),
    )


@pytest.mark.benchmark(group="gradient tile, one slice of the vocabulary")
def test_gradient_tile_gemm(benchmark: Any, tiles: Tiles) -> None:
    out = tiles.gradient_tile()
    weight = tiles.head.weight[: out.shape[1]]
    bench(benchmark, lambda: torch.mm(tiles.hidden_states, weight.T, out=out))


@pytest.mark.benchmark(group="rows scaled by their coefficient")
def test_scale_rows(benchmark: Any, tiles: Tiles) -> None:
    scale = torch.ones(len(tiles.rows.row_index), device=DEVICE)
    dtype = tiles.hidden_states.dtype
    bench(benchmark, lambda: tiles.ops.scale_rows(tiles.hidden_states, tiles.rows.row_index, scale, dtype))
