"""Micro-batches that split groups: the same loss and the same gradient as one pass over whole groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_train import write_colours, write_triples
from tests.tiny_models import arguments, begun_run, needs_peft, save_tiny_model, step_records
from train import run
from train.config import LOSSES
from train.model import head_operands
from train.objective import objective, step_loss
from train.state import DTYPES, Run, batches_in_order, differentiable_logps, pack_for
from train.step import backward
from train.two_pass import backward_in_two_passes, value_and_coefficients

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_triples(tmp_path_factory.mktemp("data") / "triples.jsonl")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "ragged.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


def away_from_the_reference(run_: Run) -> Run:
    """At the reference itself all log-ratios are zero, and half of the adapters have no gradient."""
    with torch.no_grad():
        for parameter in run_.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return run_


def gradients(run_: Run) -> torch.Tensor:
    """All of them as one vector; they are taken away from the model."""
    trained = [parameter for parameter in run_.model.parameters() if parameter.requires_grad]
    taken = torch.cat([parameter.grad.flatten() for parameter in trained])
    run_.model.zero_grad(set_to_none=True)
    return taken


def one_pass(run_: Run, groups, loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain autograd through differentiable log-probs of the whole batch."""
    (batch,) = batches_in_order(replace(run_, config=replace(run_.config, micro_batch=0)), groups)
    value = loss(differentiable_logps(run_, batch))
    value.backward()
    return value.detach(), gradients(run_)


def assert_two_passes_equal_one(run_: Run) -> None:
    groups = run_.train_groups[:3]
    loss = step_loss(run_.config, pack_for(run_, groups), baseline=0.3)
    expected, expected_gradient = one_pass(run_, groups, loss)
    value, logps = backward_in_two_passes(run_, groups, loss)
    gradient = gradients(run_)
    assert logps.numel() > run_.config.micro_batch
    assert expected_gradient.norm() > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


@pytest.mark.parametrize("micro_batch", ["1", "4"])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_passes_equal_one(tmp_path, data, model, loss, micro_batch):
    """In float32; a micro-batch of 4 ends within the second group of three."""
    flags = ("--loss", loss, "--micro-batch", micro_batch, "--beta", "0.5")
    assert_two_passes_equal_one(away_from_the_reference(begun_run(model, data, tmp_path, *flags)))


@needs_peft
@pytest.mark.parametrize("loss", ["copg", "ppo", "dpo"])
def test_two_passes_equal_one_with_adapters(tmp_path, data, model, loss):
    flags = ("--loss", loss, "--micro-batch", "2", "--lora-rank", "4", "--average-logps")
    assert_two_passes_equal_one(away_from_the_reference(begun_run(model, data, tmp_path, *flags)))


def test_two_passes_equal_one_in_float64(tmp_path, ragged, model, monkeypatch):
    """On ragged groups, where the order of sums is all that differs."""
    monkeypatch.setitem(DTYPES, "float32", torch.float64)
    run_ = away_from_the_reference(begun_run(model, ragged, tmp_path, "--micro-batch", "2"))
    run_.model.double()
    groups = run_.train_groups[:3]
    batch = pack_for(run_, groups)
    assert batch.cu_groups is not None
    loss = step_loss(run_.config, replace(batch, ref_logps=batch.ref_logps.double(), rewards=batch.rewards.double()))
    expected, expected_gradient = one_pass(run_, groups, loss)
    value, _ = backward_in_two_passes(run_, groups, loss)
    assert value.dtype == torch.float64 and value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradients(run_) - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


def test_two_passes_equal_the_fused_operator(tmp_path, data, model):
    run_ = away_from_the_reference(begun_run(model, data, tmp_path, "--micro-batch", "2"))
    groups = run_.train_groups[:3]
    batch = pack_for(run_, groups)
    loss = step_loss(run_.config, batch)
    outcome = backward(replace(run_, config=replace(run_.config, micro_batch=0)), groups, baseline=0.0)
    fused = gradients(run_)
    value, logps = backward_in_two_passes(run_, groups, loss)
    assert value.item() == pytest.approx(outcome.loss, rel=1e-6)
    torch.testing.assert_close(logps - batch.ref_logps, outcome.log_ratios, rtol=0, atol=1e-5)
    assert (gradients(run_) - fused).norm() <= 3e-6 * fused.norm()


def test_coefficients_by_hand():
    logps = torch.tensor([1.0, 2.0, 4.0])
    value, coefficients = value_and_coefficients(lambda x: x[0] * x[1] + x[2] ** 2, logps)
    assert value.item() == 18.0 and coefficients.tolist() == [2.0, 1.0, 8.0]


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_run_in_micro_batches_is_the_same_run(tmp_path, data, model, impl):
    for name, size in {"whole": "0", "parts": "2"}.items():
        run.main(arguments(model, data, tmp_path / name, "--steps", "5", "--micro-batch", size, "--impl", impl))
    whole, parts = ([r["loss"] for r in step_records(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_losses_by_hand(tmp_path, data, model):
    """What PPO, REBEL and REINFORCE get besides: offline the reference stands for the sampling policy."""
    run_ = begun_run(model, data, tmp_path, "--average-logps", "--beta", "0.5")
    groups = [replace(group, old_logps=(-3.0, -4.0, -5.0)) for group in run_.train_groups[:1]]
    offline, online = pack_for(run_, run_.train_groups[:1]), pack_for(run_, groups)
    lengths = [len(ids) for ids in groups[0].completion_ids]
    logps = torch.tensor([-6.0, -7.0, -8.0], dtype=torch.double)
    mean, ref = (values.tolist() for values in (logps / torch.tensor(lengths), offline.ref_logps))
    ref = [value / length for value, length in zip(ref, lengths, strict=True)]
    old = [value / length for value, length in zip((-3.0, -4.0, -5.0), lengths, strict=True)]
    rewards = groups[0].rewards

    def rebel(anchor: list[float]) -> float:
        pairs = [(0, 1), (0, 2), (1, 2)]
        residuals = [(mean[i] - anchor[i]) - (mean[j] - anchor[j]) - (rewards[i] - rewards[j]) / 0.5 for i, j in pairs]
        return sum(residual**2 for residual in residuals) / 3

    config = replace(run_.config, loss="rebel")
    assert step_loss(config, offline)(logps).item() == pytest.approx(rebel(ref), rel=1e-5)
    assert step_loss(config, online)(logps).item() == pytest.approx(rebel(old), rel=1e-5)
    # With all ratios at 1 PPO is minus the mean of leave-one-out advantages, which is zero; its coefficients are not.
    config = replace(run_.config, loss="ppo", average_logps=False)
    at_old = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    step_loss(config, online)(at_old).backward()
    regularized = [r - 0.5 * (o - f) for r, o, f in zip(rewards, (-3, -4, -5), offline.ref_logps.tolist(), strict=True)]
    others = [(sum(regularized) - value) / 2 for value in regularized]
    expected = [-(value - other) / 3 for value, other in zip(regularized, others, strict=True)]
    assert at_old.grad.tolist() == pytest.approx(expected, rel=1e-4)
    config = replace(run_.config, loss="reinforce", average_logps=False)
    at_ref = offline.ref_logps.clone().requires_grad_()
    step_loss(config, offline, baseline=0.25)(at_ref).backward()
    assert at_ref.grad.tolist() == pytest.approx([-(reward - 0.25) / 3 for reward in rewards], rel=1e-5)


def test_all_losses_have_a_fused_form(tmp_path, data, model):
    """The objective that a step takes equals the loss on log-probs, for every --loss."""
    run_ = away_from_the_reference(begun_run(model, data, tmp_path, "--average-logps", "--beta", "0.5"))
    batch = pack_for(run_, run_.train_groups[:3])
    for name in LOSSES:
        loss = step_loss(replace(run_.config, loss=name), batch, baseline=0.3)
        hidden_states, head = head_operands(run_.model, batch, torch.float32)
        fused = objective("fused", hidden_states, head, batch, loss)
        assert fused.loss.item() == pytest.approx(loss(differentiable_logps(run_, batch)).item(), rel=1e-5, abs=1e-6)
