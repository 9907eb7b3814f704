"""A process of `tests.ranks` as torchrun or accelerate would have started it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState
from transformers import TrainingArguments

FSDP2 = dict(version=2, reshard_after_forward=True, state_dict_type="SHARDED_STATE_DICT")


@contextmanager
def launched(engine: str | None) -> Iterator[None]:
    """engine: None for one process that knows of no others, "DDP" or "FSDP2"."""
    _forget()
    if engine is not None:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    try:
        yield
    finally:
        _forget()


def shard_on_the_cpu(args: TrainingArguments) -> None:
    """accelerate shards models on GPUs only, though FSDP2 can on a CPU: it is told that this process has one."""
    assert args.device.type == "cpu"
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
