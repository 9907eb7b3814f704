"""The integrations on two processes, with DDP and FSDP2, against one process."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from copg_kernels.integrations.trainer import CoPGTrainer
from tests.launched import arguments_for, launched, shard_on_the_cpu
from tests.numerics import relative_error
from tests.ranks import Ranks
from tests.test_docs import RECIPES
from tests.test_integrations_trainer import BETA, VOCAB, make_model, make_rows

TOLERANCE = 1e-6  # float64, but for ref_logps and rewards, which the collator makes float32
PRELOAD = ["tests.test_integrations_ranks"]
WRAPPERS = {None: nn.Module, "DDP": DistributedDataParallel, "FSDP2": FSDPModule}
ENGINES = pytest.mark.parametrize("engine", ["DDP", "FSDP2"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store", preload=PRELOAD)
    yield ranks
    ranks.stop()


def llama() -> LlamaForCausalLM:
    """Its head is not tied to the embedding."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3))


def lora_on_the_head():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


MODELS = {"tied": make_model, "untied": llama, "LoRA": lora_on_the_head}


# transformers' Trainer


def make_trainer(engine, folder, kind, rows, settings) -> CoPGTrainer:
    defaults = dict(learning_rate=0.01, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1)
    quiet = dict(report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True)
    args = arguments_for(engine, TrainingArguments)(str(folder), **(defaults | quiet | settings))
    model = MODELS[kind]()
    model = model if args.bf16 else model.double()
    return CoPGTrainer(model, args, beta=BETA, train_dataset=rows, eval_dataset=rows[:5])


def train(engine, folder, kind, rows, settings):
    """-> what was logged, whole weights, reference log-probs."""
    trainer = make_trainer(engine, folder, kind, rows, settings)
    trainer.train(settings.get("resume_from_checkpoint"))
    assert isinstance(trainer.model_wrapped, WRAPPERS[engine])
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    return trainer.state.log_history, weights, trainer.train_dataset.ref_logps


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


def on_ranks(group, function, *args):
    with launched():
        return function(*args)


TIMING = ("_time", "runtime", "per_second", "total_flos")  # the last one counts padding too


def assert_same(results, expected, tolerance=TOLERANCE) -> None:
    log, weights, ref_logps = expected
    for our_log, our_weights, our_ref_logps in results:
        assert flat(our_ref_logps) == pytest.approx(flat(ref_logps), rel=tolerance)
        for entry, truth in zip(our_log, log, strict=True):
            compared = {name: truth[name] for name in truth if not any(word in name for word in TIMING)}
            assert {name: entry[name] for name in compared} == pytest.approx(compared, rel=tolerance, abs=tolerance)
        for name, truth in weights.items():
            assert relative_error(our_weights[name], truth) < tolerance, name


def flat(rows: list) -> list:
    return [value for row in rows for value in row]


@ENGINES
@pytest.mark.parametrize("kind", MODELS)
def test_training_and_evaluation(ranks, tmp_path, engine, kind):
    """Steps of 4, 4 and 3 groups; evaluation of 4 and 1, so that a process has nothing but repeated groups."""
    if kind == "LoRA":
        pytest.importorskip("peft")
    rows, alike = make_rows(11), dict(max_steps=6, eval_strategy="steps", eval_steps=3)
    with launched(alone=True):
        one = alike | dict(per_device_train_batch_size=4, per_device_eval_batch_size=4)
        expected = train(None, tmp_path, kind, rows, one)
    two = alike | dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)
    assert_same(ranks.run(on_ranks, train, engine, tmp_path, kind, rows, two), expected)
    losses = [entry["loss"] for entry in expected[0] if "loss" in entry]
    assert len(losses) == 6 and len(set(losses)) == 6


def evaluate_and_train(engine, folder, rows, size):
    settings = dict(max_steps=2, per_device_train_batch_size=size, per_device_eval_batch_size=size)
    trainer = make_trainer(engine, folder, "tied", rows, settings)
    metrics = trainer.evaluate()
    trainer.train()
    assert isinstance(trainer.model_wrapped, WRAPPERS[engine])
    return [metrics], dict(trainer.model.named_parameters()), trainer.train_dataset.ref_logps


def test_evaluation_before_training(ranks, tmp_path):
    """accelerate takes an evaluated model for prepared, and would not wrap it for training."""
    rows = make_rows(8)
    with launched(alone=True):
        expected = evaluate_and_train(None, tmp_path, rows, 4)
    assert_same(ranks.run(on_ranks, evaluate_and_train, "DDP", tmp_path, rows, 2), expected)


@ENGINES
def test_accumulated_micro_batches(ranks, tmp_path, engine):
    """Steps of 6 groups and of 1, which only one process has."""
    rows, alike = make_rows(7), dict(max_steps=4, gradient_accumulation_steps=3)
    with launched(alone=True):
        expected = train(None, tmp_path, "tied", rows, alike | dict(per_device_train_batch_size=2))
    two = alike | dict(per_device_train_batch_size=1)
    assert_same(ranks.run(on_ranks, train, engine, tmp_path, "tied", rows, two), expected)


@ENGINES
def test_resume(ranks, tmp_path, engine):
    rows, settings = make_rows(8), dict(max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2)
    through = ranks.run(on_ranks, train, engine, tmp_path, "untied", rows, settings)
    resumed = settings | dict(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log, *rest = through[0]
    again = ranks.run(on_ranks, train, engine, tmp_path, "untied", rows, resumed)
    assert_same([(entries[:4], *others) for entries, *others in again], (log[:4], *rest))


@ENGINES
def test_bfloat16(ranks, tmp_path, engine):
    """The first loss and the first step's gradient; afterwards roundings of the weights add up."""
    rows, settings = make_rows(8), dict(max_steps=1, bf16=True)
    with launched(alone=True):
        (step, *_), _, ref_logps = train(None, tmp_path, "untied", rows, settings | dict(per_device_train_batch_size=4))
    two = settings | dict(per_device_train_batch_size=2)
    for (ours, *_), _, our_ref_logps in ranks.run(on_ranks, train, engine, tmp_path, "untied", rows, two):
        # FSDP2's product of the head is bfloat16 too, but its layer norms and its logits' scale round elsewhere.
        assert ours["loss"] == pytest.approx(step["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(step["grad_norm"], rel=0.05)
        assert flat(our_ref_logps) == pytest.approx(flat(ref_logps), abs=0.2)


UNLIKE_ONE_PROCESS = [
    (dict(average_tokens_across_devices=False), "average_tokens_across_devices must be on"),
    (dict(accelerator_config=dict(dispatch_batches=True)), "must not set dispatch_batches"),
    (dict(accelerator_config=dict(even_batches=False)), "must not turn even_batches off"),
    (dict(fsdp=True, fsdp_config=dict(version=1)), "fsdp_config must have version 2, got 1"),
]


@pytest.mark.parametrize("settings, message", UNLIKE_ONE_PROCESS, ids=[row[1] for row in UNLIKE_ONE_PROCESS])
def test_settings_that_are_refused(ranks, tmp_path, settings, message):
    engine = "FSDP2" if "fsdp" in settings else "DDP"
    errors = ranks.errors(on_ranks, make_trainer, engine, tmp_path, "tied", make_rows(4), settings)
    assert all(error.startswith("ValueError") and message in error for error in errors), errors


# The recipe of docs/recipes.md


def run_recipe(engine, given):
    """-> losses and weights of two steps on this process's part of the batch; accelerate is configured as by launch."""
    if engine == "FSDP2":
        os.environ |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
        shard_on_the_cpu(PartialState(cpu=True))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=True)
    mine = {name: values.chunk(state.num_processes)[state.process_index] for name, values in given.items()}
    model, losses = llama().double(), []
    scope = dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) | mine
    for _ in range(2):
        exec(RECIPES["The same loop with accelerate"], scope)
        losses.append(scope["loss"].item())
        scope["optimizer"].zero_grad()
    assert isinstance(scope["model"], WRAPPERS[engine])
    return losses, {name: whole(parameter) for name, parameter in model.named_parameters()}


@ENGINES
def test_recipe_with_accelerate(ranks, engine):
    input_ids = torch.randint(2, VOCAB, (4, 6))
    given = dict(input_ids=input_ids, labels=input_ids[:, 1:], attention_mask=torch.ones_like(input_ids))
    given |= dict(ref_logps=torch.randn(4).double() - 15, rewards=torch.randn(4).double())
    with launched(alone=True):
        losses, weights = run_recipe(None, given)
    results = ranks.run(on_ranks, run_recipe, engine, given)
    mean = torch.tensor([ours for ours, _ in results], dtype=torch.float64).mean(0)
    assert relative_error(mean, torch.tensor(losses, dtype=torch.float64)) < 1e-12
    for _, ours in results:
        for name, truth in weights.items():
            assert relative_error(ours[name], truth) < 1e-12, name
