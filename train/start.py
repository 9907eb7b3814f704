"""From a configuration to a run that can take its next step: begun anew, or continued from its checkpoint.

What can be refused is refused by `load_data`, `load_state` and `build_run`, which write nothing but docstrings; only
then come the parts that take time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from copg_kernels.integrations.transformers import read_head
from train import checkpoint, pretrained, ranks
from train.batch import Group, split_heldout, tokenize
from train.config import Config, config_differences
from train.data import Example, read_examples, write_jsonl
from train.docstrings import docstring_examples
from train.model import autocast
from train.online import restore_sampled, sampled_state
from train.optimizer import make_optimizer
from train.rank_checks import check_ranks
from train.ref_logps import set_ref_logps, weights_digest
from train.scoring import load_reward
from train.spread import Policy, load_optimizer_state, spread, whole_optimizer_state, whole_weights
from train.state import DTYPES, Run, device_of, flat_ref_logps, with_ref_logps
from train.warmup import supervised_warmup


def load_data(config: Config) -> tuple[list[Example], str]:
    """The examples and their file's digest; docstrings are first written as a user's own file would be."""
    path = Path(config.data) if config.data else Path(config.out) / "data.jsonl"
    if not config.data and not config.resume:
        ranks.from_first(lambda: write_docstrings(config, path))
    return ranks.together(lambda: read_data(config, path))


def write_docstrings(config: Config, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, docstring_examples(config.num_prompts, config.group_size, config.seed))


def read_data(config: Config, path: Path) -> tuple[list[Example], str]:
    examples = read_examples(path, chat=config.chat, online=bool(config.reward))
    if len(examples) < 2:
        raise ValueError(f"{path}: training and evaluation need at least 2 prompts, got {len(examples)}")
    _check_groups(config, path, examples)
    return examples, checkpoint.file_digest(path)


def _check_groups(config: Config, path: Path, examples: Sequence[Example]) -> None:
    sizes = {len(example.completions) for example in examples}
    if config.sft_steps and 0 in sizes:
        raise ValueError(f"{path}: --sft-steps {config.sft_steps} needs completions, and there are rows without")
    if not config.reward and config.loss != "copg" and len(sizes) > 1:
        raise ValueError(
            f"--loss {config.loss} needs groups of one size, but {path} has groups of {min(sizes)} to {max(sizes)}"
        )


def load_state(config: Config, data_digest: str) -> dict:
    """The newest checkpoint's state; ValueError where it is not this run's."""
    return ranks.together(lambda: read_state(config, data_digest))


def read_state(config: Config, data_digest: str) -> dict:
    folders = checkpoint.checkpoints(Path(config.out))
    if not folders:
        raise ValueError(f"--resume: {config.out} holds no checkpoint")
    state = checkpoint.load_state(folders[-1])
    differences = config_differences(state["config"], config)
    if differences:
        raise ValueError(f"--resume: {folders[-1]} is of another configuration: {'; '.join(differences)}")
    if state["data_digest"] != data_digest:
        raise ValueError(f"--resume: the data have changed since {folders[-1]} was written")
    return state


def build_run(
    config: Config, examples: Sequence[Example], data_digest: str, device: torch.device, state: dict | None = None
) -> Run:
    """A run at step 0 or, with its newest checkpoint's state, one for `restore`."""
    run = ranks.together(lambda: build_whole(config, examples, data_digest, device, state))
    check_ranks(config, run.model, data_digest, run.train_groups)
    policy = spread(config, run.model, device)
    with torch.no_grad(), autocast(device, DTYPES[config.dtype]):
        policy(lambda model: read_head(model).logit_scale)  # a head that is not understood is refused here
    return replace(run, policy=policy, optimizer=make_optimizer(config, policy))


def build_whole(
    config: Config, examples: Sequence[Example], data_digest: str, device: torch.device, state: dict | None
) -> Run:
    """The run before its weights go to the devices."""
    reward = load_reward(config.reward) if config.reward else None
    attention = pretrained.pick_attention(config, device)
    folder = checkpoint.checkpoints(Path(config.out))[-1] if state else None
    tokenizer, model = pretrained.open_policy(config, examples, folder, attention)
    groups, cut = token_groups(config, tokenizer, examples)
    base_digest = weights_digest(model) if config.lora_rank else ""
    if state is not None and base_digest != state["base_digest"]:
        raise ValueError(f"--resume: the weights of {config.model} have changed since {folder} was written")
    trained = pretrained.trained_part(config, model, folder)
    run = Run(config, Policy(trained), None, tokenizer, *groups, data_digest)
    return replace(run, is_packed=attention is not None, reward=reward, base_digest=base_digest, cut=cut)


def start_run(config: Config, examples: Sequence[Example], data_digest: str, device: torch.device) -> Run:
    return begin(build_run(config, examples, data_digest, device))


def resume_run(config: Config, examples: Sequence[Example], state: dict, device: torch.device) -> Run:
    return restore(build_run(config, examples, state["data_digest"], device, state), state)


def begin(run: Run) -> Run:
    """Supervised warm-up, then the reference policy: its log-probs, or itself online; and the first checkpoint."""
    supervised_warmup(run)
    if run.reward is None:
        set_ref_logps(run)
    elif not run.config.lora_rank:
        save_reference(run)
        run.reference = load_reference(run)
    save_run(run)
    return run


def save_reference(run: Run) -> None:
    weights = whole_weights(run.model)

    def save() -> None:
        with checkpoint.atomic_folder(_reference_folder(run.config)) as folder:
            checkpoint.save_model(folder, run.model, run.tokenizer, weights)

    ranks.from_first(save)


def load_reference(run: Run) -> nn.Module:
    """The Policy of the saved reference, which is not trained."""
    device = device_of(run.model)
    attention = pretrained.pick_attention(run.config, device)
    folder = str(_reference_folder(run.config))
    model = ranks.together(lambda: pretrained.load_model(folder, run.config, attention))
    return spread(run.config, model.requires_grad_(False).eval(), device)


def restore(run: Run, state: dict) -> Run:
    """The run as it was when its newest checkpoint was written."""
    load_optimizer_state(run.optimizer, state["optimizer"])
    run.step, run.reward_sum, run.reward_count = state["step"], state["reward_sum"], state["reward_count"]
    if run.reward is None:
        run.train_groups = with_ref_logps(run.train_groups, state["train_ref_logps"])
        run.heldout_groups = with_ref_logps(run.heldout_groups, state["heldout_ref_logps"])
    else:
        run.sampled = restore_sampled(state["sampled"])
        if not run.config.lora_rank:
            run.reference = load_reference(run)
    checkpoint.restore_rng(state["rng"])
    return run


def save_run(run: Run) -> Path:
    """A checkpoint as one process writes it; all ranks take part where there are shards to gather."""
    state: dict[str, Any] = {
        "step": run.step,
        "config": asdict(run.config),
        "data_digest": run.data_digest,
        "base_digest": run.base_digest,
        "optimizer": whole_optimizer_state(run.optimizer),
        "rng": checkpoint.rng_state(),
        "train_ref_logps": flat_ref_logps(run.train_groups),
        "heldout_ref_logps": flat_ref_logps(run.heldout_groups),
        "sampled": sampled_state(run),
        "reward_sum": run.reward_sum,
        "reward_count": run.reward_count,
    }
    weights, out = whole_weights(run.model), Path(run.config.out)
    return ranks.from_first(lambda: checkpoint.save_checkpoint(out, run.model, run.tokenizer, state, weights))


def token_groups(
    config: Config, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[tuple[list[Group], list[Group]], dict[str, int]]:
    """(training groups, held-out groups), and how many texts of each kind have been cut."""
    limits = (config.max_prompt_tokens, config.max_completion_tokens)
    groups, num_cut = tokenize(examples, tokenizer, tokenizer.eos_token_id, *limits, config.chat)
    # Each completion had an EOS at its end, which only a cut takes.
    completions = sum(ids[-1] != tokenizer.eos_token_id for group in groups for ids in group.completion_ids)
    cut = {"prompts": num_cut - completions, "completions": completions}
    if config.reward:
        groups = [replace(group, source=example) for group, example in zip(groups, examples, strict=True)]
    return split_heldout(groups, config.heldout_prompts, config.seed), cut


def _reference_folder(config: Config) -> Path:
    return Path(config.out) / "reference"
