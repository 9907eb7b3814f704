"""integrations.trainer: CoPG in the Trainer of transformers, against plain PyTorch."""

from __future__ import annotations

import copy
import inspect
import math
import textwrap

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments

from copg_kernels.integrations import trainer as module
from copg_kernels.integrations.collator import GroupCollator
from copg_kernels.integrations.group_metrics import group_metrics, mean_over_groups
from copg_kernels.integrations.trainer import CoPGTrainer
from copg_kernels.reference import copg_loss_ref
from tests.numerics import assert_close

VOCAB, BETA = 61, 0.3


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, initializer_range=0.3))


def make_rows(num_groups: int, seed: int = 0) -> list[dict]:
    """Groups of two to four completions of three to eight tokens, ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(shortest: int) -> list[int]:
        length = int(torch.randint(shortest, shortest + 6, (), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    rows = []
    for i in range(num_groups):
        size = 2 + i % 3
        rewards = torch.randn(size, generator=generator).tolist()
        rows.append({"prompt": ids(1), "completions": [ids(3) for _ in range(size)], "rewards": rewards})
    return rows


def make_trainer(path, rows, model=None, **settings) -> CoPGTrainer:
    options = {name: settings.pop(name) for name in ("eval_dataset", "average_logps") if name in settings}
    defaults = dict(per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant")
    quiet = dict(report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, use_cpu=True, max_grad_norm=0.0)
    args = TrainingArguments(str(path), **(defaults | quiet | settings))
    return CoPGTrainer(model or make_model(), args, beta=BETA, train_dataset=rows, **options)


def plain_logps(model, row) -> torch.Tensor:
    """One completion after the other, from the model's own logits; no batch, no padding."""
    logps = []
    for completion in row["completions"]:
        ids = torch.tensor([row["prompt"] + completion])
        logits = model(ids).logits[0, len(row["prompt"]) - 1 : -1]
        logps.append(-cross_entropy(logits, torch.tensor(completion), reduction="sum"))
    return torch.stack(logps)


def plain_loss(model, reference, rows) -> torch.Tensor:
    losses = []
    for row in rows:
        logps, rewards = plain_logps(model, row), torch.tensor(row["rewards"], dtype=model.dtype)
        with torch.no_grad():
            ref_logps = plain_logps(reference, row)
        losses.append(copg_loss_ref(logps, ref_logps, rewards, beta=BETA, group_size=len(rewards)))
    return torch.stack(losses).mean()


def plain_training(rows, steps: int, lr: float, dtype: torch.dtype):
    """(weights after some steps of plain gradient descent on all rows, the losses on the way)"""
    model = make_model().to(dtype).eval()
    reference, losses = copy.deepcopy(model), []
    for _ in range(steps):
        loss = plain_loss(model, reference, rows)
        losses.append(loss.item())
        for parameter, grad in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.data -= lr * grad
    return model, losses


def test_training_is_plain_gradient_descent(tmp_path):
    """Loss by loss and weight by weight; dropout, 0.1 in this model, takes no part."""
    rows = make_rows(8)
    gold, gold_losses = plain_training(rows, 4, 0.1, torch.float64)
    base, base_losses = plain_training(rows, 4, 0.1, torch.float32)
    trainer = make_trainer(tmp_path, rows, per_device_train_batch_size=8, max_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_close("losses", *(torch.tensor(x, dtype=torch.float64) for x in (losses, base_losses, gold_losses)))
    for (name, actual), expected, truth in zip(
        trainer.model.named_parameters(), base.parameters(), gold.parameters(), strict=True
    ):
        assert_close(name, actual.data, expected.data, truth.data)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("num_groups", [8, 7], ids=["even", "last micro-batch smaller"])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, num_groups):
    rows = make_rows(num_groups)
    whole = make_trainer(tmp_path, rows, per_device_train_batch_size=8, max_steps=1)
    parts = make_trainer(tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    whole.train()
    parts.train()
    before = make_model()
    for old, one, many in zip(before.parameters(), whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(many - old, one - old, rtol=1e-5, atol=1e-6)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_policy_starts_at_its_reference_exactly(tmp_path):
    rows = make_rows(7)
    trainer = make_trainer(tmp_path, rows[:4], eval_dataset=rows, per_device_eval_batch_size=3, max_steps=1)
    metrics = trainer.evaluate()
    assert metrics["eval_log_ratio"] == metrics["eval_log_ratio_margin"] == metrics["eval_accuracy"] == 0
    trainer.train()
    assert trainer.state.log_history[-2]["log_ratio"] == pytest.approx(0, abs=1e-5)
    assert trainer.evaluate()["eval_log_ratio"] != 0


def plain_entropy(model, row) -> torch.Tensor:
    """Mean over the completions of each one's mean entropy, in nats per token."""
    means = []
    for completion in row["completions"]:
        logits = model(torch.tensor([row["prompt"] + completion])).logits[0, len(row["prompt"]) - 1 : -1]
        means.append(-(logits.log_softmax(-1) * logits.softmax(-1)).sum(-1).mean())
    return torch.stack(means).mean()


def test_entropy_is_logged_where_it_is_to_be_had(tmp_path):
    rows = make_rows(5)
    trainer = make_trainer(tmp_path, rows, eval_dataset=rows, per_device_eval_batch_size=2, max_steps=1)
    with torch.no_grad():
        expected = torch.stack([plain_entropy(make_model().eval(), row) for row in rows])
    assert trainer.evaluate()["eval_entropy"] == pytest.approx(expected.mean().item(), rel=1e-5)
    trainer.train()
    assert 0 < trainer.state.log_history[-2]["entropy"] < math.log(make_model().config.vocab_size)
    trainer.sparse_eps = 0.5
    assert "eval_entropy" not in trainer.evaluate()


def test_evaluation_over_uneven_batches(tmp_path):
    """Seven groups in batches of three: every group counts the same, in the loss too."""
    rows = make_rows(7)
    trainer = make_trainer(tmp_path, rows[:4], eval_dataset={"held": rows}, per_device_eval_batch_size=3, max_steps=3)
    trainer.train()
    metrics, model = trainer.evaluate(), trainer.model.eval()
    with torch.no_grad():
        loss = plain_loss(model, make_model().eval(), rows)
        ratios = [plain_logps(model, row) - plain_logps(make_model().eval(), row) for row in rows]
    assert metrics["eval_held_loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {"log_ratio": [], "log_ratio_margin": [], "accuracy": []}
    for log_ratio, row in zip(ratios, rows, strict=True):
        pairs = [
            (log_ratio[i] - log_ratio[j]).item()
            for i, better in enumerate(row["rewards"])
            for j, worse in enumerate(row["rewards"])
            if better > worse
        ]
        expected["log_ratio"].append(log_ratio.mean().item())
        expected["log_ratio_margin"].append(sum(pairs) / len(pairs))
        expected["accuracy"].append(sum(gap > 0 for gap in pairs) / len(pairs))
    for name, values in expected.items():
        assert metrics[f"eval_held_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-5)


def test_groups_of_equal_rewards_have_no_margin():
    table = group_metrics(torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([0.5, 0.5, 1.0, 0.0]), torch.tensor([2, 2]))
    assert table[0].isnan().tolist() == [False, True, True]
    assert mean_over_groups(table) == {"log_ratio": 1.75, "log_ratio_margin": 2.0, "accuracy": 1.0}


def test_averaged_logps(tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(tmp_path, rows, average_logps=True, eval_dataset=rows, max_steps=1)
    lengths = [[len(completion) for completion in row["completions"]] for row in rows]
    for row, counts, ref_logps in zip(rows, lengths, trainer.train_dataset.ref_logps, strict=True):
        expected = plain_logps(make_model().eval(), row).detach() / torch.tensor(counts)
        torch.testing.assert_close(torch.tensor(ref_logps), expected)


@pytest.mark.parametrize("starts_from", ["initial model", "another model"])
def test_resume_is_exact_and_keeps_the_reference(tmp_path, starts_from):
    rows = make_rows(12)
    saving = dict(save_strategy="steps", save_steps=3, optim="adamw_torch", learning_rate=1e-2)
    through = make_trainer(tmp_path / "through", rows, max_steps=6, **saving)
    through.train()
    model = make_model() if starts_from == "initial model" else make_model(seed=1)
    resumed = make_trainer(tmp_path / "through", rows, model, max_steps=6, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-3"))
    for name, parameter in through.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_resume_refuses_other_data_and_foreign_checkpoints(tmp_path):
    make_trainer(tmp_path, make_rows(4), max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="was written for other data .train"):
        make_trainer(tmp_path, make_rows(5), max_steps=2).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "ref_logps.pt").unlink()
    with pytest.raises(ValueError, match="written by CoPGTrainer"):
        make_trainer(tmp_path, make_rows(4), max_steps=2).train(resume_from_checkpoint=True)


def test_rows_may_bring_their_reference(tmp_path):
    rows = [row | {"ref_logps": [-1.0] * len(row["rewards"])} for row in make_rows(3)]
    assert make_trainer(tmp_path, rows).train_dataset[1]["ref_logps"] == [-1.0] * 3
    del rows[2]["ref_logps"]
    with pytest.raises(ValueError, match="in every row or in none, rows 2 to 2 differ from row 0"):
        make_trainer(tmp_path, rows, per_device_train_batch_size=1)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<eos>", "2", "+", "=", "4", "5", "four"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_the_example_of_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = inspect.getdoc(module).split("\n\n", 1)[1]
    names = {"model": make_model(), "tokenizer": word_tokenizer()}
    before = names["model"].lm_head.weight.clone()
    exec(textwrap.dedent(example), names)
    assert not torch.equal(names["model"].lm_head.weight, before)


def test_lora_on_a_dataset_in_bfloat16(tmp_path):
    """Autocast, gradient checkpointing, dropout of LoRA: the policy still starts at its reference, then moves."""
    peft, datasets = pytest.importorskip("peft"), pytest.importorskip("datasets")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "lm_head"], lora_dropout=0.5)
    model = peft.get_peft_model(make_model(), config)
    rows = datasets.Dataset.from_list([row | {"source": "unused"} for row in make_rows(4)])
    settings = dict(bf16=True, gradient_checkpointing=True, eval_dataset=rows, per_device_eval_batch_size=4)
    trainer = make_trainer(tmp_path, rows, model, max_steps=3, learning_rate=0.05, **settings)
    assert trainer.evaluate()["eval_log_ratio"] == 0
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and trainer.evaluate()["eval_log_ratio"] != 0
    assert model.base_model.model.lm_head.lora_B["default"].weight.abs().sum() > 0
    assert model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.abs().sum() > 0


def test_the_batch():
    rows = [
        {"prompt": "2 + 2 =", "completions": ["4", "5 5"], "rewards": [1, 0], "ref_logps": [-1.0, -2.0]},
        {"prompt": [3], "completions": [[5], [6, 7]], "rewards": [0.5, 0.25], "ref_logps": [-3.0, -4.0]},
    ]
    batch = {name: tensor.tolist() for name, tensor in GroupCollator(word_tokenizer())(rows).items()}
    assert batch == {
        "group_sizes": [2, 2],
        "input_ids": [[2, 3, 2, 4, 5, 1, 0], [2, 3, 2, 4, 6, 6, 1], [3, 5, 0, 0, 0, 0, 0], [3, 6, 7, 0, 0, 0, 0]],
        "attention_mask": [[1] * 6 + [0], [1] * 7, [1] * 2 + [0] * 5, [1] * 3 + [0] * 4],
        "positions": [3, 4, 10, 11, 12, 14, 21, 22],
        "labels": [5, 1, 6, 6, 1, 5, 6, 7],
        "cu_seqlens": [0, 2, 5, 6, 8],
        "rewards": [1.0, 0.0, 0.5, 0.25],
        "ref_logps": [-1.0, -2.0, -3.0, -4.0],
    }


ROW = {"prompt": [2], "completions": [[3], [4]], "rewards": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [1.0]}, "one reward per completion, got 1 for 2"),
        ({"rewards": [1.0, float("nan")]}, "rewards must be finite"),
        ({"completions": [[3]], "rewards": [1.0]}, "at least 2 completions, got 1"),
        ({"prompt": []}, "must have tokens, got 0 and 1"),
        ({"completions": [[3], []]}, "must have tokens, got 1 and 0"),
        ({"completions": [[3], [4] * 9]}, "at most 8 tokens, got 10"),
        ({"prompt": "2 + 2"}, "texts need a tokenizer"),
        ({"ref_logps": [0.0]}, "one number per completion"),
    ],
)
def test_rows_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GroupCollator(max_length=8)([ROW | changes])


def test_rows_without_a_key_are_refused():
    with pytest.raises(ValueError, match="'rewards' is missing"):
        GroupCollator()([{"prompt": [2], "completions": [[3], [4]]}])


def test_what_the_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0, got 0.1"):
        make_trainer(tmp_path, [ROW], label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="torch_compile must be off"):
        make_trainer(tmp_path, [ROW], torch_compile=True)
    with pytest.raises(ValueError, match="model must be given, not model_init"):
        CoPGTrainer(None, TrainingArguments(str(tmp_path)), beta=BETA, model_init=make_model)
    args = TrainingArguments(str(tmp_path))
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="args.deepspeed must be off"):
        CoPGTrainer(make_model(), args, beta=BETA)
    with pytest.raises(ValueError, match="must have a length and be indexable, got generator"):
        make_trainer(tmp_path, (row for row in [ROW]), max_steps=1)
    model = make_model()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        make_trainer(tmp_path, [ROW], model)
    with pytest.raises(ValueError, match="rows must have ref_logps"):
        make_trainer(tmp_path, [ROW]).evaluate([ROW])
