"""What a step reads and writes, and the passes through the policy that everything is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from train.batch import Batch, Group, pack, singles, unpadded
from train.config import Config
from train.model import head_operands
from train.objective import completion_logps
from train.scoring import RewardFunction

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """The groups carry their reference log-probs once training starts; online they are prompts without completions."""

    config: Config
    model: Any  # of transformers, or of peft around it
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerBase
    train_groups: list[Group]
    heldout_groups: list[Group]
    data_digest: str
    step: int = 0
    cut: dict[str, int] = field(default_factory=dict)  # prompts and completions that were too long
    is_packed: bool = False  # sequences in one row, for attention that knows their bounds
    reward: RewardFunction | None = None
    reference: Any = None  # online: the policy before its first step, where adapters cannot be turned off
    base_digest: str = ""  # of the frozen weights below adapters
    sampled: list[list[Group]] = field(default_factory=list)  # online: the groups of steps to come
    reward_sum: float = 0.0  # of the steps taken, for the baseline of REINFORCE
    reward_count: int = 0


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def pack_for(run: Run, groups: Sequence[Group]) -> Batch:
    batch = pack(groups, run.tokenizer.pad_token_id, device_of(run.model))
    return unpadded(batch) if run.is_packed else batch


def batches_in_order(run: Run, groups: Sequence[Group]) -> Iterator[Batch]:
    """The completions of these groups in passes of --micro-batch sequences, or of as many groups as a step has."""
    size = run.config.prompts_per_step
    if run.config.micro_batch:
        groups, size = singles(groups), run.config.micro_batch
    return (pack_for(run, groups[start : start + size]) for start in range(0, len(groups), size))


def differentiable_logps(run: Run, batch: Batch, impl: str = "fused", model: nn.Module | None = None) -> Tensor:
    """(N,) log-probs of the completions under the policy, or under another model."""
    operands = head_operands(model or run.model, batch, DTYPES[run.config.dtype])
    return completion_logps(*operands, batch, impl)


@torch.no_grad()
def policy_logps(run: Run, groups: Sequence[Group], impl: str = "fused", model: nn.Module | None = None) -> Tensor:
    """(N,) log-probs of all completions of the groups under the policy as it is now, or under another model."""
    parts = [differentiable_logps(run, batch, impl, model) for batch in batches_in_order(run, groups)]
    return torch.cat(parts)


@torch.no_grad()
def reference_logps(run: Run, groups: Sequence[Group]) -> Tensor:
    """(N,) the same under the reference policy."""
    if run.config.lora_rank:
        with run.model.disable_adapter():
            return policy_logps(run, groups)
    return policy_logps(run, groups, model=run.reference)


def with_ref_logps(groups: Sequence[Group], ref_logps: Tensor) -> list[Group]:
    parts = ref_logps.split([len(group.rewards) for group in groups])
    return [replace(group, ref_logps=tuple(part.tolist())) for group, part in zip(groups, parts, strict=True)]


def flat_ref_logps(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([logp for group in groups for logp in group.ref_logps])
