"""Gradients from the tiles that are still there: the same as recomputed ones, whatever the chunks and slices."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from copg_kernels import copg_loss, linear_copg_loss, linear_sequence_loss, losses, sequence_loss
from copg_kernels.kernels import blocks, exp_tile
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.reference import linear_copg_loss_ref, linear_logps_ref, sequence_logps_ref
from copg_kernels.schedules import closed_groups, recompute, workspace
from copg_kernels.schedules.chunks import Batch, chunks_of, plan_chunks
from copg_kernels.schedules.workspace import balanced, default_workspace_bytes, kept_bytes_per_token
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import assert_close, relative_error, upcast
from tests.test_copg import loss_and_gradients, make_batch

V = 131
LENGTHS = [7, 5, 9, 3, 4, 11, 2, 6, 8, 10, 3, 12]


def small_batch(dtype=torch.float32) -> dict:
    """Of two splits of the vocabulary in the interpreter, the second a part of one, and four slices of 32."""
    return make_batch(dtype, V=97, H=24, lengths=LENGTHS)


CASES = {"torch, slices of 32": ("torch", 32), "torch, one slice": ("torch", 8192), "triton": ("triton", 0)}


@pytest.fixture(params=[name for name, (backend, _) in CASES.items() if backend in BACKENDS])
def backend(request, monkeypatch):
    """131 entries are one slice of the twins' vocabulary, unless slices are small."""
    backend, width = CASES[request.param]
    if width:
        for module in (exp_tile, workspace):
            monkeypatch.setattr(module, "SPLIT_TORCH", width)
    return backend


def test_plan():
    seqlens, groups = [0, 3, 5, 9, 12, 20, 21], [0, 2, 4, 6]  # groups of 5, 7 and 9 tokens
    plan = plan_chunks(seqlens, groups, bytes_per_token=10, workspace_bytes=125)
    assert [chunk.groups for chunk in plan] == [slice(0, 2), slice(2, 3)]
    assert [chunk.completions for chunk in plan] == [slice(0, 4), slice(4, 6)]
    assert [chunk.tokens for chunk in plan] == [slice(0, 12), slice(12, 21)]
    assert len(plan_chunks(seqlens, groups, 10, 210)) == 1
    assert len(plan_chunks(seqlens, groups, 10, 119)) == 3
    assert plan_chunks(seqlens, groups, 10, 89) is None


def test_chunks_are_as_even_as_their_number_allows():
    """The largest is as small as so many chunks can have it."""
    edges = [*range(0, 101, 10)]
    for seqlens, most, expected in (
        (edges, 40, [40, 40, 20]),
        (edges, 55, [50, 50]),
        (edges, 79, [50, 50]),
        ([0, 50, 55, 60, 65, 70], 50, [50, 20]),
    ):
        plan = plan_chunks(seqlens, [*range(len(seqlens))], 1, most)
        sizes = [chunk.tokens.stop - chunk.tokens.start for chunk in plan]
        assert sizes == expected and max(sizes) <= most


@pytest.mark.parametrize(
    ("num_tokens", "most", "expected"),
    [(8192, 4059, 2816), (8192, 4096, 4096), (8192, 9000, 8192), (100, 40, 34), (0, 5, 1), (300, 256, 256)],
)
def test_tokens_of_a_frozen_head_are_shared_out(num_tokens, most, expected):
    tokens = balanced(num_tokens, most)
    assert tokens == expected and tokens <= max(1, most)
    assert -(-num_tokens // tokens) == -(-num_tokens // most)  # no chunk more


@pytest.mark.parametrize("vocab_size", [1000, 128_256, 256_000])
def test_a_default_chunk_has_4096_tokens_of_any_vocabulary(vocab_size):
    weight = torch.empty(vocab_size, 2, dtype=torch.bfloat16, device=DEVICE)
    budget = default_workspace_bytes("triton", weight)
    assert budget >= 2**30
    assert budget // kept_bytes_per_token(vocab_size, torch.bfloat16, DEVICE, "triton") >= 4096
    assert default_workspace_bytes("torch", weight) == 2**27


@pytest.mark.parametrize(
    ("group_size", "average_logps"),
    [(2, True), (3, False), (4, True), (None, False), (None, True)],
    ids=["2-average", "3-sum", "4-average", "ragged-sum", "ragged-average"],
)
def test_against_float64_for_any_chunks(backend, group_size, average_logps):
    batch = small_batch()
    options = dict(beta=0.3, average_logps=average_logps)
    if average_logps:
        batch["ref_logps"] /= torch.tensor(LENGTHS, device=DEVICE)
    if group_size is None:
        options["cu_groups"] = torch.tensor([0, 2, 7, 12], dtype=torch.int32, device=DEVICE)
    else:
        options["group_size"] = group_size
    base = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float32), **options)
    gold = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), **options)
    for max_tokens in (45, 78):
        loss, gradients = chunked(batch, max_tokens, **options, backend=backend)
        torch.testing.assert_close(loss.double(), gold[0], rtol=1e-4, atol=0.0)
        for triple in zip(("hidden_states", "lm_head_weight"), gradients, base[1], gold[1], strict=True):
            assert_close(*triple)


@contextmanager
def chunks_of_tokens(max_tokens: int):
    """Chunks of at most so many tokens, whatever the workspace would hold."""

    def plan(batch, needs, **options):
        completions = batch.completions
        return plan_chunks(completions.cu_seqlens.tolist(), completions.cu_groups.tolist(), 1, max_tokens)

    with pytest.MonkeyPatch.context() as patch:
        for module in (closed_groups, sequence_loss):
            patch.setattr(module, "chunks_of", plan)
        yield


def chunked(batch: dict, max_tokens: int, **options):
    with chunks_of_tokens(max_tokens):
        return loss_and_gradients(linear_copg_loss, batch, **options)


def test_recomputed_and_closed_agree(backend):
    batch = small_batch()
    closed = chunked(batch, 78, beta=0.3, group_size=2, backend=backend)
    recomputed = chunked(batch, 1, beta=0.3, group_size=2, backend=backend)
    assert relative_error(closed[0], recomputed[0]) < 1e-5
    assert all(relative_error(*pair) < 1e-5 for pair in zip(closed[1], recomputed[1], strict=True))


def test_plan_of_equal_sizes_reads_nothing_from_the_device():
    """Padded batches of equal groups: two numbers of the host say where every chunk ends. A plan asks a backend for
    its sizes only."""
    hidden_states, head = torch.randn(48, 8), Head(torch.randn(V, 8), None, 1.0, None, 1.0)
    numbers = torch.zeros(8)
    completions = Completions(None, None, numbers, numbers, 0.3, False, num_groups=2, equal_sizes=(6, 4))
    batch = Batch(hidden_states, head, torch.zeros(48, dtype=torch.long), completions, -100)
    needs = recompute.Needs(True, True, False)
    chunks = chunks_of(batch, needs, workspace_bytes=24 * V * 4, backend="torch")
    assert [chunk.tokens for chunk in chunks] == [slice(0, 24), slice(24, 48)]
    assert [chunk.completions for chunk in chunks] == [slice(0, 4), slice(4, 8)]


def test_log_probs_do_not_depend_on_the_schedule(backend):
    if backend == "torch" and DEVICE.type == "cuda":
        pytest.skip("cuBLAS sums in another order for another shape")
    length = 11 if backend == "triton" else 70  # of a row block and a half, for a kernel
    batch = make_batch(lengths=[length] * 4)
    closed = linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend)
    with torch.no_grad():
        streamed = linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend)
    weight = batch["lm_head_weight"]
    least = workspace.least_workspace_bytes(4 * length, weight.shape[1], weight.dtype, DEVICE, backend)
    recomputed = linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend, workspace_bytes=least)
    batch["lm_head_weight"].requires_grad_(False)
    frozen = linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend, workspace_bytes=least)
    units = [output.gemm_units.item() for output in (closed, streamed, recomputed, frozen)]
    assert units == ([3, 1, 4, 2] if backend == "triton" else [3, 1, 3, 2])
    for other in (streamed, recomputed, frozen):
        assert torch.equal(closed.logps, other.logps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_tokens", [45, 78])
def test_16_bit_operands(backend, dtype, max_tokens):
    if backend == "triton" and dtype == torch.float16:
        pytest.skip("float16 is recomputed")
    batch = small_batch(dtype)
    _, gradients = chunked(batch, max_tokens, beta=0.3, group_size=2, backend=backend)
    base = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float32), beta=0.3, group_size=2)
    gold = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), beta=0.3, group_size=2)
    for triple in zip(("hidden_states", "lm_head_weight"), gradients, base[1], gold[1], strict=True):
        assert triple[1].dtype == dtype
        assert_close(*triple)


@pytest.mark.parametrize("max_tokens", [1000, 60, 1], ids=["one chunk", "chunks", "a group too large"])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen head"])
def test_small_gradients_of_float16_wait_for_the_loss_scale(frozen_head, max_tokens, backend):
    """Unscaled they are under float16's 6e-8: a gradient scaler must find them in what is kept until backward."""
    if backend == "triton" and max_tokens > 1:
        pytest.skip("kernels do not keep a float16 tile: their logits are recomputed")
    batch = small_batch(torch.float16)
    batch["lm_head_weight"].requires_grad_(not frozen_head)
    options = dict(beta=1e-10, group_size=2)
    batch["rewards"] = batch["rewards"] * 1e-8
    batch["ref_logps"] = linear_copg_loss(**batch, **options, backend=backend).logps
    scale = 2.0**27
    with chunks_of_tokens(max_tokens):
        loss = linear_copg_loss(**batch, **options, backend=backend).loss * scale
    wide = upcast(batch, torch.float64)
    gold = linear_copg_loss_ref(**wide, **options) * scale
    names = [name for name in ("hidden_states", "lm_head_weight") if batch[name].requires_grad]
    for name in names:
        (gradient,) = torch.autograd.grad(loss, batch[name], retain_graph=True)
        (exact,) = torch.autograd.grad(gold, wide[name], retain_graph=True)
        assert exact.abs().max() / scale < 6e-8 and relative_error(gradient, exact) < 1e-3


def test_head_options(backend):
    batch = make_batch(lengths=LENGTHS)
    head = dict(bias=torch.randn(V, device=DEVICE, requires_grad=True), logit_scale=0.8, softcap=6.0, temperature=1.25)
    inputs = (batch["hidden_states"], batch["lm_head_weight"], head["bias"])
    with chunks_of_tokens(45):
        loss = linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend, **head).loss
    wide, wide_head = upcast(batch, torch.float64), upcast(head, torch.float64)
    gold = linear_copg_loss_ref(**wide, beta=0.3, group_size=2, **wide_head)
    gold_inputs = (wide["hidden_states"], wide["lm_head_weight"], wide_head["bias"])
    for gradient, exact in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(gold, gold_inputs), strict=True):
        assert relative_error(gradient, exact) < 1e-4


def test_gradcheck():
    """In float64, which kernels do not take."""
    batch = upcast(make_batch(V=41, H=3, lengths=[4, 3, 5, 2]), torch.float64)

    def loss(hidden_states, lm_head_weight):
        inputs = dict(batch, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
        return linear_copg_loss(**inputs, beta=0.3, group_size=2, softcap=6.0, backend="torch").loss

    assert torch.autograd.gradcheck(loss, (batch["hidden_states"], batch["lm_head_weight"]))


def test_a_slice_without_mass_but_for_its_label(backend):
    """Its factor exp(base - lse) is e^-200: expm1(logp) over that would overflow."""
    assert_extreme_logits(backend, {3: 5.0, 60: 5.0}, -200.0)


def test_a_reference_too_far_from_the_log_sum_exp(backend):
    """The first logits are 205 below the largest: exponentials relative to them overflow, and are computed again."""
    assert_extreme_logits(backend, {100: 5.0, 120: 5.0}, -200.0)


def assert_extreme_logits(backend, large: dict[int, float], others: float):
    hidden_states = torch.ones(40, 1, device=DEVICE, requires_grad=True)
    weight = torch.full((V, 1), others, device=DEVICE)
    for entry, logit in large.items():
        weight[entry] = logit
    weight.requires_grad_()
    labels = torch.tensor([*large] * 20, device=DEVICE)
    labels[0] = -100
    batch = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels)
    batch |= dict(ref_logps=torch.zeros(2, device=DEVICE), rewards=torch.tensor([1.0, 0.0], device=DEVICE))
    batch["cu_seqlens"] = torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE)
    _, gradients = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend)
    _, gold = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), beta=0.3, group_size=2)
    assert relative_error(gradients[1], gold[1]) < 1e-6
    assert (gradients[0].double() - gold[0]).norm() < 1e-5 * gold[1].norm()


def test_nan_of_an_ignored_token_goes_nowhere(backend):
    batch = small_batch()
    batch["labels"][0] = -100
    clean = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend)
    with torch.no_grad():
        batch["hidden_states"][batch["labels"] == -100] = float("nan")
    poisoned = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend)
    assert torch.equal(clean[0], poisoned[0])
    assert all(torch.equal(*pair) for pair in zip(clean[1], poisoned[1], strict=True))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "TMA"])
def test_both_ways_to_store_a_tile(use_tma, monkeypatch):
    """Through a tensor descriptor and through pointers."""
    batch = make_batch(lengths=LENGTHS, H=64)
    usual = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend="triton")
    key = blocks.device_kind(DEVICE), 4
    monkeypatch.setitem(blocks.BLOCKS, key, blocks.BLOCKS[key]._replace(use_tma=use_tma))
    other = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend="triton")
    assert all(relative_error(*pair) < 1e-6 for pair in zip(usual[1], other[1], strict=True))


@pytest.mark.parametrize("max_tokens, units", [(78, (3, 2, 2)), (1, (4, 2, 3))], ids=["closed", "a group too large"])
def test_only_the_gradients_that_are_wanted(backend, max_tokens, units):
    """With a frozen head a group may lie in many chunks: two units all the same."""
    for (hidden, weight), expected in zip(((True, True), (True, False), (False, True)), units, strict=True):
        batch = small_batch()
        _, gold = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), beta=0.3, group_size=2)
        batch["hidden_states"].requires_grad_(hidden)
        batch["lm_head_weight"].requires_grad_(weight)
        with chunks_of_tokens(max_tokens):
            output = linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend, workspace_bytes=80 * 256 * 4)
        output.loss.backward()
        assert output.gemm_units == expected
        for x, exact, needed in zip(
            (batch["hidden_states"], batch["lm_head_weight"]), gold, (hidden, weight), strict=True
        ):
            assert relative_error(x.grad, exact) < 1e-5 if needed else x.grad is None


def test_units_that_the_output_names(backend):
    batch = small_batch()
    assert linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend).gemm_units == 3
    assert linear_sequence_loss(**batch, loss=copg_loss, beta=0.3, group_size=2, backend=backend).gemm_units == 3
    with torch.no_grad():
        assert linear_sequence_loss(**batch, loss=copg_loss, beta=0.3, group_size=2, backend=backend).gemm_units == 1


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_float16_is_recomputed_by_the_kernels():
    batch = small_batch(torch.float16)
    assert linear_copg_loss(**batch, beta=0.3, group_size=2, backend="triton").gemm_units == 4
    batch["lm_head_weight"].requires_grad_(False)
    assert linear_copg_loss(**batch, beta=0.3, group_size=2, backend="triton").gemm_units == 3


def unfused(loss, batch: dict, **options):
    """The loss on log-probabilities from full logits, in float64."""
    wide = upcast(batch, torch.float64)
    token_logps = linear_logps_ref(wide["hidden_states"], wide["lm_head_weight"], wide["labels"])
    average = options.pop("average_logps", False)
    logps = sequence_logps_ref(token_logps, wide["labels"], cu_seqlens=wide["cu_seqlens"], average=average)
    value = loss(logps, wide["ref_logps"], wide["rewards"], **options)
    return value.detach(), torch.autograd.grad(value, (wide["hidden_states"], wide["lm_head_weight"]))


def fourth_powers(logps, ref_logps, rewards, *, beta, group_size):
    return ((logps - ref_logps - rewards / beta) ** 4).mean()


@losses.separable
def declared(logps, ref_logps, rewards, *, beta, group_size):
    return fourth_powers(logps, ref_logps, rewards, beta=beta, group_size=group_size)


def not_separable(logps, ref_logps, rewards, *, beta, group_size):
    return (logps - ref_logps - rewards / beta).square().mean().sqrt()


@losses.separable
def wrongly_declared(logps, ref_logps, rewards, *, beta, group_size):
    return not_separable(logps, ref_logps, rewards, beta=beta, group_size=group_size)


@pytest.mark.parametrize(
    "loss, units, average_logps",
    [
        pytest.param(losses.dpo_loss, 3, False, id="dpo-sum"),
        pytest.param(losses.rloo_loss, 3, True, id="rloo-average"),
        pytest.param(declared, 3, False, id="own-sum"),
        pytest.param(fourth_powers, 4, True, id="own, undeclared-average"),
        pytest.param(not_separable, 4, False, id="not separable-sum"),
        pytest.param(wrongly_declared, 4, True, id="wrongly declared-average"),
        pytest.param("ppo", 3, False, id="ppo-sum"),
        pytest.param("ppo", 3, True, id="ppo-average"),
    ],
)
def test_any_loss_in_chunks(backend, loss, units, average_logps):
    """Per-completion arguments of a loss are never cut: ppo's old_logps are those of the whole batch."""
    batch = small_batch()
    if average_logps:
        batch["ref_logps"] /= torch.tensor(LENGTHS, device=DEVICE)
    if loss == "ppo":
        loss = partial(losses.ppo_loss, old_logps=batch["ref_logps"].clone(), clip=0.5)
    options = dict(beta=0.3, group_size=3, average_logps=average_logps)
    with chunks_of_tokens(45):
        output = linear_sequence_loss(**batch, loss=loss, backend=backend, **options)
    gradients = torch.autograd.grad(output.loss, (batch["hidden_states"], batch["lm_head_weight"]))
    if isinstance(loss, partial):
        loss = partial(losses.ppo_loss, old_logps=batch["ref_logps"].double(), clip=0.5)
    gold, gold_gradients = unfused(loss, batch, **options)
    assert output.gemm_units == units
    torch.testing.assert_close(output.loss.double(), gold, rtol=1e-4, atol=1e-5)
    assert all(relative_error(*pair) < 1e-4 for pair in zip(gradients, gold_gradients, strict=True))


def test_any_loss_keeps_the_shape_of_padded_batches():
    batch = make_batch(lengths=[6, 6, 6, 6])
    packed = torch.autograd.grad(
        linear_sequence_loss(**batch, loss=losses.dpo_loss, beta=0.3, group_size=2).loss, batch["hidden_states"]
    )
    padded = dict(batch, cu_seqlens=None, labels=batch["labels"].view(4, 6))
    padded["hidden_states"] = batch["hidden_states"].detach().view(4, 6, -1).requires_grad_()
    loss = linear_sequence_loss(**padded, loss=losses.dpo_loss, beta=0.3, group_size=2).loss
    (gradient,) = torch.autograd.grad(loss, padded["hidden_states"])
    assert torch.equal(gradient.flatten(0, 1), packed[0])
