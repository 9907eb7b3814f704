"""A head's rows over the ranks of a process group: which rank has which, and what each was called with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from copg_kernels import checks
from copg_kernels.parallel.agreement import Call, process_group
from copg_kernels.schedules.shards import Shards


def shard_bounds(vocab_size: int, world_size: int, rank: int) -> tuple[int, int]:
    """First and past-the-last row of a rank's shard, as torch.chunk and DTensor split: the last ranks may be short.

    Examples:
        >>> [shard_bounds(5, 4, rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    if vocab_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            "shard_bounds needs vocab_size >= 1, world_size >= 1 and 0 <= rank < world_size, "
            f"got {vocab_size}, {world_size} and {rank}"
        )
    size = -(-vocab_size // world_size)
    return min(rank * size, vocab_size), min((rank + 1) * size, vocab_size)


class HeadCall(NamedTuple):
    """What a function on a sharded head was called with, besides its group."""

    function: str
    hidden_states: Tensor
    lm_head_shard: Tensor
    labels: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    workspace_bytes: int | None
    backend: str

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What may need a gradient: hidden states, and this rank's rows of weight and bias as plain tensors."""
        return self.hidden_states, _local("lm_head_shard", self.lm_head_shard), _local("bias", self.bias)

    def needs(self) -> list[bool]:
        return [checks.needs_gradient(x) for x in self.inputs()]


class Own(NamedTuple):
    """What a rank tells the others of its shard."""

    num_rows: int
    workspace_bytes: int


class Place(NamedTuple):
    """A rank's shard among the others."""

    first_row: int
    num_rows: int
    vocab_size: int
    shards: Shards
    workspace_bytes: int
    """The smallest of all ranks: what chunks are planned by."""


def place_of(group: dist.ProcessGroup, owns: list[Own]) -> Place:
    rank, rows = dist.get_rank(group), [own.num_rows for own in owns]
    shards = Shards(group, max(rows))
    return Place(sum(rows[:rank]), rows[rank], sum(rows), shards, min(own.workspace_bytes for own in owns))


def group_of(lm_head_shard: Tensor, group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """That of a DTensor's mesh, or the one given."""
    if not isinstance(lm_head_shard, DTensor):
        return process_group(group)
    mesh = lm_head_shard.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"lm_head_shard must be a DTensor on a one-dimensional mesh, got {mesh.ndim} dimensions with placements "
            f"{tuple(lm_head_shard.placements)}: gather the data-parallel ones first (FSDP2 does in forward)"
        )
    if group is not None and process_group(group) is not mesh.get_group():
        raise ValueError("group must be that of lm_head_shard's mesh, or None, where lm_head_shard is a DTensor")
    return process_group(mesh)


def describe_head(call: HeadCall) -> Call:
    """Refuses what `linear_logps` refuses; what the ranks must agree on, and an `Own`."""
    hidden_states, shard, bias = call.inputs()
    checks.check_head(hidden_states, shard, call.labels, bias, least_rows=0)
    checks.check_transforms(hidden_states, shard, bias)
    checks.check_ignore_index(call.ignore_index)
    checks.check_logit_options(call.logit_scale, call.softcap, call.temperature)
    backend = checks.resolve_backend(call.backend, hidden_states)
    workspace = checks.check_workspace(call.workspace_bytes, hidden_states, call.labels.numel(), backend, shard)
    needs_hidden, needs_shard, needs_bias = call.needs()
    shared = {
        "the function": call.function,
        "the shape of hidden_states": tuple(hidden_states.shape),
        "the dtype of hidden_states": hidden_states.dtype,
        "labels (their checksum)": checksum(call.labels),
        "the use of bias": bias is not None,
        "the need of a gradient of hidden_states": needs_hidden,
        "the need of a gradient of lm_head_shard": needs_shard,
        "the need of a gradient of bias": needs_bias,
        "logit_scale": call.logit_scale,
        "softcap": call.softcap,
        "temperature": call.temperature,
        "ignore_index": call.ignore_index,
        "backend": backend,
    }
    return Call(shared, Own(shard.shape[0], workspace))


def checksum(values: Tensor) -> int:
    """Of numbers in their order; NaN is a number like others."""
    numbers = values.detach().reshape(-1)
    if numbers.is_floating_point():
        bits = numbers.double().view(torch.int64)
        # Of a changed sign a sum modulo 2**64 keeps nothing where it is counted an even number of times.
        numbers = bits ^ (bits >> 32)
    odd_numbers = 1 + 2 * torch.arange(numbers.numel(), device=numbers.device)
    return int((numbers.long() * odd_numbers).sum())


def _local(name: str, value: Any) -> Any:
    """This rank's rows of a DTensor; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    if tuple(value.placements) != (Shard(0),):
        raise ValueError(f"{name} must be placed as (Shard(0),) where it is a DTensor, got {tuple(value.placements)}")
    return value.to_local()
