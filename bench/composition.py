"""CoPG and an entropy bonus in plain PyTorch on top of what a head says of each token: the same for every provider."""

from __future__ import annotations

from torch import Tensor

from bench.inputs import BenchInputs


def counted_rows(inputs: BenchInputs) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, lm_head_weight and labels of the tokens that count.

    Not all providers know an ignored label, and none is faster with it than with fewer rows.
    """
    if inputs.counted is None:
        return inputs.hidden_states, inputs.lm_head_weight, inputs.labels
    return inputs.hidden_states[inputs.counted], inputs.lm_head_weight, inputs.labels[inputs.counted]


def of_all_tokens(logps: Tensor, inputs: BenchInputs) -> Tensor:
    """(T,) of those that count, 0 where a label is ignored."""
    if inputs.counted is None:
        return logps
    return logps.new_zeros(inputs.labels.shape).index_copy(0, inputs.counted, logps)


def copg_loss(token_logps: Tensor, inputs: BenchInputs) -> Tensor:
    logps = token_logps.view(len(inputs.rewards), -1).sum(1)  # completions have one length
    regularized_rewards = inputs.rewards - inputs.beta * (logps - inputs.ref_logps)
    return regularized_rewards.view(-1, inputs.group_size).var(1).mean() / (2 * inputs.beta)


def bonus(entropy: Tensor, inputs: BenchInputs) -> Tensor:
    """What is taken off the loss, of the entropies of the tokens that count."""
    return entropy_coef(inputs) * entropy.mean()


def entropy_coef(inputs: BenchInputs) -> float:
    """As many as a group has tokens that count, which gives both parts of the gradient a norm of the same order.

    The 0.01 of a trainer would drown a mistake in the entropy's gradient in the bounds of accuracy.py. The time is
    that of any other coefficient.
    """
    return num_counted(inputs) * inputs.group_size / len(inputs.rewards)


def num_counted(inputs: BenchInputs) -> int:
    return len(inputs.labels) if inputs.counted is None else len(inputs.counted)
