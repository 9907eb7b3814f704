"""The offline data of a seed: pairs of completions from several sources, scored by the reward model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from train.batch import Group
from train.documents import Document, others
from train.policy import completion_logps, draw
from train.reward_model import score
from train.summarize_settings import Settings


def offline_pairs(
    documents: Sequence[Document],
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    settings: Settings,
    seed: int,
) -> list[Group]:
    """Two pairs for each of data_prompts prompts, with rewards and ref_logps.

    A prompt has four completions: two samples of the reference policy, the true line and another document's. Which
    two make a pair is drawn at random; which of them is preferred the reward model says, not where they come from.
    Only half of the completions could have come from the policy, so the data are off-policy from the first step.
    """
    rng = random.Random(seed)
    chosen = rng.sample(documents, settings.data_prompts)
    samples = draw(reference, chosen, 2, settings, seed=10_000 * seed + 5_000)
    pairs = []
    for document, other, drawn in zip(chosen, others(chosen, rng), samples, strict=True):
        completions = [*drawn, document.summary_ids, other.summary_ids]
        rng.shuffle(completions)
        pairs += [Group(document.prompt_ids, completions[i : i + 2], [0.0, 0.0]) for i in (0, 2)]
    return _with_scores(pairs, score(reward_model, pairs, settings), completion_logps(reference, pairs, settings))


def _with_scores(pairs: Sequence[Group], rewards: torch.Tensor, ref_logps: torch.Tensor) -> list[Group]:
    columns = zip(pairs, rewards.view(-1, 2).tolist(), ref_logps.view(-1, 2).tolist(), strict=True)
    return [replace(pair, rewards=scores, ref_logps=tuple(logps)) for pair, scores, logps in columns]
