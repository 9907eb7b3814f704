"""Each tile operation by itself: Triton kernels on a GPU, their torch twins elsewhere.

    pytest bench/bench_kernels.py                      "gemm" is the torch.mm that an operation contains

The shape is Llama-3's head on a GPU and bench/run.py's first CPU shape otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.inputs import SHAPES, BenchInputs, make_inputs
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.linear_logps_fwd import Partials
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.schedules.tile_ops import TileOps, counted_rows, tile_ops
from copg_kernels.schedules.workspace import default_workspace_bytes, slice_width

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKEND = "triton" if CUDA else "torch"
BUDGET = default_workspace_bytes(BACKEND)


class Tiles(NamedTuple):
    ops: TileOps
    inputs: BenchInputs
    hidden_states: Tensor  # as the backend's operations want them
    head: Head
    rows: PackedRows
    partials: Partials


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    shape, dtype = (SHAPES["llama-3"], torch.bfloat16) if CUDA else (SHAPES["cpu-32k"], torch.float32)
    with torch.no_grad():
        inputs = make_inputs(shape, "rl", dtype, DEVICE)
        head = Head(inputs.lm_head_weight.detach(), None, 1.0, None, 1.0)
        hidden_states, rows = counted_rows(inputs.hidden_states.detach(), inputs.labels, -100, BACKEND)
        ops = tile_ops(BACKEND)
        return Tiles(ops, inputs, hidden_states, head, rows, ops.linear_logps_fwd(hidden_states, head, rows, BUDGET))


def bench(benchmark: Any, run: Callable[[], object]) -> None:
    """Host time up to the end of the device's work: at a millisecond a call, that is exact enough."""

    def synchronized() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=20 if CUDA else 5, warmup_rounds=3 if CUDA else 1)


@pytest.mark.benchmark(group="logits -> row statistics")
def test_linear_logps_fwd(benchmark: Any, tiles: Tiles) -> None:
    bench(benchmark, lambda: tiles.ops.linear_logps_fwd(tiles.hidden_states, tiles.head, tiles.rows, BUDGET))


@pytest.mark.benchmark(group="logits -> row statistics")
def test_logits_gemm(benchmark: Any, tiles: Tiles) -> None:
    weight = tiles.head.weight
    logits = torch.mm(tiles.hidden_states, weight.T)
    bench(benchmark, lambda: torch.mm(tiles.hidden_states, weight.T, out=logits))


@pytest.mark.benchmark(group="row statistics -> log-probs")
def test_merge_splits(benchmark: Any, tiles: Tiles) -> None:
    bench(benchmark, lambda: tiles.ops.merge_splits_fwd(tiles.partials, tiles.rows))


@pytest.mark.benchmark(group="row statistics -> log-probs")
def test_contrast(benchmark: Any, tiles: Tiles) -> None:
    inputs = tiles.inputs
    groups = torch.arange(0, len(inputs.rewards) + 1, inputs.group_size, dtype=torch.int32, device=DEVICE)
    completions = Completions(inputs.cu_seqlens, groups, inputs.ref_logps, inputs.rewards, inputs.beta, average=False)
    bench(benchmark, lambda: tiles.ops.contrast_fwd(tiles.partials, tiles.rows, completions))


@pytest.mark.benchmark(group="gradient tile, one slice of the vocabulary")
def test_softmax_minus_label(benchmark: Any, tiles: Tiles) -> None:
    token_logps, lse = tiles.ops.merge_splits_fwd(tiles.partials, tiles.rows)
    out = gradient_tile(tiles)
    bench(
        benchmark,
        lambda: tiles.ops.softmax_minus_label(tiles.hidden_states, tiles.head, tiles.rows, token_logps, lse, 0, out),
    )


@pytest.mark.benchmark(group="gradient tile, one slice of the vocabulary")
def test_gradient_tile_gemm(benchmark: Any, tiles: Tiles) -> None:
    out = gradient_tile(tiles)
    weight = tiles.head.weight[: out.shape[1]]
    bench(benchmark, lambda: torch.mm(tiles.hidden_states, weight.T, out=out))


@pytest.mark.benchmark(group="rows scaled by their coefficient")
def test_scale_rows(benchmark: Any, tiles: Tiles) -> None:
    scale = torch.ones(len(tiles.rows.row_index), device=DEVICE)
    dtype = tiles.hidden_states.dtype
    bench(benchmark, lambda: tiles.ops.scale_rows(tiles.hidden_states, tiles.rows.row_index, scale, dtype))


def gradient_tile(tiles: Tiles) -> Tensor:
    num_rows, (vocab_size, hidden_size) = len(tiles.rows.row_index), tiles.head.weight.shape
    dtype = tiles.hidden_states.dtype
    width = slice_width(BUDGET, num_rows, (vocab_size, hidden_size), dtype, DEVICE, BACKEND)
    return tiles.hidden_states.new_empty((num_rows, width))
