"""Supervised warm-up: maximum likelihood of prompts and best completions, which makes the reference policy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from tqdm import tqdm

from copg_kernels import linear_logps
from train import ranks
from train.batch import Group, step_indices
from train.model import head_operands
from train.optimizer import apply_gradients, make_optimizer, warmup_factor
from train.state import DTYPES, Run, pack_for


def supervised_warmup(run: Run) -> None:
    """Steps through the same fused log-probs as training; the optimizer is a new one afterwards."""
    config = run.config
    groups = [best_text(group) for group in run.train_groups] if config.sft_steps else []
    bar = tqdm(range(config.sft_steps), desc="supervised warm-up", disable=not (config.sft_steps and ranks.is_first()))
    for step in bar:
        # Four times the prompts of a training step: about as many sequences as its groups hold.
        indices = step_indices(step, len(groups), 4 * config.prompts_per_step, config.seed)
        nll = likelihood_step(run, [groups[i] for i in indices], config.sft_lr * warmup_factor(config, step))
        bar.set_postfix(nll=f"{nll:.3f}")
    run.optimizer = make_optimizer(config, run.policy)


def likelihood_step(run: Run, groups: Sequence[Group], lr: float) -> float:
    """One step on the mean over all tokens of all ranks, which it returns."""
    batch = pack_for(run, ranks.share(groups))

    def call(model: nn.Module) -> Tensor:
        hidden_states, head = head_operands(model, batch, DTYPES[run.config.dtype])
        return -linear_logps(hidden_states, head.lm_head_weight, batch.labels, **head.options()).mean()

    nll = run.policy(call)
    tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
    share = len(batch.labels) / tokens
    # DDP and FSDP2 take the mean over ranks.
    (nll * (share * ranks.size())).backward()
    apply_gradients(run, lr)
    return sum(ranks.from_all(nll.item() * share))


def best_text(group: Group) -> Group:
    """Prompt and best completion as one text, all of it predicted but the first token."""
    best = max(range(len(group.rewards)), key=group.rewards.__getitem__)
    text = group.prompt_ids + group.completion_ids[best]
    return Group(text[:1], [text[1:]], [group.rewards[best]])
