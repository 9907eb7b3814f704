"""A process of `tests.ranks` as torchrun or accelerate would have started it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

FSDP2 = dict(version=2, reshard_after_forward=True, state_dict_type="SHARDED_STATE_DICT")


@contextmanager
def launched(alone: bool = False) -> Iterator[None]:
    """One of the default process group's processes, or one that knows of no others."""
    _forget()
    if not alone:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    try:
        yield
    finally:
        _forget()


def arguments_for(engine: str | None, arguments: type) -> type:
    """TrainingArguments, or the like, that choose the engine: "DDP" or None is what they are without more."""
    if engine != "FSDP2":
        return arguments

    class Sharding(arguments):
        def __init__(self, *args, **settings) -> None:
            super().__init__(*args, **(dict(fsdp=True, fsdp_config=dict(FSDP2)) | settings))
            assert self.device.type == "cpu"
            shard_on_the_cpu(self.distributed_state)

    return Sharding


def shard_on_the_cpu(state: PartialState) -> None:
    """accelerate shards models on GPUs only, though FSDP2 can on a CPU: it is told that there is one."""
    state.distributed_type = DistributedType.MULTI_GPU


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
