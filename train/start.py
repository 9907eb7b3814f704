"""From a configuration to a run that can take its next step: begun anew, or continued from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from copg_kernels import linear_logps
from train import checkpoint
from train.batch import Batch, Group, pack, split_heldout, step_indices, tokenize
from train.config import Config, config_differences
from train.data import Example, read_jsonl, write_jsonl
from train.docstrings import docstring_examples
from train.model import EOS_ID, PAD_ID, build_model, head_inputs, train_tokenizer
from train.objective import completion_logps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """What a step reads and writes. The groups carry their reference log-probs once training starts."""

    config: Config
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    train_groups: list[Group]
    heldout_groups: list[Group]
    data_digest: str
    step: int = 0


def load_data(config: Config) -> tuple[list[Example], str]:
    """The examples and their file's digest; docstrings are first written as a user's own file would be."""
    path = Path(config.data) if config.data else Path(config.out) / "data.jsonl"
    if not config.data and not config.resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, docstring_examples(config.num_prompts, config.group_size, config.seed))
    examples = read_jsonl(path)
    if len(examples) < 2:
        raise ValueError(f"{path}: training and evaluation need at least 2 prompts, got {len(examples)}")
    return examples, checkpoint.file_digest(path)


def load_state(config: Config, data_digest: str) -> dict:
    """The newest checkpoint's state; ValueError where it is not this run's."""
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


def start_run(config: Config, examples: Sequence[Example], data_digest: str, device: torch.device) -> Run:
    """Tokenizer, policy, supervised warm-up, reference log-probs; the first checkpoint keeps them."""
    texts = (text for example in examples for text in (example.prompt, *example.completions))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    model = build_model(config, tokenizer).to(device)
    groups = token_groups(config, tokenizer, examples)
    run = Run(config, model, make_optimizer(config, model), tokenizer, *groups, data_digest)
    supervised_warmup(run)
    run.optimizer = make_optimizer(config, model)
    run.train_groups = with_ref_logps(run.train_groups, reference_logps(run, run.train_groups))
    run.heldout_groups = with_ref_logps(run.heldout_groups, reference_logps(run, run.heldout_groups))
    save_run(run)
    return run


def resume_run(config: Config, examples: Sequence[Example], state: dict, device: torch.device) -> Run:
    folder = checkpoint.checkpoints(Path(config.out))[-1]
    tokenizer = checkpoint.load_tokenizer(folder)
    model = build_model(config, tokenizer)
    checkpoint.load_weights(folder, model)
    model.to(device)
    optimizer = make_optimizer(config, model)
    optimizer.load_state_dict(state["optimizer"])
    train_groups, heldout_groups = token_groups(config, tokenizer, examples)
    train_groups = with_ref_logps(train_groups, state["train_ref_logps"])
    heldout_groups = with_ref_logps(heldout_groups, state["heldout_ref_logps"])
    checkpoint.restore_rng(state["rng"])
    return Run(config, model, optimizer, tokenizer, train_groups, heldout_groups, state["data_digest"], state["step"])


def save_run(run: Run) -> Path:
    state = {
        "step": run.step,
        "config": asdict(run.config),
        "data_digest": run.data_digest,
        "optimizer": run.optimizer.state_dict(),
        "rng": checkpoint.rng_state(),
        "train_ref_logps": flat_ref_logps(run.train_groups),
        "heldout_ref_logps": flat_ref_logps(run.heldout_groups),
    }
    return checkpoint.save_checkpoint(Path(run.config.out), run.model, run.tokenizer, state)


def token_groups(config: Config, tokenizer: Tokenizer, examples: Sequence[Example]) -> tuple[list[Group], list[Group]]:
    """(training groups, held-out groups)"""
    limits = (config.max_prompt_tokens, config.max_completion_tokens)
    groups, num_cut = tokenize(examples, tokenizer, EOS_ID, *limits)
    print(f"{len(groups)} prompts; {num_cut} texts longer than {limits[0]} (prompt) or {limits[1]} tokens cut")
    return split_heldout(groups, config.heldout_prompts, config.seed)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def apply_gradients(run: Run, lr: float, step: int) -> float:
    """One clipped optimizer step at the warmed-up learning rate; returns the norm before clipping."""
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / max(1, run.config.lr_warmup_steps))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm.item()


def supervised_warmup(run: Run) -> None:
    """Maximum likelihood of each prompt and its best completion, through the same fused log-probs."""
    config = run.config
    groups = [best_text(group) for group in run.train_groups]
    bar = tqdm(range(config.sft_steps), desc="supervised warm-up")
    for step in bar:
        # Four times the prompts of a CoPG step: about as many sequences as its groups hold.
        indices = step_indices(step, len(groups), 4 * config.prompts_per_step, config.seed)
        batch = pack_for(run, [groups[i] for i in indices])
        hidden_states, lm_head_weight = head_inputs(run.model, batch, DTYPES[config.dtype])
        loss = -linear_logps(hidden_states, lm_head_weight, batch.labels).mean()
        loss.backward()
        apply_gradients(run, config.sft_lr, step)
        bar.set_postfix(nll=f"{loss.item():.3f}")


def best_text(group: Group) -> Group:
    """Prompt and best completion as one text, all of it predicted but the first token."""
    best = max(range(len(group.rewards)), key=group.rewards.__getitem__)
    text = group.prompt_ids + group.completion_ids[best]
    return Group(text[:1], [text[1:]], [group.rewards[best]])


def pack_for(run: Run, groups: Sequence[Group]) -> Batch:
    return pack(groups, PAD_ID, run.model.device)


def batches_in_order(run: Run, groups: Sequence[Group]) -> Iterator[Batch]:
    size = run.config.prompts_per_step
    return (pack_for(run, groups[start : start + size]) for start in range(0, len(groups), size))


@torch.no_grad()
def policy_logps(run: Run, batch: Batch) -> Tensor:
    """(N,) log-probs of the completions under the policy as it is now."""
    hidden_states, lm_head_weight = head_inputs(run.model, batch, DTYPES[run.config.dtype])
    return completion_logps(hidden_states, lm_head_weight, batch)


def reference_logps(run: Run, groups: Sequence[Group]) -> Tensor:
    """Log-probs of all completions of the groups, flat, under the policy before its first CoPG step."""
    total = -(-len(groups) // run.config.prompts_per_step)
    batches = tqdm(batches_in_order(run, groups), desc="reference log-probs", total=total)
    return torch.cat([policy_logps(run, batch) for batch in batches]).cpu()


def with_ref_logps(groups: Sequence[Group], ref_logps: Tensor) -> list[Group]:
    parts = ref_logps.split([len(group.rewards) for group in groups])
    return [replace(group, ref_logps=tuple(part.tolist())) for group, part in zip(groups, parts, strict=True)]


def flat_ref_logps(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([logp for group in groups for logp in group.ref_logps])
