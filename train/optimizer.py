"""AdamW on what is trained, clipped, with a learning rate that is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from train.config import Config
from train.state import Run


def make_optimizer(config: Config, policy: nn.Module) -> torch.optim.Optimizer:
    if isinstance(policy, FSDPModule):
        policy.reshard()  # after a forward pass without gradients the whole parameters are still in place of the shards
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)


def warmup_factor(config: Config, step: int) -> float:
    return min(1.0, (step + 1) / max(1, config.lr_warmup_steps))


def learning_rate(config: Config, step: int) -> float:
    """--lr after a linear warm-up; with a schedule it then falls, and would be 0 right after the last step."""
    left = config.steps - config.lr_warmup_steps
    progress = min(1.0, max(0, step - config.lr_warmup_steps) / max(1, left))
    falling = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.lr * warmup_factor(config, step) * falling[config.schedule]


def apply_gradients(run: Run, lr: float) -> float:
    """One clipped optimizer step; returns the gradient's norm before clipping."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = gradient_norm(trained)
    nn.utils.clip_grads_with_norm_(trained, run.config.max_grad_norm, norm)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm.item()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Over all parameters and their shards. In float32 such a sum is off by 1e-5, and by how much depends on shards."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.stack([torch.linalg.vector_norm(shard, dtype=torch.float64) ** 2 for shard in shards]).sum()
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        dist.all_reduce(squares)
    return squares.sqrt()
