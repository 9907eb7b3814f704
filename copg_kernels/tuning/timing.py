"""Two ways to do the same, in turn, so that a clock that drifts or a neighbour that wakes up meets both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]
# Of what is timed, a difference below this is none.
LEAST_GAIN = 0.015


class Compared(NamedTuple):
    """Medians over the rounds; the ratios are those of neighbours in a round."""

    old_seconds: float
    new_seconds: float
    ratio: float  # new over old
    spread: float  # interquartile range of the ratios

    @property
    def is_faster(self) -> bool:
        """Beyond the spread, and by enough to matter."""
        return 1 - self.ratio > max(self.spread, LEAST_GAIN)


def compare(pairs: dict[str, tuple[Run, Run]], rounds: int, device: torch.device) -> dict[str, Compared]:
    """Each name's (old, new), and "all", the sum over the names in each round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for number in range(rounds):
        for name, (old, new) in pairs.items():
            if number % 2 == 0:
                before = time_once(old, device)
                seconds[name].append((before, time_once(new, device)))
            else:
                after = time_once(new, device)
                seconds[name].append((time_once(old, device), after))
    sums = [(sum(old for old, _ in each), sum(new for _, new in each)) for each in zip(*seconds.values(), strict=True)]
    return {name: _compared(values) for name, values in (seconds | {"all": sums}).items()}


def time_once(run: Run, device: torch.device) -> float:
    """Seconds on the device, by its own clock where it has one."""
    if device.type != "cuda":
        return host_seconds(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_seconds(run: Run) -> float:
    """By the host's clock."""
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result  # freeing it is not part of the time
    return elapsed


def _compared(seconds: list[tuple[float, float]]) -> Compared:
    ratios = [new / old for old, new in seconds]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    old, new = (statistics.median(values) for values in zip(*seconds, strict=True))
    return Compared(old, new, median, high - low)
