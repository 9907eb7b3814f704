"""Rows {prompt, completions, rewards} -> tensors: padded for the model's body, packed for the head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupCollator:
    """A batch of whole groups; call it with a list of rows, as a `DataLoader` does.

    A row holds a prompt, two or more completions of it and their rewards; ref_logps too, where they are known. Prompt
    and completions are lists of token ids, which are used as they are, or texts, for which it takes a tokenizer: the
    prompt then gets the special tokens that the tokenizer puts around a text, each completion an EOS.

    Returns a dict of tensors, for G groups with N completions of T tokens in all (EOS included, prompts not):
        group_sizes (G,) int64; input_ids and attention_mask (N, L), padded on the right; positions (T,) int64, where in
        the flattened (N * L) the state lies that predicts labels[t]; labels (T,) int64; cu_seqlens (N + 1,) int32;
        rewards (N,) float32; ref_logps (N,) float32 where the rows have them.

    Raises:
        ValueError: a row is not what is described above, is longer than max_length, or only some have ref_logps.
    """

    tokenizer: Any = None
    """Of transformers, with an EOS token; None for rows of ids."""
    max_length: int | None = None
    """Most tokens of a prompt with a completion; None for no limit."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pairs = [pair for row in rows for pair in self._pairs(row)]
        sequences = [torch.tensor(prompt + completion) for prompt, completion in pairs]
        # No token attends to what is on its right, so the padding's id does not matter.
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        lengths, max_length = torch.tensor([len(sequence) for sequence in sequences]), input_ids.shape[1]
        # Token j of a completion is predicted by the state one place before it.
        positions = [
            torch.arange(len(completion)) + row * max_length + len(prompt) - 1
            for row, (prompt, completion) in enumerate(pairs)
        ]
        batch = {
            # First, because the Trainer takes the first tensor's length for the number of samples: groups, here.
            "group_sizes": torch.tensor([len(row["completions"]) for row in rows]),
            "input_ids": input_ids,
            "attention_mask": (torch.arange(max_length) < lengths[:, None]).long(),
            "positions": torch.cat(positions),
            "labels": torch.tensor([token for _, completion in pairs for token in completion]),
            "cu_seqlens": _bounds([len(completion) for _, completion in pairs]),
            "rewards": torch.tensor([float(reward) for row in rows for reward in row["rewards"]]),
        }
        return batch | self._ref_logps(rows)

    def _pairs(self, row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) of every completion of a row."""
        _check_row(row)
        prompt = self._ids(row["prompt"], is_prompt=True)
        pairs = [(prompt, self._ids(completion, is_prompt=False)) for completion in row["completions"]]
        for _, completion in pairs:
            length = len(prompt) + len(completion)
            if not prompt or not completion:
                raise ValueError(f"prompt and completions must have tokens, got {len(prompt)} and {len(completion)}")
            if self.max_length is not None and length > self.max_length:
                raise ValueError(f"a prompt with a completion must have at most {self.max_length} tokens, got {length}")
        return pairs

    def _ids(self, text: str | Sequence[int], is_prompt: bool) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            raise ValueError("texts need a tokenizer with an EOS token (processing_class); got none")
        ids = self.tokenizer(text, add_special_tokens=is_prompt)["input_ids"]
        return ids if is_prompt else [*ids, self.tokenizer.eos_token_id]

    def _ref_logps(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        found = [list(row["ref_logps"]) for row in rows if "ref_logps" in row]
        if not found:
            return {}
        if [len(logps) for logps in found] != [len(row["completions"]) for row in rows]:
            raise ValueError("ref_logps must be one number per completion, in every row or in none")
        return {"ref_logps": torch.tensor([logp for logps in found for logp in logps], dtype=torch.float32)}


def first_groups(batch: Mapping[str, Tensor], num_groups: int) -> dict[str, Tensor]:
    """The first groups of a batch, one or more; padding stays as long as it is."""
    sizes = batch["group_sizes"][:num_groups]
    num_completions = int(sizes.sum())
    num_tokens = int(batch["cu_seqlens"][num_completions])
    lengths = {"group_sizes": num_groups, "positions": num_tokens, "labels": num_tokens}
    lengths["cu_seqlens"] = num_completions + 1
    return {name: values[: lengths.get(name, num_completions)] for name, values in batch.items()}


def _check_row(row: Mapping[str, Any]) -> None:
    missing = [key for key in ("prompt", "completions", "rewards") if key not in row]
    if missing:
        raise ValueError(f"a row must have prompt, completions and rewards, {missing[0]!r} is missing")
    num_completions, rewards = len(row["completions"]), row["rewards"]
    if num_completions < 2:
        raise ValueError(f"a contrast needs at least 2 completions, got {num_completions}")
    if len(rewards) != num_completions:
        raise ValueError(f"a row must have one reward per completion, got {len(rewards)} for {num_completions}")
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards must be finite, got {list(rewards)}")


def _bounds(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
