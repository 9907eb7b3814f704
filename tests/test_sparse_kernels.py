"""The compact tile of the kernels: what it keeps, its products, and the exact ones where it overflows."""

import pytest
import torch

from bench.inputs import Shape, make_inputs
from copg_kernels import linear_copg_loss, linear_logps
from copg_kernels.kernels.compact_tile import Columns, Pool, compact_tile
from copg_kernels.kernels.count_significant import BLOCK
from copg_kernels.kernels.dense_product import dense_product
from copg_kernels.kernels.gather_product import gather_product
from copg_kernels.kernels.pack_rows import pack_rows
from copg_kernels.kernels.place_labels import SoftmaxSlice
from copg_kernels.reference import linear_copg_loss_ref, linear_logps_bwd_ref
from copg_kernels.schedules import closed_groups, compact_tiles, sparse_tiles
from copg_kernels.schedules.recompute import Needs
from copg_kernels.schedules.workspace import kept_bytes_per_token, kept_elements, tile_in
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import relative_error, upcast

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")

# Two blocks of 128, of rows and of columns, and lists of two steps of 64 and a part.
T, V, H = 150, 132, 24
EPS = 2.0**-12


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Slots for everything, unless a test says otherwise: a small vocabulary is dense."""
    monkeypatch.setattr(compact_tiles, "MOST_KEPT", 1.0)
    monkeypatch.setattr(compact_tiles, "MOST_OF_BOTH", 2.0)


def softmax_slice():
    """A tile of a softmax minus one-hot with its factors; the last tokens ignored."""
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[-10:] = -100
    rows = pack_rows(labels, -100, exact=False)
    counted = torch.arange(T, device=DEVICE) < T - 10
    softmax = (4 * torch.randn(T, V, device=DEVICE)).softmax(1)
    softmax[torch.arange(T, device=DEVICE), rows.labels.clamp_min(0)] -= 1
    factor = torch.where(counted, torch.rand(T, device=DEVICE) + 0.5, 0.0)
    tile = torch.where(counted[:, None], softmax / factor[:, None], 0.0)
    wide = torch.full((T, V + 24), float("nan"), device=DEVICE)
    wide[:, :V] = tile
    wide[:, V : -(-V // 16) * 16] = 0.0
    return SoftmaxSlice(0, V, wide[:, :V], factor), rows, torch.where(counted[:, None], softmax, 0.0)


BLOCKS = [(Columns.UNWANTED, True), (Columns.IN_TILE, True), (Columns.IN_TILE, False), (Columns.COPIED, False)]


def of_blocks(rows_in_blocks: bool, pools: tuple[Pool, Pool | None]) -> Pool:
    by_rows, by_columns = pools
    return by_rows if rows_in_blocks else by_columns


def values_of(pool: Pool, block: int, factor: torch.Tensor) -> torch.Tensor:
    """(slots, members) of a block's values, wherever they are."""
    slots = slice(*pool.offsets[block : block + 2].tolist())
    if not pool.in_tile:
        return pool.values[slots]
    entries = pool.entries[slots].long()
    return (pool.values * factor[:, None])[entries, block * BLOCK : (block + 1) * BLOCK]


@pytest.mark.parametrize("columns, rows_in_blocks", BLOCKS)
def test_what_a_compact_tile_holds(columns, rows_in_blocks):
    part, rows, exact = softmax_slice()
    members, entries = (T, V) if rows_in_blocks else (V, T)
    exact = exact if rows_in_blocks else exact.T
    eps = 0.02
    capacity = 2 * (T + V)
    pool = of_blocks(rows_in_blocks, compact_tile(part, rows, eps, capacity, columns))
    assert pool.overflow.item() == 0 and pool.in_tile == (columns == Columns.IN_TILE and not rows_in_blocks)
    dropped = torch.zeros_like(exact)
    for block, first in enumerate(range(0, members, BLOCK)):
        mine = exact[first : first + BLOCK]
        significant = ((mine >= eps) | (mine < 0)).any(0)
        slots = slice(*pool.offsets[block : block + 2].tolist())
        assert pool.entries[slots].tolist() == significant.nonzero().squeeze(1).tolist()
        values = values_of(pool, block, part.factor).T[: len(mine)]
        torch.testing.assert_close(values, mine[:, significant], rtol=1e-5, atol=1e-7)
        dropped[first : first + BLOCK] = mine.masked_fill(significant, 0.0)
    assert 0 < pool.offsets[-1] - pool.offsets[0] < capacity and dropped.max() > 0
    torch.testing.assert_close(pool.dropped, dropped.sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pool.dropped_list, dropped.sum(0), rtol=1e-4, atol=1e-6)


def test_both_directions_share_their_slots():
    """Those of the blocks of columns come behind; where they do not fit, the others are as they would be alone."""
    part, rows, _ = softmax_slice()
    alone, _ = compact_tile(part, rows, 0.02, 1000, Columns.UNWANTED)
    _, apart = compact_tile(part, rows, 0.02, 1000, Columns.IN_TILE)
    of_rows, of_columns = int(alone.offsets[-1]), int(apart.offsets[-1] - apart.offsets[0])
    for room, overflows in ((of_rows + of_columns, 0), (of_rows + of_columns - 1, 1)):
        by_rows, by_columns = compact_tile(part, rows, 0.02, room, Columns.COPIED)
        assert (by_rows.overflow.item(), by_columns.overflow.item()) == (0, overflows)
        assert torch.equal(by_columns.offsets, apart.offsets - 1000 + of_rows)
        assert torch.equal(by_rows.entries[:of_rows], alone.entries[:of_rows])
        assert torch.equal(by_rows.values[:of_rows], alone.values[:of_rows])
    by_rows, by_columns = compact_tile(part, rows, 0.02, of_rows - 1, Columns.COPIED)
    assert (by_rows.overflow.item(), by_columns.overflow.item()) == (1, 1)


@pytest.mark.parametrize("columns, bytes_per_slot", [(Columns.IN_TILE, 4 * BLOCK + 8), (Columns.COPIED, 4 * BLOCK + 4)])
def test_what_slots_take(columns, bytes_per_slot):
    """Of float32: one direction's values and both lists, or one list and values that both share."""
    part, rows, _ = softmax_slice()
    tensors = [x for pool in compact_tile(part, rows, 0.02, 1000, columns) for x in (pool.entries, pool.values)]
    new = {x.data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.data_ptr() != part.tile.data_ptr()}
    assert sum(new.values()) == 1000 * bytes_per_slot


def tile_of(matrix: torch.Tensor, rows_in_blocks: bool) -> torch.Tensor:
    """The same numbers, as the kernels keep a tile (R, V) and as they see it by columns."""
    matrix = matrix if rows_in_blocks else matrix.T
    tile = tile_in(torch.zeros(kept_elements(*matrix.shape, "triton"), device=DEVICE), *matrix.shape, "triton")
    tile.copy_(matrix)
    return tile if rows_in_blocks else tile.T


@pytest.mark.parametrize("columns, rows_in_blocks", BLOCKS)
@pytest.mark.parametrize("overflow", [False, True], ids=["compact", "overflow"])
def test_products(columns, rows_in_blocks, overflow):
    """Nothing dropped: the product with the whole tile; overflowed: 0, and the dense product instead."""
    part, rows, exact = softmax_slice()
    members, entries = (T, V) if rows_in_blocks else (V, T)
    exact = exact if rows_in_blocks else exact.T
    pool = of_blocks(rows_in_blocks, compact_tile(part, rows, 1e-12, 3 if overflow else 2 * (T + V), columns))
    assert pool.overflow.item() == overflow
    source, scale = torch.randn(entries, 150, device=DEVICE), torch.randn(members, device=DEVICE)
    mean, previous = torch.randn(150, device=DEVICE), torch.randn(members, 150, device=DEVICE)
    gold = (exact.double() @ source.double()) * scale.double()[:, None] + previous.double()
    out = previous.clone()
    of_values = source * part.factor[:, None] if pool.in_tile else source
    gather_product(pool, of_values, mean, scale, out, "ieee", add=True)
    if overflow:
        assert torch.equal(out, previous)
    dense_product(pool.overflow, tile_of(exact, rows_in_blocks), source, scale, out, "ieee")
    assert relative_error(out, gold) < 1e-5


def test_what_was_left_out_returns_as_its_mean():
    part, rows, exact = softmax_slice()
    pool, _ = compact_tile(part, rows, 0.02, 4 * V, Columns.UNWANTED)
    source, mean = torch.randn(V, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    with_mean, without = (torch.empty(T, 16, device=DEVICE) for _ in range(2))
    gather_product(pool, source, mean, None, with_mean, "ieee", add=False)
    gather_product(pool, source, 0 * mean, None, without, "ieee", add=False)
    torch.testing.assert_close(with_mean - without, torch.outer(pool.dropped, mean), rtol=1e-4, atol=1e-5)


def test_head_product_of_a_tile_that_stays():
    """Its factors are among the scales of the rows, and not in the mean of what was left out."""
    part, rows, exact = softmax_slice()
    counted = exact.any(1)
    hidden_states, scale = torch.randn(T, 16, device=DEVICE), torch.rand(T, device=DEVICE) * counted
    compact = compact_tiles.compacted(part, rows, 0.2, Needs(True, True, False), in_tile=True)
    out = torch.empty(V, 16, device=DEVICE)
    compact_tiles.write_weight_product(compact, part, hidden_states, scale, out, add=False)
    rows_of = [exact[:, start : start + BLOCK] for start in range(0, V, BLOCK)]
    kept = torch.cat([x * ((x >= 0.2) | (x < 0)).any(1, keepdim=True) for x in rows_of], 1)
    scaled, dropped = scale[:, None] * hidden_states, exact - kept
    mean = dropped.sum(1) @ scaled / dropped.sum()
    gold = kept.T @ scaled + torch.outer(dropped.sum(0), mean)
    assert dropped.sum() > 1 and relative_error(out, gold.double()) < 1e-5


def test_the_mean_of_rows_that_hold_a_factor():
    """What is left out of a tile that stays weighs rows whose scale holds the tile's factor."""
    mass, source, factor = torch.rand(5, device=DEVICE), torch.randn(5, 7, device=DEVICE), torch.rand(5, device=DEVICE)
    mass[2] = factor[2] = 0.0
    expected = compact_tiles.mean_row(mass, source)
    torch.testing.assert_close(compact_tiles.mean_row(mass, source * factor[:, None], factor), expected)


def operands(regime: str = "rl") -> tuple:
    inputs = make_inputs(Shape("", V, H, T, T // 2), regime, torch.float32, DEVICE)
    labels = inputs.labels.clone()
    labels[::7] = -100
    return inputs.hidden_states.detach().requires_grad_(), inputs.lm_head_weight.detach().requires_grad_(), labels


def gradients_of(inputs, dlogps, **options) -> tuple[torch.Tensor, tuple]:
    logps = linear_logps(*inputs, backend="triton", **options)
    return logps, torch.autograd.grad(logps, inputs[:2], dlogps)


@pytest.mark.parametrize(
    "most_kept, tokens", [(1.0, T), (0.0, 133)], ids=["compact, one chunk", "overflow, two chunks"]
)
def test_keeping_everything_is_exact(most_kept, tokens, monkeypatch):
    workspace = tokens * kept_bytes_per_token(V, torch.float32, DEVICE, "triton")
    monkeypatch.setattr(compact_tiles, "MOST_KEPT", most_kept)
    inputs, dlogps = operands("base"), torch.randn(T, device=DEVICE)
    options = dict(bias=torch.randn(V, device=DEVICE), logit_scale=0.8, softcap=9.0, temperature=1.25)
    sparse, gradients = gradients_of(inputs, dlogps, sparse_eps=1e-12, workspace_bytes=workspace, **options)
    exact, exact_gradients = gradients_of(inputs, dlogps, **options)
    assert torch.equal(sparse, exact)
    assert sparse.sparsity.overflow == 1 - most_kept and (most_kept == 0 or sparse.sparsity.density > 0.9)
    assert all(relative_error(*pair) < 1e-5 for pair in zip(gradients, exact_gradients, strict=True))


def test_errors():
    """132 entries are few: what is dropped at 2^-9 is a percent of the mass."""
    inputs, dlogps = operands("rl"), torch.randn(T, device=DEVICE)
    sparse, gradients = gradients_of(inputs, dlogps, sparse_eps=2.0**-9)
    assert 0 < sparse.sparsity.density < 1 and sparse.sparsity.dropped > 1e-4
    wide = (dlogps.double(), *(x.detach().double() for x in inputs[:2]), inputs[2])
    errors = [relative_error(*pair) for pair in zip(gradients, linear_logps_bwd_ref(*wide), strict=False)]
    assert all(1e-6 < error < 3e-3 for error in errors)


def test_nan_of_an_ignored_token_goes_nowhere():
    inputs, dlogps = operands(), torch.randn(T, device=DEVICE)
    _, clean = gradients_of(inputs, dlogps, sparse_eps=EPS)
    ignored = inputs[2] == -100
    with torch.no_grad():
        inputs[0][ignored] = float("nan")
    dlogps[ignored] = float("nan")
    _, poisoned = gradients_of(inputs, dlogps, sparse_eps=EPS)
    assert all(torch.equal(*pair) for pair in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("V", [1, V])
def test_nan_of_an_ignored_token_goes_nowhere_in_a_fused_loss(V):
    """Not into the mean row of what was left out either, where its share is 0."""
    hidden_states, weight, labels = operands()
    weight, labels = weight[:V].detach().requires_grad_(), labels.clamp(max=V - 1)
    options = dict(beta=0.1, group_size=2, sparse_eps=2.0**-9, backend="triton")
    options |= dict(zip(("ref_logps", "rewards"), torch.randn(2, 2, device=DEVICE), strict=True))
    options |= dict(cu_seqlens=torch.tensor([0, 60, T], dtype=torch.int32, device=DEVICE))
    found = []
    for poison in (0.0, float("nan")):
        poisoned = hidden_states.detach().masked_fill((labels == -100)[:, None], poison).requires_grad_()
        loss = linear_copg_loss(poisoned, weight, labels, **options).loss
        found.append((loss, *torch.autograd.grad(loss, (poisoned, weight))))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [130, 80], ids=["tiles of whole groups", "groups exceed the workspace"])
def test_fused_loss(tokens):
    """Groups of 90 and 60 tokens; in chunks of 80 tokens their boundaries do not matter."""
    hidden_states, weight, labels = operands()
    numbers = torch.randn(2, 4, device=DEVICE)
    cu_seqlens = torch.tensor([0, 20, 90, 123, 150], dtype=torch.int32, device=DEVICE)
    batch = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels, cu_seqlens=cu_seqlens)
    batch |= dict(ref_logps=numbers[0], rewards=numbers[1])
    bias = torch.randn(V, device=DEVICE, requires_grad=True)
    options = dict(beta=0.1, group_size=2, bias=bias)
    workspace = tokens * kept_bytes_per_token(V, torch.float32, DEVICE, "triton")
    output = linear_copg_loss(**batch, **options, sparse_eps=2.0**-16, backend="triton", workspace_bytes=workspace)
    exact = linear_copg_loss(**batch, **options, backend="triton")
    assert torch.equal(output.logps, exact.logps) and output.gemm_units == 1 and output.sparsity.overflow == 0
    gradients = torch.autograd.grad(output.loss, (hidden_states, weight, bias))
    wide, wide_bias = upcast(batch, torch.float64), bias.detach().double().requires_grad_()
    gold = torch.autograd.grad(
        linear_copg_loss_ref(**wide, beta=0.1, group_size=2, bias=wide_bias),
        (wide["hidden_states"], wide["lm_head_weight"], wide_bias),
    )
    assert all(relative_error(*pair) < 1e-3 for pair in zip(gradients, gold, strict=True))
    weight.requires_grad_(False)
    frozen = linear_copg_loss(
        **batch, beta=0.1, group_size=2, bias=bias.detach(), sparse_eps=2.0**-16, backend="triton"
    )
    assert relative_error(torch.autograd.grad(frozen.loss, hidden_states)[0], gold[0]) < 1e-3


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_overflow_of_whole_groups_is_exact_without_a_logit_twice(num_chunks, monkeypatch):
    """The tile that found no place in its slots is multiplied as it stands."""
    monkeypatch.setattr(compact_tiles, "MOST_KEPT", 0.0)
    hidden_states, weight, labels = operands("base")
    batch = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels, beta=0.1, group_size=2)
    batch |= dict(cu_seqlens=torch.tensor([0, 20, 70, 110, 150], dtype=torch.int32, device=DEVICE))
    batch |= dict(zip(("ref_logps", "rewards"), torch.randn(2, 4, device=DEVICE), strict=True))
    workspace = (160 // num_chunks) * kept_bytes_per_token(V, torch.float32, DEVICE, "triton")
    computed = []
    original = closed_groups.counted_rows
    monkeypatch.setattr(closed_groups, "counted_rows", lambda *a: (computed.append(len(a[1])), original(*a))[1])
    monkeypatch.setattr(sparse_tiles, "compact_rows", None)  # the way of other upstream gradients is not taken
    sparse, exact = (
        linear_copg_loss(**batch, sparse_eps=eps, backend="triton", workspace_bytes=workspace) for eps in (EPS, None)
    )
    assert computed == {1: [150], 2: [70, 80]}[num_chunks] * 2
    assert sparse.sparsity.overflow == 1 and sparse.sparsity.density == 0 and exact.gemm_units == 3
    pairs = zip(*(torch.autograd.grad(o.loss, (hidden_states, weight)) for o in (sparse, exact)), strict=True)
    assert torch.equal(sparse.logps, exact.logps) and all(relative_error(*pair) < 1e-6 for pair in pairs)


def test_float16_is_refused():
    hidden_states, weight, labels = (x.half() if x.is_floating_point() else x for x in operands())
    with pytest.raises(
        ValueError, match=r"sparse_eps needs float32 or bfloat16 with backend 'triton', got torch.float16"
    ):
        linear_logps(hidden_states, weight, labels, backend="triton", sparse_eps=EPS)
