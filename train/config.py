"""Every setting of a run, in one place: the fields of `Config` are the flags of `train/run.py`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# What may change between a run and its continuation without changing the steps already taken.
FREE_TO_CHANGE = frozenset(
    "out resume steps checkpoint_every eval_every check cache_dir tensorboard save_merged "
    "parallel vocab_parallel rank_timeout".split()
)
LOSSES = ("copg", "ipo", "dpo", "rloo", "reinforce", "raft", "ppo", "rebel")
# Defaults that a trained model changes: no warm-up from scratch, longer texts, smaller steps.
WITH_MODEL: dict[str, Any] = dict(sft_steps=0, sft_lr=1e-5, max_prompt_tokens=512, max_completion_tokens=256, lr=1e-6)
WITH_LORA: dict[str, Any] = WITH_MODEL | dict(lr=1e-4)


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    # Data. Without a file, docstrings of the installed packages.
    data: str = option("", "JSONL or parquet of prompts, completions and rewards; default: docstrings")
    num_prompts: int = option(2048, "docstrings to take, held-out ones included")
    group_size: int = option(
        4, "completions per docstring or, online, samples per prompt; a file brings its own groups"
    )
    heldout_prompts: int = option(256, "prompts kept for evaluation, at most a quarter of the data")
    max_prompt_tokens: int = option(80, "longer prompts keep their last tokens, counted; refused with --chat")
    max_completion_tokens: int = option(48, "EOS included; longer completions are cut; the log counts them")
    chat: bool = option(False, "put prompts, texts or lists of messages, into the chat template of --model")

    # The policy: a trained model, whole or through low-rank adapters ...
    model: str = option("", "directory or hub id of a causal model; default: a small GPT-2 from random weights")
    lora_rank: int = option(0, "train adapters of this rank and freeze the rest; 0 trains every weight")
    lora_alpha: float = option(32.0, "scale of the adapters, over the rank")
    lora_targets: str = option("all-linear", "modules with adapters, separated by commas; never the head")
    save_merged: bool = option(False, "at the end, write the model with its adapters folded in to OUT/merged")
    # ... or a GPT-2 from random weights, small enough for two cores.
    vocab_size: int = option(2048, "byte-level BPE, trained on the data")
    hidden_size: int = option(128, "width of the transformer")
    num_layers: int = option(2, "transformer blocks")
    num_heads: int = option(4, "attention heads")

    # Supervised warm-up: it makes the reference policy. Its learning rate is that of a model from scratch.
    sft_steps: int = option(300, "steps on prompts and best completions before the reference is frozen")
    sft_lr: float = option(2e-3, "AdamW learning rate of the supervised warm-up")

    # The loss. CoPG is in the unit form: the gradient's scale depends neither on beta nor on the group size.
    loss: str = option("copg", "of copg_kernels.losses", LOSSES)
    average_logps: bool = option(False, "losses on log-probs per token; beta then weighs a nat per token")
    beta: float = option(0.1, "strength of the pull towards the reference policy")

    # Steps.
    steps: int = option(250, "optimizer steps")
    prompts_per_step: int = option(8, "groups in a batch")
    micro_batch: int = option(0, "sequences in one pass, which splits groups, exactly; 0: the whole batch")
    lr: float = option(3e-4, "AdamW learning rate after its warm-up")
    lr_warmup_steps: int = option(10, "linear warm-up of the learning rate")
    schedule: str = option("constant", "learning rate after the warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = option(0.1, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping, by the norm over all parameters")

    # Online training: completions sampled from the policy, scored by a Python function.
    reward: str = option("", "module:function that scores samples of the policy; data then need prompts only")
    sync_every: int = option(1, "steps between samplings; the samples are those of the policy at that step")

    # Several processes, as torchrun starts them; the batch is shared out among them.
    parallel: str = option("ddp", "what a process holds: ddp all weights, fsdp its shard of them", ("ddp", "fsdp"))
    vocab_parallel: bool = option(False, "share the head's product out by vocabulary instead of by completions")
    rank_timeout: int = option(600, "seconds that processes wait for one another before they give up")

    # The run.
    impl: str = option("fused", "head and loss of the training step", ("fused", "reference"))
    sparse_eps: float = option(0.0, "gradients from softmax entries of at least this; 0 for exact ones")
    check: bool = option(False, "compute both on every batch and report the differences")
    device: str = option("auto", "auto takes the GPU where there is one", ("auto", "cpu", "cuda"))
    dtype: str = option("float32", "of transformer (autocast) and head operands", ("float32", "bfloat16"))
    attention: str = option("auto", "auto packs where flash-attn and CUDA are there", ("auto", "padded", "packed"))
    gradient_checkpointing: bool = option(False, "recompute the transformer's layers in the backward pass")
    seed: int = option(0, "of data, weights and batches")
    out: str = option("", "run directory; default: runs/<date-time>")
    cache_dir: str = option("", "of reference log-probs; default with --model: ~/.cache/copg-kernels")
    resume: bool = option(False, "continue the run in --out, bit for bit on a CPU")
    checkpoint_every: int = option(50, "steps between checkpoints")
    eval_every: int = option(0, "steps between evaluations on held-out prompts; 0: before and after")
    tensorboard: bool = option(False, "write the log's numbers to OUT/tensorboard, too")


POSITIVE = (
    "num_prompts group_size heldout_prompts max_prompt_tokens max_completion_tokens vocab_size hidden_size "
    "num_layers num_heads lora_alpha sft_lr steps prompts_per_step beta lr max_grad_norm sync_every checkpoint_every "
    "rank_timeout"
).split()
NOT_NEGATIVE = "lora_rank sft_steps micro_batch lr_warmup_steps weight_decay seed eval_every".split()


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
    _validate_combinations(config)


def _validate_sparse_eps(config: Config) -> None:
    if not 0 <= config.sparse_eps < 1:
        raise ValueError(f"--sparse-eps must be at least 0 and below 1, got {config.sparse_eps}")
    if config.sparse_eps and config.impl == "reference":
        raise ValueError("--sparse-eps needs --impl fused: the reference's gradients are exact")
    if config.sparse_eps and config.check:
        raise ValueError("--sparse-eps and --check exclude each other: sparse gradients are meant to differ")


def _validate_combinations(config: Config) -> None:
    refusals = {
        "--resume needs --out, the directory of the run to continue": config.resume and not config.out,
        "--chat needs --model: the model from random weights has no chat template": config.chat and not config.model,
        "--lora-rank needs --model: adapters change a trained model": config.lora_rank and not config.model,
        "--save-merged needs --lora-rank: without adapters the checkpoint is the model": (
            config.save_merged and not config.lora_rank
        ),
        "--sft-steps and --lora-rank exclude each other: the reference policy is the model without its adapters": (
            config.sft_steps and config.lora_rank
        ),
        "--sync-every needs --reward: only online training samples": config.sync_every > 1 and not config.reward,
        "--micro-batch and --check exclude each other: the check needs whole groups in one pass": (
            config.micro_batch and config.check
        ),
        "--micro-batch and --sparse-eps exclude each other: the two passes are exact": (
            config.micro_batch and config.sparse_eps
        ),
        "--vocab-parallel and --sparse-eps exclude each other: sparse gradients need whole rows of logits": (
            config.vocab_parallel and config.sparse_eps
        ),
        "--vocab-parallel and --impl reference exclude each other: the reference has the whole vocabulary": (
            config.vocab_parallel and config.impl == "reference"
        ),
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)
    if config.model:
        _refuse_changed(config, ("vocab_size", "hidden_size", "num_layers", "num_heads"), "--model brings its own")
    if not config.lora_rank:
        _refuse_changed(config, ("lora_alpha", "lora_targets"), "there are no adapters without --lora-rank")


def _refuse_changed(config: Config, names: Sequence[str], why: str) -> None:
    for setting in fields(Config):
        if setting.name in names and getattr(config, setting.name) != setting.default:
            raise ValueError(f"--{_flag(setting.name)} would have no effect: {why}")


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
    given = parser.parse_args(argv)
    if given.model:
        parser.set_defaults(**(WITH_LORA if given.lora_rank else WITH_MODEL))
    values = vars(parser.parse_args(argv))
    validate(Config(**values))
    values["out"] = values["out"] or time.strftime("runs/%Y%m%d-%H%M%S")
    return Config(**values)


def config_differences(saved: dict, config: Config) -> list[str]:
    """The flags in which a checkpoint's configuration differs from this one, as text.

    A flag that is younger than the checkpoint has its default there.
    """
    there, here = asdict(Config()) | saved, asdict(config)
    # A falling learning rate depends on where it ends.
    free = FREE_TO_CHANGE if config.schedule == "constant" else FREE_TO_CHANGE - {"steps"}
    names = [name for name in here if name not in free and there[name] != here[name]]
    return [f"--{_flag(name)} {there[name]} there, {here[name]} here" for name in names]


def _flag(name: str) -> str:
    return name.replace("_", "-")
