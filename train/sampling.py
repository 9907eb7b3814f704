"""Completions drawn from a policy: ancestral sampling at a temperature, with nothing cut from the distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    seed: int,
    in_step: bool = False,
) -> list[list[list[int]]]:
    """Per prompt its num_samples completions as token ids, with EOS at the end of those that reached it.

    The draws depend on the seed, the prompts and the weights alone, and leave the global generators as they were.
    `in_step` is for a model that ranks gather shard by shard: each of them goes on until the last one is done.
    """
    width, device = max(map(len, prompts)), model.device
    padded = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    plain = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        use_cache=True,
    )
    with _evaluating(model), _as_generation_config(model, plain), _seeded(seed, device):
        drawn = model.generate(padded.to(device), attention_mask=mask.to(device), synced_gpus=in_step)
    completions = [_until_eos(row, eos_id) for row in drawn[:, width:]]
    return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]


def _until_eos(tokens: Tensor, eos_id: int) -> list[int]:
    ids = tokens.tolist()
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _as_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """In place of the model's own: what `config` leaves unset would otherwise be the model's top_p and penalties."""
    saved, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = saved


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
