"""Processes of one gloo group on this machine, started once: `run` calls a function on the first few of them."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SECONDS_TO_START, _SECONDS_TO_ANSWER = 120, 60


class Ranks:
    """Ranks 0 .. world_size - 1; a function gets the process group of those it runs on, and must be importable."""

    def __init__(self, world_size: int, store: Path, seconds: float = 30, preload: Sequence[str] = ()) -> None:
        # A server that has everything imported forks them: starting each afresh takes seconds of one core.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "copg_kernels.parallel", "pytest", *preload])
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, str(store), seconds), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        assert all(self._receive(pipe, _SECONDS_TO_START) == ("returned", None) for pipe in self.pipes)

    def run(self, function: Callable, *args: Any, size: int | None = None) -> list[Any]:
        """function(group, *args) on the first `size` ranks, all by default -> what it returned, by rank."""
        outcomes = self.outcomes(function, *args, size=size)
        failures = {rank: value for rank, (kind, value) in enumerate(outcomes) if kind != "returned"}
        assert not failures, f"{function.__name__} failed on ranks {failures}"
        return [value for _, value in outcomes]

    def errors(self, function: Callable, *args: Any, size: int | None = None) -> list[str]:
        """As `run`, of a function that is to fail on every rank -> "ErrorType: message" by rank."""
        outcomes = self.outcomes(function, *args, size=size)
        assert all(kind == "raised" for kind, _ in outcomes), outcomes
        return [value for _, value in outcomes]

    def outcomes(self, function: Callable, *args: Any, size: int | None = None) -> list[tuple[str, Any]]:
        """("returned", value), ("raised", "ErrorType: message") or ("died", None), by rank."""
        size = len(self.pipes) if size is None else size
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((size, function, args)))
        return [self._receive(pipe, _SECONDS_TO_ANSWER) for pipe in self.pipes][:size]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()

    @staticmethod
    def _receive(pipe: Any, seconds: float) -> tuple[str, Any]:
        if not pipe.poll(seconds):
            return "silent", f"for {seconds} s"
        try:
            # Bytes of ours: the pipe's own pickling would pass tensors through shared memory.
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return "died", None


def _serve(pipe: Any, rank: int, world_size: int, store: str, seconds: float) -> None:
    torch.set_num_threads(1)
    # Fresh memory is NaN in these processes too.
    torch.use_deterministic_algorithms(True)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"file://{store}", timeout, world_size=world_size, rank=rank)
    groups = {size: dist.new_group(list(range(size)), timeout) for size in range(1, world_size + 1)}
    pipe.send_bytes(pickle.dumps(("returned", None)))
    while True:
        try:
            size, function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            outcome = "returned", function(groups[size], *args) if rank < size else None
        except Exception as error:
            outcome = "raised", f"{type(error).__name__}: {error}"
        pipe.send_bytes(pickle.dumps(outcome))
