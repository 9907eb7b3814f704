"""Gradient steps with AdamW, the same for every model of the summarisation experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup


def descend(
    model: nn.Module, loss_at: Callable[[int], Tensor], *, steps: int, lr: float, to_zero: bool
) -> Iterator[tuple[int, float]]:
    """Takes `steps` steps on loss_at(0), loss_at(1), ..., yielding the number of steps taken and the last loss.

    The learning rate warms up over a tenth of the steps, then stays, or falls to zero along a cosine (to_zero).
    Gradients are not clipped and weights do not decay: AdamW then takes the same step for a loss and for ten times
    that loss, and losses of different scales can share one learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    warmup = steps // 10
    schedule = (
        get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        if to_zero
        else get_constant_schedule_with_warmup(optimizer, warmup)
    )
    model.train()
    for step in range(steps):
        loss = loss_at(step)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step + 1, loss.item()
