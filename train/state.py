"""What a step reads and writes, and the passes through the policy that everything is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from train import ranks
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
    policy: Any  # `spread.Policy` of the model, maybe in DDP: all passes go through it
    optimizer: Any  # AdamW, on the policy's parameters
    tokenizer: PreTrainedTokenizerBase
    train_groups: list[Group]
    heldout_groups: list[Group]
    data_digest: str
    step: int = 0
    cut: dict[str, int] = field(default_factory=dict)  # prompts and completions that were too long
    is_packed: bool = False  # sequences in one row, for attention that knows their bounds
    reward: RewardFunction | None = None
    reference: Any = None  # online: the Policy of the model before its first step, where no adapters can be turned off
    base_digest: str = ""  # of the frozen weights below adapters
    sampled: list[list[Group]] = field(default_factory=list)  # online: the groups of steps to come
    reward_sum: float = 0.0  # of the steps taken, for the baseline of REINFORCE
    reward_count: int = 0

    @property
    def model(self) -> Any:
        """That of transformers, or of peft around it."""
        return getattr(self.policy, "module", self.policy).model


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def pack_for(run: Run, groups: Sequence[Group]) -> Batch:
    batch = pack(groups, run.tokenizer.pad_token_id, device_of(run.model))
    return unpadded(batch) if run.is_packed else batch


def chunks_of(run: Run, groups: Sequence[Group]) -> list[Sequence[Group]]:
    """The completions of these groups in passes of --micro-batch sequences, or of as many groups as a step has."""
    size = run.config.prompts_per_step
    if run.config.micro_batch:
        groups, size = singles(groups), run.config.micro_batch
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def batches_in_order(run: Run, groups: Sequence[Group]) -> Iterator[Batch]:
    return (pack_for(run, chunk) for chunk in chunks_of(run, groups))


def differentiable_logps(run: Run, batch: Batch, impl: str = "fused", policy: nn.Module | None = None) -> Tensor:
    """(N,) log-probs of the completions under the policy, or under another one."""
    dtype = DTYPES[run.config.dtype]
    return (policy or run.policy)(lambda model: completion_logps(*head_operands(model, batch, dtype), batch, impl))


@torch.no_grad()
def policy_logps(run: Run, groups: Sequence[Group], impl: str = "fused", policy: nn.Module | None = None) -> Tensor:
    """(N,) log-probs of all completions of the groups under the policy as it is now, or under another one.

    Ranks share the passes out, which are the same for any number of ranks; each gets all log-probs.
    """
    chunks = chunks_of(run, groups)
    parts = [differentiable_logps(run, pack_for(run, chunk), impl, policy).cpu() for chunk in ranks.mine(chunks)]
    return torch.cat(ranks.in_order(parts, len(chunks))).to(device_of(run.model))


@torch.no_grad()
def reference_logps(run: Run, groups: Sequence[Group]) -> Tensor:
    """(N,) the same under the reference policy."""
    if run.config.lora_rank:
        with run.model.disable_adapter():
            return policy_logps(run, groups)
    return policy_logps(run, groups, policy=run.reference)


def with_ref_logps(groups: Sequence[Group], ref_logps: Tensor) -> list[Group]:
    parts = ref_logps.split([len(group.rewards) for group in groups])
    return [replace(group, ref_logps=tuple(part.tolist())) for group, part in zip(groups, parts, strict=True)]


def flat_ref_logps(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([logp for group in groups for logp in group.ref_logps])
