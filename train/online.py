"""Online training: the policy's own completions of the data's prompts, scored by the user's reward function.

Every --sync-every steps the policy as it is then samples the completions of the steps up to the next sampling. Draws
depend on the seed and on the step, so that a resumed run draws what the uninterrupted one did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import nn

from train import ranks
from train.batch import Group, step_indices
from train.model import autocast
from train.pretrained import without_wrapper
from train.sampling import sample_completions
from train.scoring import score
from train.spread import is_sharded
from train.state import DTYPES, Run, device_of, policy_logps, reference_logps

# Streams of draws that share a seed: no two of them are the same in the first hundred million steps.
TRAINING, EVALUATION, STREAMS = 0, 1, 2


def next_groups(run: Run) -> list[Group]:
    """The groups of the next step: those of the data, or sampled ones."""
    config = run.config
    if run.reward is None:
        indices = step_indices(run.step, len(run.train_groups), config.prompts_per_step, config.seed)
        return [run.train_groups[i] for i in indices]
    if not run.sampled:
        for step in range(run.step, run.step + config.sync_every):
            indices = step_indices(step, len(run.train_groups), config.prompts_per_step, config.seed)
            prompts = [run.train_groups[i] for i in indices]
            run.sampled.append(sampled_groups(run, prompts, config.group_size, draw_seed(config.seed, step, TRAINING)))
    return run.sampled.pop(0)


def draw_seed(seed: int, step: int, stream: int) -> int:
    """The first rank's; the others' lie 2 ** 48 apart."""
    return (seed * 100_000_000 + step) * STREAMS + stream + (ranks.rank() << 48)


def sampled_groups(run: Run, prompts: Sequence[Group], num_samples: int, seed: int) -> list[Group]:
    """A group per prompt: samples, rewards, and their log-probs under the sampling and the reference policy.

    Each rank samples for its share of the prompts and scores them; all get all groups.
    """
    own = ranks.share(prompts)
    # A rank without any takes part in the gathering of shards.
    completions = sample(run, own or prompts[:1], num_samples, seed)[: len(own)]
    pairs = list(zip(own, completions, strict=True))
    scored = ranks.together(
        lambda: [Group(prompt.prompt_ids, samples, rewards_of(run, prompt, samples)) for prompt, samples in pairs]
    )
    groups = [group for part in ranks.from_all(scored) for group in part]
    old_logps = policy_logps(run, groups).split([num_samples] * len(groups))
    ref_logps = reference_logps(run, groups).split([num_samples] * len(groups))
    return [
        replace(group, old_logps=tuple(old.tolist()), ref_logps=tuple(ref.tolist()))
        for group, old, ref in zip(groups, old_logps, ref_logps, strict=True)
    ]


@torch.no_grad()
def sample(run: Run, prompts: Sequence[Group], num_samples: int, seed: int) -> list[list[list[int]]]:
    def call(model: nn.Module) -> list[list[list[int]]]:
        return sample_completions(
            without_wrapper(model),
            [prompt.prompt_ids for prompt in prompts],
            num_samples=num_samples,
            max_new_tokens=run.config.max_completion_tokens,
            eos_id=run.tokenizer.eos_token_id,
            pad_id=run.tokenizer.pad_token_id,
            seed=seed,
            in_step=is_sharded(run.policy),
        )

    with autocast(device_of(run.model), DTYPES[run.config.dtype]):
        return run.policy(call)


def rewards_of(run: Run, prompt: Group, samples: Sequence[Sequence[int]]) -> list[float]:
    assert run.reward is not None and prompt.source is not None
    return score(run.reward, prompt.source, run.tokenizer.batch_decode(samples, skip_special_tokens=True))


def sample_statistics(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    """Means over samples of the policy: unbiased for its expected reward, its KL to the reference and its entropy."""
    ids = [ids for group in groups for ids in group.completion_ids]
    rewards = [reward for group in groups for reward in group.rewards]
    old_logps = [logp for group in groups for logp in group.old_logps]
    ref_logps = [logp for group in groups for logp in group.ref_logps]
    count, tokens = len(ids), sum(map(len, ids))
    return {
        "reward": sum(rewards) / count,
        "kl": (sum(old_logps) - sum(ref_logps)) / count,  # nats per completion
        "entropy": -sum(old_logps) / tokens,  # nats per token
        "length": tokens / count,
        "truncated": sum(sample[-1] != run.tokenizer.eos_token_id for sample in ids) / count,
    }


def evaluate_samples(run: Run) -> dict[str, float]:
    """The statistics of one sample per held-out prompt."""
    size = run.config.prompts_per_step
    groups: list[Group] = []
    for start in range(0, len(run.heldout_groups), size):
        seed = draw_seed(run.config.seed, start, EVALUATION)
        groups += sampled_groups(run, run.heldout_groups[start : start + size], 1, seed)
    return sample_statistics(run, groups)


def sampled_state(run: Run) -> list[list[dict]]:
    """The groups of steps to come as plain numbers, for a checkpoint."""
    return [[asdict(group) for group in groups] for groups in run.sampled]


def restore_sampled(state: list[list[dict]]) -> list[list[Group]]:
    return [[Group(**group) for group in groups] for groups in state]
