"""Every setting of a run, in one place: the fields of `Config` are the flags of `train/run.py`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# What may change between a run and its continuation without changing the steps already taken.
FREE_TO_CHANGE = frozenset({"out", "resume", "steps", "checkpoint_every", "check"})


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    # Data. Without a file, docstrings of the installed packages.
    data: str = option("", "JSONL of prompts, completions and rewards; default: docstrings")
    num_prompts: int = option(2048, "docstrings to take, held-out ones included")
    group_size: int = option(4, "completions per docstring; a file of your own brings its own groups")
    heldout_prompts: int = option(256, "prompts kept for evaluation, at most a quarter of the data")
    max_prompt_tokens: int = option(80, "longer prompts keep their last tokens; the log counts them")
    max_completion_tokens: int = option(48, "EOS included; longer completions are cut; the log counts them")

    # The policy: a GPT-2 from random weights, small enough for two cores.
    vocab_size: int = option(2048, "byte-level BPE, trained on the data")
    hidden_size: int = option(128, "width of the transformer")
    num_layers: int = option(2, "transformer blocks")
    num_heads: int = option(4, "attention heads")

    # Supervised warm-up: it makes the reference policy. Its learning rate is that of a model from scratch.
    sft_steps: int = option(300, "steps on prompts and best completions before the reference is frozen")
    sft_lr: float = option(2e-3, "AdamW learning rate of the supervised warm-up")

    # CoPG, in the unit form: the gradient's scale depends neither on beta nor on the group size.
    steps: int = option(250, "CoPG steps")
    prompts_per_step: int = option(8, "groups in a batch")
    beta: float = option(0.1, "strength of the pull towards the reference policy")
    lr: float = option(3e-4, "AdamW learning rate after its warm-up")
    lr_warmup_steps: int = option(10, "linear warm-up of the learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping, by the norm over all parameters")

    # The run.
    impl: str = option("fused", "head and loss of the training step", ("fused", "reference"))
    sparse_eps: float = option(0.0, "gradients from softmax entries of at least this; 0 for exact ones")
    check: bool = option(False, "compute both on every batch and report the differences")
    device: str = option("auto", "auto takes the GPU where there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("float32", "of transformer (autocast) and head operands", ("float32", "bfloat16"))
    seed: int = option(0, "of data, weights and batches")
    out: str = option("", "run directory; default: runs/<date-time>")
    resume: bool = option(False, "continue the run in --out, bit for bit on a CPU")
    checkpoint_every: int = option(50, "steps between checkpoints")


POSITIVE = (
    "num_prompts group_size heldout_prompts max_prompt_tokens max_completion_tokens vocab_size hidden_size "
    "num_layers num_heads sft_lr steps prompts_per_step beta lr max_grad_norm checkpoint_every"
).split()
NOT_NEGATIVE = "sft_steps lr_warmup_steps weight_decay seed".split()


def validate(config: Config) -> None:
    """ValueError naming the first flag whose value makes no sense."""
    values = asdict(config)
    for name in POSITIVE:
        if not 0 < values[name] < float("inf"):
            raise ValueError(f"--{_flag(name)} must be positive, got {values[name]}")
    for name in NOT_NEGATIVE:
        if not 0 <= values[name] < float("inf"):
            raise ValueError(f"--{_flag(name)} must not be negative, got {values[name]}")
    if config.group_size < 2:
        raise ValueError(f"--group-size must be at least 2, got {config.group_size}")
    if config.hidden_size % config.num_heads:
        sizes = f"{config.hidden_size} and {config.num_heads}"
        raise ValueError(f"--hidden-size must be a multiple of --num-heads, got {sizes}")
    _validate_sparse_eps(config)
    if config.resume and not config.out:
        raise ValueError("--resume needs --out, the directory of the run to continue")


def _validate_sparse_eps(config: Config) -> None:
    if not 0 <= config.sparse_eps < 1:
        raise ValueError(f"--sparse-eps must be at least 0 and below 1, got {config.sparse_eps}")
    if config.sparse_eps and config.impl == "reference":
        raise ValueError("--sparse-eps needs --impl fused: the reference's gradients are exact")
    if config.sparse_eps and config.check:
        raise ValueError("--sparse-eps and --check exclude each other: sparse gradients are meant to differ")


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for setting in fields(Config):
        about = setting.metadata["help"]
        if isinstance(setting.default, bool):
            parser.add_argument(f"--{_flag(setting.name)}", action="store_true", help=about)
        else:
            parser.add_argument(
                f"--{_flag(setting.name)}",
                type=type(setting.default),
                default=setting.default,
                choices=setting.metadata["choices"],
                help=f"{about} (%(default)s)" if setting.default != "" else about,
            )
    return parser


def parse_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Config:
    values = vars(parser.parse_args(argv))
    validate(Config(**values))
    values["out"] = values["out"] or time.strftime("runs/%Y%m%d-%H%M%S")
    return Config(**values)


def config_differences(saved: dict, config: Config) -> list[str]:
    """The flags in which a checkpoint's configuration differs from this one, as text.

    A flag that is younger than the checkpoint has its default there.
    """
    there, here = asdict(Config()) | saved, asdict(config)
    names = [name for name in here if name not in FREE_TO_CHANGE and there[name] != here[name]]
    return [f"--{_flag(name)} {there[name]} there, {here[name]} here" for name in names]


def _flag(name: str) -> str:
    return name.replace("_", "-")
