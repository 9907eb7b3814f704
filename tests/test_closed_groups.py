"""Gradients from the tiles that are still there: the same as recomputed ones, whatever the chunks and slices."""

from functools import partial

import pytest
import torch

from copg_kernels import copg_loss, linear_copg_loss, linear_sequence_loss, losses
from copg_kernels.kernels import linear_logps_fwd
from copg_kernels.reference import linear_copg_loss_ref, linear_logps_ref, sequence_logps_ref
from copg_kernels.schedules import closed_groups
from copg_kernels.schedules.closed_groups import plan_chunks
from tests.conftest import DEVICE
from tests.numerics import assert_close, relative_error, upcast
from tests.test_copg import loss_and_gradients, make_batch

V = 131
LENGTHS = [7, 5, 9, 3, 4, 11, 2, 6, 8, 10, 3, 12]


@pytest.fixture(params=[32, 8192], ids=["slices of 32", "one slice"])
def slices(request, monkeypatch):
    """131 entries are one slice of the vocabulary, unless slices are small."""
    monkeypatch.setattr(closed_groups, "SPLIT_TORCH", request.param)
    monkeypatch.setattr(linear_logps_fwd, "SPLIT_TORCH", request.param)


def test_plan():
    seqlens, groups = [0, 3, 5, 9, 12, 20, 21], [0, 2, 4, 6]  # groups of 5, 7 and 9 tokens
    plan = plan_chunks(seqlens, groups, bytes_per_token=10, workspace_bytes=125)
    assert [chunk.groups for chunk in plan] == [slice(0, 2), slice(2, 3)]
    assert [chunk.completions for chunk in plan] == [slice(0, 4), slice(4, 6)]
    assert [chunk.tokens for chunk in plan] == [slice(0, 12), slice(12, 21)]
    assert len(plan_chunks(seqlens, groups, 10, 210)) == 1
    assert len(plan_chunks(seqlens, groups, 10, 119)) == 3
    assert plan_chunks(seqlens, groups, 10, 89) is None


@pytest.mark.parametrize("average_logps", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("group_size", [2, 3, 4, None], ids=["2", "3", "4", "ragged"])
def test_against_float64_for_any_chunks(slices, group_size, average_logps):
    batch = make_batch(lengths=LENGTHS)
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
        loss, gradients = chunked(batch, max_tokens, **options, backend="torch")
        torch.testing.assert_close(loss.double(), gold[0], rtol=1e-4, atol=0.0)
        for triple in zip(("hidden_states", "lm_head_weight"), gradients, base[1], gold[1], strict=True):
            assert_close(*triple)


def chunked(batch: dict, max_tokens: int, **options):
    """linear_copg_loss with chunks of at most max_tokens, whatever the workspace would hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            closed_groups,
            "plan_chunks",
            lambda seqlens, groups, bytes_per_token, _: plan_chunks(seqlens, groups, 1, max_tokens),
        )
        return loss_and_gradients(linear_copg_loss, batch, **options)


def test_recomputed_and_closed_agree(slices):
    batch = make_batch(lengths=LENGTHS)
    closed = chunked(batch, 78, beta=0.3, backend="torch")
    recomputed = chunked(batch, 1, beta=0.3, backend="torch")
    assert relative_error(closed[0], recomputed[0]) < 1e-5
    assert all(relative_error(*pair) < 1e-5 for pair in zip(closed[1], recomputed[1], strict=True))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="cuBLAS sums in another order for another shape")
def test_log_probs_do_not_depend_on_the_schedule(slices):
    batch = make_batch(lengths=[70] * 4)
    closed = linear_copg_loss(**batch, beta=0.3, backend="torch")
    with torch.no_grad():
        streamed = linear_copg_loss(**batch, beta=0.3, backend="torch")
    assert closed.gemm_units == 3 and streamed.gemm_units == 1
    assert torch.equal(closed.logps, streamed.logps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_operands(slices, dtype):
    batch = make_batch(dtype, lengths=LENGTHS)
    _, gradients = chunked(batch, 45, beta=0.3, backend="torch")
    base = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float32), beta=0.3)
    gold = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), beta=0.3)
    for triple in zip(("hidden_states", "lm_head_weight"), gradients, base[1], gold[1], strict=True):
        assert triple[1].dtype == dtype
        assert_close(*triple)


def test_small_gradients_of_float16_wait_for_the_loss_scale():
    """Unscaled they are under float16's 6e-8: a gradient scaler must find them in what is kept until backward."""
    batch = make_batch(torch.float16)
    batch["rewards"] = batch["rewards"] * 1e-7
    batch["ref_logps"] = linear_copg_loss(**batch, beta=1e-9, backend="torch").logps
    scale = 2.0**24
    inputs = (batch["hidden_states"], batch["lm_head_weight"])
    gradients = torch.autograd.grad(linear_copg_loss(**batch, beta=1e-9, backend="torch").loss * scale, inputs)
    wide = upcast(batch, torch.float64)
    gold = linear_copg_loss_ref(**wide, beta=1e-9) * scale
    for gradient, exact in zip(
        gradients, torch.autograd.grad(gold, (wide["hidden_states"], wide["lm_head_weight"])), strict=True
    ):
        assert exact.abs().max() / scale < 6e-8 and relative_error(gradient, exact) < 1e-3


def test_head_options(slices):
    batch = make_batch(lengths=LENGTHS)
    head = dict(bias=torch.randn(V, device=DEVICE, requires_grad=True), logit_scale=0.8, softcap=6.0, temperature=1.25)
    inputs = (batch["hidden_states"], batch["lm_head_weight"], head["bias"])
    loss = linear_copg_loss(**batch, beta=0.3, backend="torch", **head).loss
    wide, wide_head = upcast(batch, torch.float64), upcast(head, torch.float64)
    gold = linear_copg_loss_ref(**wide, beta=0.3, **wide_head)
    gold_inputs = (wide["hidden_states"], wide["lm_head_weight"], wide_head["bias"])
    for gradient, exact in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(gold, gold_inputs), strict=True):
        assert relative_error(gradient, exact) < 1e-4


def test_gradcheck(slices):
    batch = upcast(make_batch(V=41, H=3, lengths=[4, 3, 5, 2]), torch.float64)

    def loss(hidden_states, lm_head_weight):
        inputs = dict(batch, hidden_states=hidden_states, lm_head_weight=lm_head_weight)
        return linear_copg_loss(**inputs, beta=0.3, softcap=6.0, backend="torch").loss

    assert torch.autograd.gradcheck(loss, (batch["hidden_states"], batch["lm_head_weight"]))


def test_a_slice_without_mass_but_for_its_label(slices):
    """Its factor exp(base - lse) is e^-200: expm1(logp) over that would overflow."""
    hidden_states = torch.ones(4, 1, device=DEVICE, requires_grad=True)
    weight = torch.full((V, 1), -200.0, device=DEVICE)
    weight[[3, 60]] = 5.0
    weight.requires_grad_()
    labels = torch.tensor([3, 60, 3, 60], device=DEVICE)
    batch = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels)
    batch |= dict(ref_logps=torch.zeros(2, device=DEVICE), rewards=torch.tensor([1.0, 0.0], device=DEVICE))
    batch["cu_seqlens"] = torch.tensor([0, 1, 4], dtype=torch.int32, device=DEVICE)
    _, gradients = loss_and_gradients(linear_copg_loss, batch, beta=0.3, backend="torch")
    _, gold = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), beta=0.3)
    assert relative_error(gradients[1], gold[1]) < 1e-6


@pytest.mark.parametrize("max_tokens, units", [(78, (3, 2, 2)), (1, (4, 3, 3))], ids=["closed", "recomputed"])
def test_only_the_gradients_that_are_wanted(slices, max_tokens, units):
    for (hidden, weight), expected in zip(((True, True), (True, False), (False, True)), units, strict=True):
        batch = make_batch(lengths=LENGTHS)
        batch["hidden_states"].requires_grad_(hidden)
        batch["lm_head_weight"].requires_grad_(weight)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(closed_groups, "plan_chunks", lambda s, g, b, w: plan_chunks(s, g, 1, max_tokens))
            output = linear_copg_loss(**batch, beta=0.3, backend="torch")
        output.loss.backward()
        assert output.gemm_units == expected
        assert (batch["hidden_states"].grad is not None, batch["lm_head_weight"].grad is not None) == (hidden, weight)


def test_backward_twice():
    batch = make_batch()
    loss = linear_copg_loss(**batch, beta=0.3, backend="torch").loss
    loss.backward(retain_graph=True)
    once = batch["lm_head_weight"].grad.clone()
    loss.backward()
    torch.testing.assert_close(batch["lm_head_weight"].grad, 2 * once)


def test_units_that_the_output_names(backend):
    batch = make_batch()
    expected = 3 if backend == "torch" else 4
    assert linear_copg_loss(**batch, beta=0.3, backend=backend).gemm_units == expected
    assert linear_sequence_loss(**batch, loss=copg_loss, beta=0.3, backend=backend).gemm_units == expected
    with torch.no_grad():
        assert linear_sequence_loss(**batch, loss=copg_loss, beta=0.3, backend=backend).gemm_units == 1


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


def not_separable(logps, ref_logps, rewards, *, beta, group_size):
    return (logps - ref_logps - rewards / beta).square().mean().sqrt()


@pytest.mark.parametrize("average_logps", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize(
    "loss, units",
    [(losses.dpo_loss, 3), (losses.rloo_loss, 3), (fourth_powers, 3), (not_separable, 6), ("ppo", 3)],
    ids=["dpo", "rloo", "own", "not separable", "ppo"],
)
def test_any_loss_in_chunks(loss, units, average_logps):
    """Per-completion arguments of a loss are never cut: ppo's old_logps are those of the whole batch."""
    batch = make_batch(lengths=LENGTHS)
    if average_logps:
        batch["ref_logps"] /= torch.tensor(LENGTHS, device=DEVICE)
    if loss == "ppo":
        loss = partial(losses.ppo_loss, old_logps=batch["ref_logps"].clone(), clip=0.5)
    options = dict(beta=0.3, group_size=3, average_logps=average_logps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_groups, "plan_chunks", lambda s, g, b, w: plan_chunks(s, g, 1, 45))
        output = linear_sequence_loss(**batch, loss=loss, backend="torch", **options)
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
        linear_sequence_loss(**batch, loss=losses.dpo_loss, beta=0.3).loss, batch["hidden_states"]
    )
    padded = dict(batch, cu_seqlens=None, labels=batch["labels"].view(4, 6))
    padded["hidden_states"] = batch["hidden_states"].detach().view(4, 6, -1).requires_grad_()
    loss = linear_sequence_loss(**padded, loss=losses.dpo_loss, beta=0.3).loss
    (gradient,) = torch.autograd.grad(loss, padded["hidden_states"])
    assert torch.equal(gradient.flatten(0, 1), packed[0])
