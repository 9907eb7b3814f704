"""TRL's trainers and CoPGTrainer on two processes against one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import trl
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from copg_kernels.integrations import trl as fused
from copg_kernels.integrations.trl_trainer import CoPGConfig, CoPGTrainer
from tests.launched import arguments_for, launched
from tests.numerics import relative_error
from tests.ranks import Ranks
from tests.test_integrations_trl import lora
from tests.test_integrations_trl_trainer import METRICS, PROMPTS, make_trainer, sample
from tests.tiny_trl import QUIET, STEPS, tiny_model, word_tokenizer

ENGINES = pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
WRAPPERS = {None: nn.Module, "DDP": DistributedDataParallel, "FSDP2": FSDPModule}
TRAINERS = {"CoPG": (CoPGTrainer, CoPGConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store", preload=["tests.test_integrations_ranks_trl"])
    yield ranks
    ranks.stop()


def on_ranks(group, function, *args):
    with launched():
        return function(*args)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


# Trainers that sample


def sampling_trainer(engine, folder, name, **settings):
    trainer, config = TRAINERS[name]
    return make_trainer(folder, trainer, arguments_for(engine, config), **settings)


def loss_and_gradients(engine, folder, name, inputs=None):
    """-> (loss, gradients, the completions), of a policy that has moved away from the one that sampled them."""
    with fused.install():
        size = 8 if engine is None else 4
        trainer = sampling_trainer(engine, folder, name, per_device_train_batch_size=size)
        inputs = sample(trainer) if inputs is None else inputs
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model, _ = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        assert isinstance(model, WRAPPERS[engine])
        rows = slice(size * trainer.args.process_index, size * (trainer.args.process_index + 1))
        mine = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        loss = trainer.compute_loss(model, mine)
        loss.backward()
    return loss.item(), [whole(parameter.grad) for parameter in model.parameters()], inputs


@ENGINES
@pytest.mark.parametrize("name", TRAINERS)
def test_loss_and_gradients(ranks, tmp_path, name, engine):
    with launched(alone=True):
        loss, gradients, inputs = loss_and_gradients(None, tmp_path, name)
    assert len(gradients) > 10 and len(inputs["completion_ids"]) == 8
    results = ranks.run(on_ranks, loss_and_gradients, engine, tmp_path, name, inputs)
    assert sum(ours for ours, *_ in results) / 2 == pytest.approx(loss, rel=1e-5)
    for _, ours, _ in results:
        for actual, expected in zip(ours, gradients, strict=True):
            assert relative_error(actual, expected) < 1e-5


def trained(engine, folder, adapter):
    """-> what was logged, and the weights."""
    evaluation = dict(eval_strategy="steps", eval_steps=2, num_generations_eval=2, per_device_eval_batch_size=4)
    rows = Dataset.from_dict(dict(prompt=PROMPTS))
    settings = dict(seed=1, per_device_train_batch_size=4, max_steps=4, num_iterations=2, eval_dataset=rows)
    if adapter:
        settings |= dict(peft_config=adapter)
    trainer = sampling_trainer(engine, folder, "CoPG", **settings, **evaluation)
    trainer.train()
    return trainer.state.log_history, {name: whole(value) for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("with_lora", [False, True], ids=["whole", "LoRA"])
def test_copg_samples_and_trains(ranks, tmp_path, with_lora):
    """Each process samples completions of its own prompts; policy and metrics are those of all, with either engine."""
    adapter = lora() if with_lora else None
    tiny_model(1).save_pretrained(tmp_path / "reference")
    results = [ranks.run(on_ranks, trained, engine, tmp_path, adapter) for engine in ("DDP", "FSDP2")]
    (log, weights), *others = results[0] + results[1]
    for other_log, other_weights in others:
        for entry, other in zip(log, other_log, strict=True):
            compared = {name: value for name, value in entry.items() if name.removeprefix("eval_") in METRICS}
            assert {name: other[name] for name in compared} == pytest.approx(compared, rel=1e-4, abs=1e-5)
        for name, weight in weights.items():
            assert relative_error(other_weights[name], weight) < 1e-4, name
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 4 and steps[0]["kl"] == 0 and steps[2]["kl"] > 0 and steps[0]["num_tokens"] > 30
    assert [entry["eval_loss"] > 0 for entry in log if "eval_loss" in entry] == [True, True]


def evaluated_and_trained(folder, adapter):
    rows = Dataset.from_dict(dict(prompt=PROMPTS))
    settings = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=1, eval_dataset=rows)
    trainer = sampling_trainer("DDP", folder, "CoPG", **settings, peft_config=adapter)
    metrics = trainer.evaluate()
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return metrics["eval_reward"], [whole(parameter) for parameter in trainer.model.parameters()]


def test_evaluation_before_training(ranks, tmp_path):
    """Without a reference model beside it accelerate takes the policy for prepared, and would not wrap it."""
    tiny_model(1).save_pretrained(tmp_path / "reference")
    (reward, weights), (other_reward, other_weights) = ranks.run(on_ranks, evaluated_and_trained, tmp_path, lora())
    assert reward == other_reward and all(map(torch.equal, weights, other_weights))


# Trainers of pairs


PAIRS = dict(prompt=["a b c", "d e"], chosen=[" f g h i", " j"], rejected=[" k l", " a b c d e"])


def dpo_trained(folder, installed):
    config = trl.DPOConfig(str(folder), beta=0.3, per_device_train_batch_size=1, **STEPS, **QUIET)
    data = dict(train_dataset=Dataset.from_dict(PAIRS), processing_class=word_tokenizer())
    with fused.install() if installed else nullcontext():
        trainer = trl.DPOTrainer(tiny_model(0), tiny_model(1), config, **data)
        trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [parameter.detach() for parameter in trainer.model.parameters()]


def test_dpo(ranks, tmp_path):
    """A pair on each of two processes, with TRL's own function and with ours."""
    expected = ranks.run(on_ranks, dpo_trained, tmp_path, False)
    for (losses, weights), (their_losses, their_weights) in zip(
        ranks.run(on_ranks, dpo_trained, tmp_path, True), expected, strict=True
    ):
        assert losses == pytest.approx(their_losses, rel=1e-5) and len(set(losses)) == 3
        for actual, truth in zip(weights, their_weights, strict=True):
            assert relative_error(actual, truth) < 1e-5
