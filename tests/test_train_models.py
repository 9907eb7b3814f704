"""train/run.py on models of transformers: real architectures, adapters, chat templates, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.test_train import colour_examples
from tests.tiny_models import (
    arguments,
    assert_same_checkpoint,
    begun_run,
    config_of,
    needs_peft,
    refusal,
    save_tiny_model,
    step_records,
    tiny_tokenizer,
    write_rows,
)
from train import checkpoint, pretrained, run, start
from train.batch import tokenize
from train.config import Config
from train.data import Example, write_jsonl
from train.optimizer import gradient_norm, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = ("--lora-rank", "4")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_jsonl(path, [Example(e.prompt, e.completions[:2], e.rewards[:2]) for e in colour_examples(20)])
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", chat=True)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 22)[None]).logits


# Training


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_fused_and_reference_train_alike(tmp_path, pairs, kind):
    """50 steps; Gemma 2 has capped logits and a tied head."""
    model = save_tiny_model(tmp_path / kind, kind)
    losses = {}
    for impl in ("fused", "reference"):
        assert run.main(arguments(model, pairs, tmp_path / impl, "--steps", "50", "--lr", "5e-4", "--impl", impl)) == 0
        losses[impl] = [record["loss"] for record in step_records(tmp_path / impl)]
    assert losses["fused"] == pytest.approx(losses["reference"], rel=1e-4)
    assert max(abs(record["mean_log_ratio"]) for record in step_records(tmp_path / "fused")) > 0.2


@needs_peft
@pytest.mark.parametrize("loss", ["ipo", "dpo", "rloo", "reinforce", "raft", "ppo", "rebel"])
def test_every_loss_trains_alike(tmp_path, pairs, model, loss):
    losses = {}
    for impl in ("fused", "reference"):
        flags = ("--steps", "4", "--impl", impl, "--loss", loss, "--average-logps", "--beta", "0.5")
        assert run.main(arguments(model, pairs, tmp_path / impl, *flags, *LORA)) == 0
        losses[impl] = [record["loss"] for record in step_records(tmp_path / impl)]
    assert losses["fused"] == pytest.approx(losses["reference"], rel=1e-4, abs=1e-6)


@needs_peft
def test_the_check_covers_adapters(tmp_path, pairs, model, capsys):
    """Half of the adapters have no gradient in the first step: it is compared with zero."""
    assert run.main(arguments(model, pairs, tmp_path, "--steps", "2", "--check", *LORA)) == 0
    assert "largest differences over 2 steps" in capsys.readouterr().out


def test_activation_checkpointing_changes_memory_only(tmp_path, pairs, model):
    for name, flags in {"kept": (), "recomputed": ("--gradient-checkpointing",)}.items():
        run.main(arguments(model, pairs, tmp_path / name, "--steps", "3", *flags))
    assert step_records(tmp_path / "kept") == step_records(tmp_path / "recomputed")


def test_dropout_is_off(tmp_path, pairs, model):
    """The model was saved with attention dropout; in training mode it would move the log-ratios from zero."""
    run_ = begun_run(model, pairs, tmp_path, "--gradient-checkpointing")
    assert run_.model.training and run.heldout_margins(run_) == [0.0] * 4


def test_the_norm_that_clips_is_of_all_gradients():
    """A hundred thousand numbers, of which float32 would lose the fifth digit; one parameter has no gradient."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (100_000, 3, 1)]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    expected = torch.cat([parameter.grad for parameter in parameters[:2]]).double().square().sum().sqrt()
    assert gradient_norm(parameters).item() == pytest.approx(expected.item(), rel=1e-12)


def test_schedules_by_hand():
    settings = dict(lr=2.0, steps=14, lr_warmup_steps=4)

    def rates(schedule: str) -> list[float]:
        config = Config(schedule=schedule, **settings)
        return [learning_rate(config, step) for step in (0, 1, 3, 4, 9, 13)]

    assert rates("constant") == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert rates("linear") == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.0, 0.2])
    # (1 + cos(pi / 2)) / 2 = 1 / 2 and (1 + cos(9 pi / 10)) / 2 = 0.0244717.
    assert rates("cosine") == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.0, 2 * 0.0244717], rel=1e-5)


# What comes out


def test_a_checkpoint_is_a_model(tmp_path, pairs, model):
    run_ = begun_run(model, pairs, tmp_path)
    run.train_step(run_)
    folder = start.save_run(run_)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), logits_of(run_.model))
    assert not torch.equal(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(model)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("it is red").input_ids == run_.tokenizer("it is red").input_ids


def test_the_small_model_is_one_too(tmp_path, pairs):
    flags = "--steps 1 --sft-steps 1 --vocab-size 300 --hidden-size 16 --num-layers 1 --num-heads 2".split()
    run.main([*flags, "--data", str(pairs), "--out", str(tmp_path), "--device", "cpu", "--max-prompt-tokens", "32"])
    folder = checkpoint.checkpoints(tmp_path)[-1]
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("it is red", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "it is red" and loaded(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert tokenizer.eos_token_id == loaded.config.eos_token_id


@needs_peft
def test_adapters_can_be_loaded_or_folded_in(tmp_path, pairs, model):
    import peft

    assert run.main(arguments(model, pairs, tmp_path, "--steps", "3", "--save-merged", "--lr", "1e-2", *LORA)) == 0
    folder = checkpoint.checkpoints(tmp_path)[-1]
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    base = logits_of(AutoModelForCausalLM.from_pretrained(model))
    adapted = logits_of(peft.AutoPeftModelForCausalLM.from_pretrained(folder))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    assert (adapted - base).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<eos>"


@needs_peft
def test_adapters_leave_the_rest_and_the_head_alone(tmp_path, pairs, model):
    run_ = begun_run(model, pairs, tmp_path, *LORA)
    names = [name for name, parameter in run_.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora" in name for name in names) and not any("lm_head" in name for name in names)
    assert run.heldout_margins(run_) == [0.0] * 4


# Resume


@pytest.mark.parametrize(
    "flags",
    [(), pytest.param(LORA, marks=needs_peft), ("--loss", "reinforce", "--schedule", "cosine")],
    ids=["whole", "adapters", "reinforce"],
)
def test_resume_is_bit_identical(tmp_path, pairs, model, flags, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.main(arguments(model, pairs, whole, "--steps", "6", *flags))
    train_step = run.train_step

    def fail_at_five(run_):
        if run_.step == 4:
            raise RuntimeError("out of memory")
        return train_step(run_)

    monkeypatch.setattr(run, "train_step", fail_at_five)
    command = arguments(model, pairs, broken, "--steps", "6", "--checkpoint-every", "3", *flags)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.main(command)
    monkeypatch.undo()
    run.main([*command, "--resume"])
    assert_same_checkpoint(whole, broken)
    assert step_records(whole) == step_records(broken)


@needs_peft
def test_resume_refuses_what_would_change_the_run(tmp_path, pairs, capsys):
    model = save_tiny_model(tmp_path / "model")
    command = arguments(model, pairs, tmp_path / "out", "--steps", "1", "--schedule", "linear", *LORA)
    run.main(command)
    assert "another configuration: --loss copg there, dpo here" in refusal(
        capsys, [*command, "--resume", "--loss", "dpo"]
    )
    # A falling learning rate depends on the last step.
    assert "another configuration: --steps 1 there, 2 here" in refusal(capsys, [*command, "--resume", "--steps", "2"])
    save_tiny_model(model, initializer_range=0.1)
    assert "the weights of" in refusal(capsys, [*command, "--resume"])


# Bad input


def test_unknown_models_are_named(tmp_path, pairs, capsys):
    missing = tmp_path / "missing"
    assert f"--model {missing}: no such directory" in refusal(capsys, arguments(missing, pairs, tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refusal(capsys, arguments(tmp_path / "empty", pairs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_eos_is_refused(tmp_path, pairs, capsys):
    model = save_tiny_model(tmp_path / "model")
    tiny_tokenizer(bos_token="<bos>").save_pretrained(model)
    assert "has no EOS token" in refusal(capsys, arguments(model, pairs, tmp_path / "out"))


def test_eos_pads_where_nothing_else_does(tmp_path, model, capsys):
    tokenizer = pretrained.load_tokenizer(str(model), chat=False)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and "no pad token" in capsys.readouterr().out


BAD_COMMANDS = {
    "exceed the model's context of 128 tokens": ["--max-prompt-tokens", "120"],
    "--max-prompt-tokens is 8, but in the chat template a prompt has": ["--chat", "--max-prompt-tokens", "8"],
    "--attention packed needs": ["--attention", "packed"],
    "--lora-alpha would have no effect": ["--lora-alpha", "3"],
    "--hidden-size would have no effect: --model brings its own": ["--hidden-size", "64"],
    "--save-merged needs --lora-rank": ["--save-merged"],
    "--sft-steps and --lora-rank exclude each other": ["--sft-steps", "3", "--lora-rank", "2"],
    "--sync-every needs --reward": ["--sync-every", "2"],
    "--micro-batch and --check exclude each other": ["--micro-batch", "2", "--check"],
    "invalid choice: 'kto'": ["--loss", "kto"],
}


@pytest.mark.parametrize(("message", "flags"), BAD_COMMANDS.items(), ids=BAD_COMMANDS.keys())
def test_bad_commands(tmp_path, pairs, model, capsys, message, flags):
    assert message in refusal(capsys, arguments(model, pairs, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@needs_peft
@pytest.mark.parametrize("targets", ["nothing", "lm_head,q_proj"])
def test_bad_adapters(tmp_path, pairs, model, capsys, targets):
    message = refusal(capsys, arguments(model, pairs, tmp_path / "out", *LORA, "--lora-targets", targets))
    assert f"--lora-targets {targets}: " in message


def test_flags_that_need_a_model(tmp_path, pairs, capsys):
    command = ["--data", str(pairs), "--out", str(tmp_path / "out")]
    assert "--chat needs --model" in refusal(capsys, [*command, "--chat"])
    assert "--lora-rank needs --model" in refusal(capsys, [*command, "--lora-rank", "2"])


def test_other_losses_refuse_ragged_groups(tmp_path, model, capsys):
    write_jsonl(tmp_path / "ragged.jsonl", colour_examples(8))
    message = refusal(capsys, arguments(model, tmp_path / "ragged.jsonl", tmp_path / "out", "--loss", "dpo"))
    assert "--loss dpo needs groups of one size" in message and "groups of 2 to 3" in message


def test_a_chat_needs_a_template(tmp_path, pairs, capsys):
    model = save_tiny_model(tmp_path / "model")
    assert "has no chat template" in refusal(capsys, arguments(model, pairs, tmp_path / "out", "--chat"))


# Prompts


def test_cut_texts_are_counted(tmp_path, model):
    rows = [{"prompt": "p" * 40, "completions": ["c" * 20, "d"], "rewards": [0, 1]}] * 2
    rows += [{"prompt": "p", "completions": ["c" * 20, "d"], "rewards": [0, 1]}] * 2
    data = write_rows(tmp_path / "long.jsonl", rows)
    run.main(arguments(model, data, tmp_path / "out", "--steps", "1", "--prompts-per-step", "1"))
    header = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert header["cut"] == {"prompts": 2, "completions": 4} and header["attention"] == "padded, sdpa"


def test_a_prompt_keeps_its_bos_and_its_end(model):
    tokenizer = pretrained.load_tokenizer(str(model), chat=False)
    tokenizer.add_bos_token = True
    (group,), num_cut = tokenize([Example("abcdefgh", ["x"], [1.0])], tokenizer, 1, max_prompt=4, max_completion=8)
    texts = tokenizer.convert_ids_to_tokens(group.prompt_ids)
    assert texts[-1] == "h" and len(texts) == 4 and num_cut == 1
    assert (texts[0] == "<bos>") == (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)


def test_chat_prompts_end_where_the_answer_begins(model):
    tokenizer = pretrained.load_tokenizer(str(model), chat=True)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "red?"}]
    examples = [Example("red?", ["x", "y"], [0.0, 1.0]), Example(messages, ["x", "y"], [0.0, 1.0])]
    groups, _ = tokenize(examples, tokenizer, tokenizer.eos_token_id, 64, 8, chat=True)
    assert tokenizer.decode(groups[0].prompt_ids) == "<bos>[user] red?\n[assistant] "
    assert tokenizer.decode(groups[1].prompt_ids) == "<bos>[system] be brief\n[user] red?\n[assistant] "
    assert tokenizer.decode(groups[0].completion_ids[0]) == "x<eos>"


def test_a_chat_is_trained_on(tmp_path, model):
    """The same question as a text and as a message: the runs are the same."""
    texts = [{"prompt": f"number {i}?", "completions": ["red", "it is"], "rewards": [1, 0]} for i in range(8)]
    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in texts]
    for name, rows in {"texts": texts, "chats": chats}.items():
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        run.main(arguments(model, data, tmp_path / name, "--chat", "--steps", "2"))
    assert step_records(tmp_path / "texts") == step_records(tmp_path / "chats")


def test_defaults_with_a_model(tmp_path, pairs, model):
    config = config_of(model, pairs, tmp_path)
    assert config.sft_steps == 0 and config.max_completion_tokens == 12
    assert config_of(model, pairs, tmp_path, "--sft-steps", "5").sft_steps == 5
