"""The other way to the logits: a library's float32 product, a slice of the vocabulary at a time, which kernels read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from copg_kernels import linear_copg_loss
from copg_kernels.kernels import product_slices
from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.product_slices import blocks_of, products
from copg_kernels.schedules import forward
from copg_kernels.tuned import Settings, trying
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import relative_error

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
ROOT = Path(__file__).resolve().parents[1]
T, V, H = 24, 200, 32
FUSED, SLICED = Settings(), Settings(logps="sliced", loss="sliced")


def batch(dtype=torch.float32) -> dict:
    labels = torch.randint(V, (4, T // 4), device=DEVICE)
    labels[1, 2:4] = -100
    return dict(
        hidden_states=torch.randn(4, T // 4, H, device=DEVICE).to(dtype).requires_grad_(),
        lm_head_weight=torch.randn(V, H, device=DEVICE).to(dtype).requires_grad_(),
        labels=labels,
    )


def loss(given: dict, **options) -> torch.Tensor:
    numbers = dict(ref_logps=torch.zeros(4, device=DEVICE), rewards=torch.arange(4.0, device=DEVICE))
    return linear_copg_loss(**given, **numbers, beta=0.3, group_size=2, backend="triton", **options).loss


def gradients(value: torch.Tensor, given: dict) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value, (given["hidden_states"], given["lm_head_weight"]))


@pytest.mark.parametrize("workspace", [None, 2**14], ids=["whole groups", "recomputed"])
@pytest.mark.parametrize("slice_bytes", [1, 2**28], ids=["slices of a split", "one slice"])
def test_both_ways_agree(slice_bytes, workspace, monkeypatch):
    monkeypatch.setattr(product_slices, "SLICE_BYTES", slice_bytes)
    given, found = batch(), []
    for settings in (FUSED, SLICED):
        with trying(settings):
            value = loss(given, workspace_bytes=workspace)
            found.append((value, *gradients(value, given)))
    assert all(relative_error(*pair) < 1e-5 for pair in zip(*found, strict=True))


def test_it_is_the_library_that_multiplies():
    """One unit for log-probabilities; in the kernels' own way there is nothing for the counter to see."""
    hidden_states, weight = torch.randn(T, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    labels, units = torch.randint(V, (T,), device=DEVICE), {}
    options = dict(ignore_index=-100, workspace_bytes=2**20, backend="triton")
    for name, settings in dict(fused=FUSED, sliced=SLICED).items():
        with trying(settings), FlopCounterMode(display=False) as counter:
            forward.token_logps(hidden_states, Head(weight, None, 1.0, None, 1.0), labels, **options)
        units[name] = counter.get_total_flops() / (2 * T * V * H)
    assert units == dict(fused=0.0, sliced=1.0)


@pytest.mark.parametrize("rows, expected", [(100, 4), (1000, 1)])
def test_slices_are_whole_splits_within_the_budget(rows, expected, monkeypatch):
    """One split at least, so that a statistic belongs to one launch."""
    hidden_states, weight = torch.empty(rows, 1, device=DEVICE), torch.zeros(2048, 1, device=DEVICE)
    blocks = head_blocks(weight)
    split = blocks.BLOCK_V * blocks.tiles_per_split
    monkeypatch.setattr(product_slices, "SLICE_BYTES", 4 * 400 * split)
    slices = [
        (start, stop, product.shape)
        for start, stop, product in products(hidden_states, weight, 0, 2048, blocks, "sliced")
    ]
    assert [start for start, *_ in slices] == list(range(0, 2048, expected * split))
    assert all(stop - start == shape[1] and shape[0] == len(hidden_states) for start, stop, shape in slices)


def test_a_kernel_that_only_reads_has_the_statistics_of_one_that_multiplies():
    """As wide, and as many to a split: `fold_tiles` and the merges know no way."""
    weight = torch.empty(V, H, device=DEVICE)
    fused, sliced = blocks_of(weight, "fused"), blocks_of(weight, "sliced")
    assert (fused.BLOCK_V, fused.tiles_per_split) == (sliced.BLOCK_V, sliced.tiles_per_split)
    assert not sliced.use_tma and sliced.num_stages == 1


class _OnAGpu:
    is_cuda, device, dtype, shape = True, torch.device("cpu"), torch.float32, (8, 4)


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "fused"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "fused"),
        ("pass", "sliced"),
    ],
)
def test_float32_keeps_its_digits(setting, expected):
    """In a process of its own: of the names for this setting, some raise where others were used before."""
    script = f"""
import torch
from copg_kernels.kernels.product_slices import way_of
from copg_kernels.tuned import Settings, trying
from tests.test_product_slices import _OnAGpu
{setting}
with trying(Settings(logps="sliced")):
    print(way_of(_OnAGpu, "logps"), way_of(_OnAGpu, "loss"))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == [expected, "fused"]
