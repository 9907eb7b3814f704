"""The policy over processes: whole on each (DDP) or a shard on each (FSDP2), and whole again for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from train import ranks
from train.config import Config
from train.pretrained import without_wrapper


class Policy(nn.Module):
    """A model behind one entrance: `policy(call)` is call(model).

    DDP and FSDP2 do their work in hooks of the module that is called. Ours is never the model as a whole, whose forward
    would compute logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[nn.Module], Any]) -> Any:
        return call(self.model)


def spread(config: Config, model: nn.Module, device: torch.device) -> nn.Module:
    """The model's Policy on this rank's device, as --parallel has it."""
    policy = Policy(model)
    if ranks.size() > 1 and config.parallel == "fsdp":
        return _sharded(policy, device)
    policy.to(device)
    if ranks.size() == 1 or not any(parameter.requires_grad for parameter in policy.parameters()):
        return policy
    return DistributedDataParallel(policy, gradient_as_bucket_view=True)


def _sharded(policy: Policy, device: torch.device) -> nn.Module:
    """A group of shards for each transformer block, gathered when it runs, and one for all that is left.

    fully_shard moves what it shards to the device: the whole model never is there.
    """
    mesh = init_device_mesh(device.type, (ranks.size(),))
    blocks = set(without_wrapper(policy.model)._no_split_modules or ())
    for module in list(policy.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    return policy


def is_sharded(policy: nn.Module) -> bool:
    return isinstance(policy, FSDPModule)


@contextmanager
def gradients_stay(policy: nn.Module, stay: bool) -> Iterator[None]:
    """Under DDP gradients add up on each rank if they are to stay; FSDP2 has no room for whole ones."""
    if stay and isinstance(policy, DistributedDataParallel):
        with policy.no_sync():
            yield
    else:
        yield


def whole(tensor: Any) -> Any:
    """A tensor with the shards of all ranks, which all have to ask; anything else as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """On the first rank all weights by name, on its CPU; None where no weight is sharded."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    weights: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}  # tied weights are one tensor, in the checkpoint too
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in gathered:
            tensor = whole(value.detach())
            gathered[id(value)] = tensor.cpu() if ranks.is_first() else tensor.new_empty(0)
        weights[name] = gathered[id(value)]
    return weights


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """optimizer.state_dict() as one process has it."""
    state = optimizer.state_dict()
    moments = {index: {name: whole(value) for name, value in entry.items()} for index, entry in state["state"].items()}
    return state | {"state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What `whole_optimizer_state` gave, on however many ranks that was."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _placed(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})


def _placed(value: Any, parameter: Tensor) -> Any:
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
