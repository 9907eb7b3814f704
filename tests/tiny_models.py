"""Models of real architectures with random weights, small enough for a test, saved as a user's would be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from train import checkpoint, run
from train.config import Config, build_parser, parse_config
from train.start import load_data, start_run
from train.state import Run

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
FLAGS = (
    "--device cpu --max-prompt-tokens 32 --max-completion-tokens 12 --heldout-prompts 4 --prompts-per-step 3 --lr 1e-3"
).split()


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Bytes with a few merges; special tokens unless others are given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["number 1, red", "it is green blue white black"], trainer)
    special = special or {"bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny_model(folder: Path, kind: str = "llama", chat: bool = False, **settings) -> Path:
    """Two layers, 320 tokens, a context of 128; attention dropout, which training is to turn off."""
    config = CONFIGS[kind](
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        attention_dropout=0.5,
        **settings,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    """The reference log-probs are cached in the folder of the run, where no other test finds them."""
    places = ("--model", str(model), "--data", str(data), "--out", str(out), "--cache-dir", str(out / "cache"))
    return [*FLAGS, *places, *more]


def begun_run(model: Path, data: Path, out: Path, *more: str) -> Run:
    config = config_of(model, data, out, *more)
    return start_run(config, *load_data(config), torch.device("cpu"))


def config_of(model: Path, data: Path, out: Path, *more: str) -> Config:
    return parse_config(build_parser(""), arguments(model, data, out, *more))


def step_records(out: Path) -> list[dict]:
    """What the log says about each step, without the clock's and the memory's part of it."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    changing = ("tokens_per_s", "peak_mib")
    return [{key: line[key] for key in line if key not in changing} for line in lines if "step" in line]


def assert_same_checkpoint(out: Path, other: Path) -> None:
    """Weights and state, optimizer and everything else, to the bit."""
    mine, others = checkpoint.checkpoints(out)[-1], checkpoint.checkpoints(other)[-1]
    weights = sorted(path.name for path in mine.glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (mine / name).read_bytes() == (others / name).read_bytes(), name
    states = [checkpoint.load_state(folder) for folder in (mine, others)]
    for state in states:
        del state["config"]  # --resume has compared it, up to what may differ
    _assert_equal(*states, "state")


def _assert_equal(mine, other, where: str) -> None:
    assert type(mine) is type(other), where
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other), where
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys(), where
        for key in mine:
            _assert_equal(mine[key], other[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(other), where
        for i, pair in enumerate(zip(mine, other, strict=True)):
            _assert_equal(*pair, f"{where}[{i}]")
    else:
        assert mine == other, where


def refusal(capsys, command: list[str]) -> str:
    """What a command that is refused at the door says."""
    try:
        run.main(command)
    except SystemExit as error:
        assert error.code == 2
        return capsys.readouterr().err
    raise AssertionError("the command was not refused")
