"""A Bradley-Terry reward model: a transformer with a scalar head, trained on preference pairs."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2ForTokenClassification, PreTrainedModel

from train.batch import Batch, Group, pack, step_indices
from train.model import PAD_ID
from train.optimize import descend
from train.policy import batches
from train.summarize_settings import Settings


def bradley_terry_loss(better: Tensor, worse: Tensor) -> Tensor:
    """loss = mean over pairs of -log sigmoid(better - worse), for rewards (N,) of preferred and other completions.

    Under the model of Bradley and Terry sigmoid(R+ - R-) is the probability that R+ is preferred, so this is the
    negative log-likelihood of the preferences (Biometrika 39, 1952).
    """
    return -torch.nn.functional.logsigmoid(better - worse).mean()


def new_reward_model(policy: PreTrainedModel) -> GPT2ForTokenClassification:
    """The policy's transformer, and a linear head that starts at zero: a score per token."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    model = GPT2ForTokenClassification(config)
    model.transformer.load_state_dict(policy.transformer.state_dict())
    torch.nn.init.zeros_(model.classifier.weight)
    return model.to(policy.device)


def fit_reward_model(model: PreTrainedModel, pairs: dict[str, list[Group]], settings: Settings) -> list[float]:
    """Steps over all kinds of pairs, shuffled together; the loss of each."""
    mixed = [pair for kind in pairs.values() for pair in kind]
    random.Random(0).shuffle(mixed)
    num_steps = settings.reward_epochs * (len(mixed) // settings.reward_batch)

    def loss_at(step: int) -> Tensor:
        chosen = [mixed[i] for i in step_indices(step, len(mixed), settings.reward_batch, seed=0)]
        rewards = _rewards(model, pack(chosen, PAD_ID, settings.torch_device), settings)
        return bradley_terry_loss(*rewards.view(-1, 2).unbind(1))

    steps = descend(model, loss_at, steps=num_steps, lr=settings.reward_lr, to_zero=True)
    return [loss for _, loss in tqdm(steps, "reward model", num_steps)]


@torch.no_grad()
def score(model: PreTrainedModel, groups: Sequence[Group], settings: Settings) -> Tensor:
    """(N,) reward of each completion of the groups, as the model gives it: neither shifted nor scaled."""
    model.eval()
    return torch.cat([_rewards(model, batch, settings) for batch in batches(groups, settings)]).cpu()


def accuracy(model: PreTrainedModel, pairs: Sequence[Group], settings: Settings) -> float | None:
    """Share of pairs whose preferred (first) completion has the higher reward; None without pairs."""
    if not pairs:
        return None
    better, worse = score(model, pairs, settings).view(-1, 2).unbind(1)
    return (better > worse).double().mean().item()


def _rewards(model: PreTrainedModel, batch: Batch, settings: Settings) -> Tensor:
    with torch.autocast(settings.device, dtype=settings.torch_dtype, enabled=settings.dtype != "float32"):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    # batch.positions is where a token is predicted; its own state lies one place further.
    token_scores = logits.flatten().float()[batch.positions + 1]
    return torch.segment_reduce(token_scores, "mean", offsets=batch.cu_seqlens.long())
