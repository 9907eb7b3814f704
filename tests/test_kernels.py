"""Each Triton tile operation against its torch twin, and the packing of rows they share."""

import pytest
import torch

from bench.inputs import Shape
from bench.tiles import make_tiles
from copg_kernels.kernels.blocks import head_blocks
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import pack_rows
from copg_kernels.kernels.row_slopes import slopes_of_logps
from copg_kernels.schedules.tile_ops import counted_rows, tile_ops
from copg_kernels.schedules.workspace import kept_elements, tile_in
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton"),
    pytest.mark.usefixtures("audited_launches"),
]

T, H = 37, 40
WIDTH = 64  # of the twin's slices


def entries_of_two_splits() -> int:
    blocks = head_blocks(torch.empty(1, H, device=DEVICE))
    return max(150, blocks.BLOCK_V * blocks.tiles_per_split + 22)


V = entries_of_two_splits() if "triton" in BACKENDS else 0


def operands():
    head = Head(torch.randn(V, H, device=DEVICE) * 0.5, torch.randn(V, device=DEVICE), 0.9, 8.0, 1.25)
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[::4] = -100
    return torch.randn(T, H, device=DEVICE), head, labels


def forward(backend: str, hidden_states, head, labels):
    packed, rows = counted_rows(hidden_states, labels, -100, backend)
    return packed, rows, tile_ops(backend).linear_logps_fwd(packed, head, rows, WIDTH)


def test_pack_rows():
    labels = torch.tensor([7, -100, 3, -100, 5], device=DEVICE)
    rows = pack_rows(labels, -100, exact=False)
    assert rows.row_index.tolist() == [0, 2, 4, 1, 3] and rows.num_rows.tolist() == [3]
    assert rows.position.tolist() == [0, 3, 1, 4, 2] and rows.labels[:3].tolist() == [7, 3, 5]
    assert pack_rows(labels, -100, exact=True).row_index.tolist() == [0, 2, 4]


def test_merged_statistics_agree():
    inputs = operands()
    results = []
    for backend in ("triton", "torch"):
        _, rows, partials = forward(backend, *inputs)
        results.append(tile_ops(backend).merge_splits_fwd(partials, rows))
        assert partials.max.shape[0] > 1
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_lse_and_its_residual_add_up():
    """At logits near 1000 the rounding of lse alone is 3e-5."""
    hidden_states, _, labels = operands()
    head = Head(torch.randn(V, H, device=DEVICE), torch.full((V,), 1000.0, device=DEVICE), 1.0, None, 1.0)
    z = hidden_states.double() @ head.weight.double().T + 1000
    gold = z.logsumexp(1).where(labels != -100, 0.0)
    for backend in ("triton", "torch"):
        _, rows, partials = forward(backend, hidden_states, head, labels)
        _, lse = tile_ops(backend).merge_splits_fwd(partials, rows)
        assert (lse[0] - gold).abs().max() < 3e-4
        # The residual is what the sum of its parts rounds off: at most half a spacing of lse.
        assert 1e-6 < lse[1].abs().max() <= torch.finfo(torch.float32).eps * 1024 / 2


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
def test_contrast_agrees(average):
    hidden_states, head, labels = operands()
    cu_seqlens = torch.tensor([0, 5, 9, 20, 22, 37], dtype=torch.int32, device=DEVICE)
    cu_groups = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    completions = Completions(cu_seqlens, cu_groups, *torch.randn(2, 5, device=DEVICE), 0.3, average, 2)
    results = []
    for backend in ("triton", "torch"):
        _, rows, partials = forward(backend, hidden_states, head, labels)
        results.append(tile_ops(backend).contrast_fwd(partials, rows, completions))
    for name, triton_result, torch_result in zip(results[0]._fields, *results, strict=True):
        torch.testing.assert_close(triton_result, torch_result, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_contrast_of_a_group_larger_than_its_block():
    """70 completions of 3 tokens in one group, more than BLOCK_K = 32."""
    N = 70
    hidden_states, head, _ = operands()
    hidden_states, labels = torch.randn(3 * N, H, device=DEVICE), torch.randint(V, (3 * N,), device=DEVICE)
    cu_seqlens = torch.arange(0, 3 * N + 1, 3, dtype=torch.int32, device=DEVICE)
    cu_groups = torch.tensor([0, N], dtype=torch.int32, device=DEVICE)
    completions = Completions(cu_seqlens, cu_groups, *torch.randn(2, N, device=DEVICE), 0.3, False, 1)
    losses, coefficients = [], []
    for backend in ("triton", "torch"):
        _, rows, partials = forward(backend, hidden_states, head, labels)
        contrast = tile_ops(backend).contrast_fwd(partials, rows, completions)
        losses.append(contrast.loss)
        coefficients.append(contrast.coefficients)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(*coefficients, rtol=1e-4, atol=1e-7)


def test_tile_agrees_and_ignored_rows_are_zero():
    hidden_states, head, labels = operands()
    tiles = []
    for backend in ("triton", "torch"):
        packed, rows, partials = forward(backend, hidden_states, head, labels)
        per_token_logps, lse = tile_ops(backend).merge_splits_fwd(partials, rows)
        start, R = 128, rows.row_index.numel()
        workspace = torch.empty(kept_elements(R, V - start, backend), device=DEVICE)
        out = tile_in(workspace, R, V - start, backend)
        tile_ops(backend).softmax_minus_label(packed, head, rows, slopes_of_logps(per_token_logps), lse, start, out)
        num_rows = rows.num_rows.item()
        assert backend == "torch" or (out[num_rows:] == 0).all()
        tiles.append(out[:num_rows, -22:])
    assert relative_error(*tiles) < 1e-5


def test_scale_rows():
    source = torch.randn(5, H, device=DEVICE)
    source[1] = float("nan")
    index = torch.tensor([4, 1, 0], device=DEVICE)
    scale = torch.tensor([2.0, 0.0, -1.0], device=DEVICE)
    expected = torch.stack([2 * source[4], torch.zeros_like(source[0]), -source[0]])
    for backend in ("triton", "torch"):
        assert torch.equal(tile_ops(backend).scale_rows(source, index, scale, torch.float32), expected)
        halves = tile_ops(backend).scale_rows(source, index, scale, torch.float16)
        assert torch.equal(halves, expected.half())


def test_the_tile_that_is_timed_is_one_that_kernels_can_write():
    found = []
    for backend in BACKENDS:
        tiles = make_tiles(Shape("", 97, 16, 20, 10), torch.float32, DEVICE, backend)
        token_logps, lse = tiles.ops.merge_splits_fwd(tiles.forward(), tiles.rows)
        out = tiles.gradient_tile()
        slopes = slopes_of_logps(token_logps)
        tiles.ops.softmax_minus_label(tiles.hidden_states, tiles.head, tiles.rows, slopes, lse, 0, out)
        found.append(out[: tiles.rows.num_rows])
    assert all(relative_error(tile, found[0]) < 1e-5 for tile in found)
