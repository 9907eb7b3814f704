"""The gradient of a loss whose completions do not all go through the model in one pass on one process, exactly.

A loss L on log-probs l_i of whole groups needs all of a group at once, its gradient does not. Micro-batches may split
groups:

    pass 1, without gradients:  all l_i, in micro-batches           c_i = dL/dl_i   by autograd on these N numbers
    pass 2, in micro-batches:   backward of  sum_i c_i l_i          which adds up to sum_i c_i dl_i/dtheta = dL/dtheta

The price is a second forward pass. A policy with dropout would be another one in the second pass; ours have none.

Ranks may split groups too: they take turns at the micro-batches of both passes, or share one pass out and gather the
log-probs before the loss. What a rank computes is then the gradient of its own completions, and the sum over ranks is
the whole; DDP and FSDP2 take the mean, hence the factor ranks.size().
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from copg_kernels import sequence_logps
from copg_kernels.parallel import gather_rows, parallel_linear_logps, shard_bounds
from train import ranks
from train.batch import Batch, Group, bounds, num_completions, singles
from train.model import head_operands
from train.spread import gradients_stay
from train.state import DTYPES, Run, chunks_of, device_of, differentiable_logps, pack_for, policy_logps

Loss = Callable[[Tensor], Tensor]


def backward_in_one_pass(run: Run, groups: Sequence[Group], loss: Loss) -> tuple[Tensor, Tensor]:
    """Adds dloss(logps)/dparameter to the gradients, each rank taking a share of the completions.

    Returns the loss and logps (N,), detached.
    """
    completions = singles(groups)
    logps = logps_over_ranks(run, [ranks.share(completions, rank) for rank in range(ranks.size())])
    value = loss(logps)
    (ranks.size() * value).backward()
    return value.detach(), logps.detach()


def backward_in_two_passes(run: Run, groups: Sequence[Group], loss: Loss) -> tuple[Tensor, Tensor]:
    """The same in micro-batches."""
    logps = policy_logps(run, groups, run.config.impl)
    value, coefficients = value_and_coefficients(loss, logps)
    for parts, weights, is_last in rounds(chunks_of(run, groups), coefficients):
        with gradients_stay(run.policy, not is_last):
            part_logps = logps_over_ranks(run, parts)
            (ranks.size() * (weights * part_logps).sum()).backward()
    return value, logps


def rounds(
    chunks: Sequence[Sequence[Group]], coefficients: Tensor
) -> Iterator[tuple[list[Sequence[Group]], Tensor, bool]]:
    """A chunk per rank, the coefficients of their completions and whether it is the last round.

    Where the last round has chunks for some ranks only, the others take its first once more with coefficients of zero:
    they have to be there when shards are gathered and gradients summed.
    """
    parts = coefficients.split([num_completions(chunk) for chunk in chunks])
    for start in range(0, len(chunks), ranks.size()):
        taken, weights = list(chunks[start : start + ranks.size()]), list(parts[start : start + ranks.size()])
        missing = ranks.size() - len(taken)
        yield (
            taken + taken[:1] * missing,
            torch.cat(weights + [torch.zeros_like(weights[0])] * missing),
            start + ranks.size() >= len(chunks),
        )


def value_and_coefficients(loss: Loss, logps: Tensor) -> tuple[Tensor, Tensor]:
    """loss(logps) and dloss/dlogps (N,)."""
    leaf = logps.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def logps_over_ranks(run: Run, parts: Sequence[Sequence[Group]]) -> Tensor:
    """(N,) log-probs of all ranks' parts in rank order, differentiable as far as this rank has part in them."""
    batch = pack_for(run, parts[ranks.rank()])
    if ranks.size() == 1:
        return differentiable_logps(run, batch, run.config.impl)
    if run.config.vocab_parallel:
        return vocab_parallel_logps(run, parts, batch)
    logps = differentiable_logps(run, batch, run.config.impl)
    return gather_rows(logps, [num_completions(part) for part in parts])


def vocab_parallel_logps(run: Run, parts: Sequence[Sequence[Group]], batch: Batch) -> Tensor:
    """The transformer on this rank's part, and its rows of the head on the hidden states of all parts."""
    ids = [[ids for group in part for ids in group.completion_ids] for part in parts]
    labels = torch.tensor([token for part in ids for sequence in part for token in sequence])
    lengths = [len(sequence) for part in ids for sequence in part]
    cu_seqlens = bounds(lengths, device_of(run.model))

    def call(model: torch.nn.Module) -> Tensor:
        hidden_states, head = head_operands(model, batch, DTYPES[run.config.dtype])
        first, last = shard_bounds(head.lm_head_weight.shape[0], ranks.size(), ranks.rank())
        options = head.options() | {"bias": None if head.bias is None else head.bias[first:last]}
        hidden_states = gather_rows(hidden_states, [sum(map(len, part)) for part in ids])
        on_device = labels.to(hidden_states.device)
        per_token_logps = parallel_linear_logps(hidden_states, head.lm_head_weight[first:last], on_device, **options)
        return sequence_logps(per_token_logps, on_device, cu_seqlens=cu_seqlens)

    return run.policy(call)
