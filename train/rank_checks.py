"""What several processes must have in common before they train together, and what only one can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from train import ranks
from train.batch import Group
from train.config import Config


def check_ranks(config: Config, model: nn.Module, data_digest: str, train_groups: Sequence[Group]) -> None:
    """ValueError where ranks differ, naming them, or cannot share out what they are to do."""
    if ranks.size() == 1:
        _refuse_in_one_process(config)
        return
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(config).items() if name != "out"}
    # A sum sees another file or another seed; it takes a second where a digest takes a minute.
    checksum = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    ranks.require_same(flags | {"the data (their digest)": data_digest, "the weights (their sum)": checksum})
    _refuse_in_several_processes(config)
    _check_share(config, train_groups)


def _refuse_in_one_process(config: Config) -> None:
    given = {"--parallel fsdp": config.parallel == "fsdp", "--vocab-parallel": config.vocab_parallel}
    for flag, is_given in given.items():
        if is_given:
            raise ValueError(f"{flag} needs several processes: torchrun --nproc-per-node N train/run.py ...")


def _refuse_in_several_processes(config: Config) -> None:
    if config.check:
        raise ValueError("--check compares gradients in one process: run it without torchrun")
    if config.parallel == "fsdp" and config.save_merged:
        raise ValueError("--save-merged needs whole weights; --parallel fsdp has shards: fold the adapters in later")


def _check_share(config: Config, train_groups: Sequence[Group]) -> None:
    """Every rank needs a completion in each step, and a text in each step of the warm-up."""
    prompts, processes = min(config.prompts_per_step, len(train_groups)), f"{ranks.size()} processes"
    given = f"--prompts-per-step {config.prompts_per_step} and {len(train_groups)} prompts to train on"
    smallest = config.group_size if config.reward else min(len(group.rewards) for group in train_groups)
    texts = min(4 * config.prompts_per_step, len(train_groups))
    if prompts * smallest < ranks.size() or (config.sft_steps and texts < ranks.size()):
        raise ValueError(f"{given} are too few for {processes}")
    if config.sparse_eps and prompts < ranks.size():
        raise ValueError(f"--sparse-eps needs whole groups on each process: {given} are too few for {processes}")
