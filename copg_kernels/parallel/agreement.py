"""What the ranks of a process group must agree on before tensors travel.

A collective over tensors of different shapes hangs or mixes numbers up, and so does one that a rank never reaches
because it refused its arguments. So every rank first tells the others what it was called with, or why it refused: one
all_gather of a few hundred bytes, which on a GPU waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class Call(NamedTuple):
    """What one rank was called with."""

    shared: dict[str, Any]
    """The same on all ranks, by the name an error gives it."""
    own: Any
    """What may differ."""


def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """A group, a one-dimensional mesh's group, or the default group; refused where this process is no member."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group needs torch.distributed.init_process_group to be called first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f'group must be a one-dimensional DeviceMesh, such as mesh["tp"], got {group}')
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must have this process as a member, got one that has not")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group


def agree(group: dist.ProcessGroup, describe: Callable[[], Call]) -> list[Any]:
    """Every rank's own part in rank order; an error on all ranks where one refuses its arguments or they differ."""
    refusal: Exception | None = None
    try:
        mine: Call | str = describe()
    except Exception as error:
        refusal, mine = error, f"{type(error).__name__}: {error}"
    calls: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(calls, mine, group=group)
    if refusal is not None:
        raise refusal
    ranks = dist.get_process_group_ranks(group)
    for rank, call in zip(ranks, calls, strict=True):
        if isinstance(call, str):
            raise ValueError(f"rank {rank} refused its arguments: {call}")
    for name in calls[0].shared:
        _require_equal(name, {rank: call.shared[name] for rank, call in zip(ranks, calls, strict=True)})
    return [call.own for call in calls]


def _require_equal(name: str, values: dict[int, Any]) -> None:
    ranks_of: dict[Any, list[int]] = {}
    for rank, value in values.items():
        ranks_of.setdefault(value, []).append(rank)
    if len(ranks_of) > 1:
        listed = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in ranks_of.items())
        raise ValueError(f"{name} must be the same on all ranks, got {listed}")
