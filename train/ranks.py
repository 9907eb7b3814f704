"""The processes of a run, as torchrun starts them: who takes which part, and what they tell each other.

A run in one process is the same code with one rank, and nothing travels. What travels here are small Python objects;
tensors travel in DDP, FSDP2 and copg_kernels.parallel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from copg_kernels.parallel.agreement import Call, agree, process_group

T = TypeVar("T")


class RankError(Exception):
    """Another rank failed, which the message names."""


@contextmanager
def joined(device: torch.device, seconds: int) -> Iterator[None]:
    """In the process group that torchrun's environment describes, or that the caller has made already."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timedelta(seconds=seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # A restart finds torchrun's store as it was left, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error: NCCL would wait for a rank that is gone


@contextmanager
def quiet_but_first() -> Iterator[None]:
    """What is printed on several ranks is printed by the first."""
    with ExitStack() as stack:
        if not is_first():
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def are_restarted() -> bool:
    """Whether torchrun has started the processes once more, after one of them had died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def from_all(value: T) -> list[T]:
    """Every rank's value, in rank order."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(action: Callable[[], T]) -> T:
    """What action() gives on the first rank, which alone carries it out."""
    results = [together(lambda: action() if is_first() else None)]
    if size() > 1:
        dist.broadcast_object_list(results, src=0)
    return results[0]  # type: ignore[return-value]


def together(action: Callable[[], T]) -> T:
    """action() on every rank, without collectives inside; where one fails all do, and none waits for it."""
    if size() == 1:
        return action()
    failure = result = None
    try:
        result = action()
    except Exception as error:
        failure = error
    messages = from_all(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for other, message in enumerate(messages):
        if message is not None:
            raise RankError(f"rank {other}: {message}")
    return result  # type: ignore[return-value]


def require_same(values: dict[str, Any]) -> None:
    """ValueError naming the first of these in which ranks differ, with each rank's value."""
    if size() > 1:
        agree(process_group(None), lambda: Call(values, None))


def share(items: Sequence[T], of: int | None = None) -> Sequence[T]:
    """The consecutive items of a rank, by default this one; shares differ by one item at most."""
    taker = rank() if of is None else of
    return items[len(items) * taker // size() : len(items) * (taker + 1) // size()]


def mine(items: Sequence[T]) -> list[T]:
    """Every size()-th item, from rank() on. Where they do not come out even the last item is taken again: ranks that
    gather shards in each pass must take as many passes as the others."""
    return [items[min(start + rank(), len(items) - 1)] for start in range(0, len(items), size())]


def in_order(results: Sequence[T], count: int) -> list[T]:
    """The `count` results of all ranks, each having worked on `mine` of as many items, in the order of the items."""
    everyone = from_all(list(results))
    return [everyone[i % size()][i // size()] for i in range(count)]
