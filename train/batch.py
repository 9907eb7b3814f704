"""From token ids to a step's tensors: padded sequences for the transformer, packed rows for the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from train.data import Example
from train.tokens import encode, encode_chat, encode_prompt


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt and of its completions, EOS included, with rewards and log-probs of other policies."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    rewards: list[float]
    ref_logps: tuple[float, ...] = ()
    old_logps: tuple[float, ...] = ()  # under the policy that sampled the completions, where these were sampled
    source: Example | None = None  # what a reward function is asked about, online


@dataclass(frozen=True)
class Batch:
    """N completions of whole groups, padded to length L; T completion tokens, packed one after the other.

    For an attention that knows the bounds of sequences the N of them are one row without padding, see `unpadded`.
    """

    input_ids: Tensor  # (N, L) int64, prompt + completion, padded on the right; (1, number of tokens) unpadded
    attention_mask: Tensor | None  # (N, L) int64, 1 on tokens; None unpadded
    positions: Tensor  # (T,) int64, where in the flattened (N * L) the state lies that predicts labels[t]
    labels: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32, bounds of the completions in the packed rows
    rewards: Tensor  # (N,) float32
    ref_logps: Tensor  # (N,) float32, (0,) before the reference policy has been asked
    group_sizes: list[int]
    cu_groups: Tensor | None  # (G + 1,) int32, bounds of ragged groups; None where all are of group_sizes[0]
    old_logps: Tensor  # (N,) float32, those of the sampling policy; (0,) for completions from elsewhere
    position_ids: Tensor | None = None  # (1, number of tokens) int64, from 0 in each sequence; None where padded


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    eos_id: int,
    max_prompt: int,
    max_completion: int,
    chat: bool = False,
) -> tuple[list[Group], int]:
    """Groups of token ids, and how many prompts and completions were too long and have been cut.

    A prompt keeps its last tokens, next to the completion; a completion its first ones, and then has no EOS.
    """
    groups, num_cut = [], 0
    for example in examples:
        if chat:
            prompt, is_cut = encode_chat(tokenizer, example.prompt, max_prompt), False
        else:
            prompt, is_cut = encode_prompt(tokenizer, example.prompt, max_prompt)
        completions = [ids + [eos_id] for ids in encode(tokenizer, example.completions)]
        num_cut += is_cut + sum(len(ids) > max_completion for ids in completions)
        groups.append(Group(prompt, [ids[:max_completion] for ids in completions], example.rewards))
    return groups, num_cut


def pack(groups: Sequence[Group], pad_id: int, device: torch.device) -> Batch:
    """The batch of these groups, in their order."""
    sizes = [len(group.completion_ids) for group in groups]
    pairs = [(group.prompt_ids, ids) for group in groups for ids in group.completion_ids]
    sequences = [torch.tensor(prompt + completion) for prompt, completion in pairs]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    max_length = input_ids.shape[1]
    # Token j of a completion is predicted by the state one place before it.
    positions = [
        torch.arange(len(completion)) + row * max_length + len(prompt) - 1
        for row, (prompt, completion) in enumerate(pairs)
    ]
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=(torch.arange(max_length) < lengths[:, None]).long().to(device),
        positions=torch.cat(positions).to(device),
        labels=torch.tensor([token for _, ids in pairs for token in ids], device=device),
        cu_seqlens=bounds([len(completion) for _, completion in pairs], device),
        rewards=torch.tensor([r for group in groups for r in group.rewards], device=device),
        ref_logps=torch.tensor([logp for group in groups for logp in group.ref_logps], device=device),
        old_logps=torch.tensor([logp for group in groups for logp in group.old_logps], device=device),
        group_sizes=sizes,
        cu_groups=bounds(sizes, device) if len(set(sizes)) > 1 else None,
    )


def unpadded(batch: Batch) -> Batch:
    """The same sequences one after the other in a single row: position_ids start at 0 in each of them.

    By these, attention of variable length and the masks of transformers keep the sequences apart.
    """
    assert batch.attention_mask is not None
    counted = batch.attention_mask.bool()
    place = counted.flatten().cumsum(0) - 1
    position_ids = batch.attention_mask.cumsum(1) - 1
    return replace(
        batch,
        input_ids=batch.input_ids[counted][None],
        attention_mask=None,
        positions=place[batch.positions],
        position_ids=position_ids[counted][None],
    )


def num_completions(groups: Sequence[Group]) -> int:
    return sum(len(group.completion_ids) for group in groups)


def num_tokens(groups: Sequence[Group]) -> int:
    """Prompts and completions, without padding; a prompt counts with each of its completions."""
    return sum(len(group.prompt_ids) + len(ids) for group in groups for ids in group.completion_ids)


def singles(groups: Sequence[Group]) -> list[Group]:
    """Each completion as a sequence of its own: for passes that need log-probs only."""
    return [Group(group.prompt_ids, [ids], [0.0]) for group in groups for ids in group.completion_ids]


def step_indices(step: int, num_groups: int, prompts_per_step: int, seed: int) -> list[int]:
    """The groups of a step: a new permutation per epoch, its incomplete last batch left out.

    A function of the step alone, so the step number is the whole position in the data.
    """
    batch_size = min(prompts_per_step, num_groups)
    epoch, place = divmod(step, num_groups // batch_size)
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed + epoch))
    return order[place * batch_size : (place + 1) * batch_size].tolist()


def split_heldout(groups: list[Group], heldout: int, seed: int) -> tuple[list[Group], list[Group]]:
    """(training groups, held-out groups), by a permutation that depends on the seed alone."""
    num_heldout = min(heldout, max(1, len(groups) // 4))
    if num_heldout >= len(groups):
        raise ValueError(f"training and evaluation need at least 2 prompts, got {len(groups)}")
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [groups[i] for i in order]
    return shuffled[num_heldout:], shuffled[:num_heldout]


def bounds(sizes: Sequence[int], device: torch.device) -> Tensor:
    """(len(sizes) + 1,) int32, where consecutive parts of these sizes begin and end."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
