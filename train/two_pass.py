"""The gradient of a step's loss in micro-batches that may split its groups, without approximation.

A loss L on log-probs l_i of whole groups needs all of a group at once, its gradient does not:

    pass 1, without gradients:  all l_i, in micro-batches           c_i = dL/dl_i   by autograd on these N numbers
    pass 2, in micro-batches:   backward of  sum_i c_i l_i          which adds up to sum_i c_i dl_i/dtheta = dL/dtheta

The price is a second forward pass. A policy with dropout would be another one in the second pass; ours have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.batch import Group
from train.state import Run, batches_in_order, differentiable_logps, policy_logps


def backward_in_two_passes(
    run: Run, groups: Sequence[Group], loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Adds dloss(logps)/dparameter to the gradients of run.model; returns the loss and logps (N,), detached."""
    impl = run.config.impl
    logps = policy_logps(run, groups, impl)
    value, coefficients = value_and_coefficients(loss, logps)
    done = 0
    for batch in batches_in_order(run, groups):
        part = differentiable_logps(run, batch, impl)
        (coefficients[done : done + part.numel()] * part).sum().backward()
        done += part.numel()
    return value, logps


def value_and_coefficients(loss: Callable[[Tensor], Tensor], logps: Tensor) -> tuple[Tensor, Tensor]:
    """loss(logps) and dloss/dlogps (N,)."""
    leaf = logps.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]
