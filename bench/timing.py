"""Alternating timings, and the GEMM floor they are set against.

All cases of a table run in turn, round after round, so that a clock that drifts or a neighbour that wakes up
hits every provider alike. The floor is `torch.mm` on the same operands, in the same rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

from bench.inputs import BenchInputs
from copg_kernels.tuning.timing import host_seconds

LEAST_ROUNDS = 3
Case = TypeVar("Case", bound=Hashable)


class Rounds(NamedTuple):
    most: int
    seconds: float = math.inf  # no new round after these, once there are LEAST_ROUNDS
    share: float = 1 / 6  # of the seconds: a case that took more in two rounds sits the others out


class Timing(NamedTuple):
    median: float  # seconds
    spread: float  # interquartile range over the median
    rounds: int


class Floor(NamedTuple):
    """Seconds of the three GEMMs of a head: logits = X W^T, dX = G W, dW = G^T X."""

    logits: float
    dhidden: float
    dweight: float

    def of(self, units: int) -> float:
        """1: the logits. 2: a frozen head. 3: logits and both gradients. 4: the logits a second time."""
        return {
            1: self.logits,
            2: self.logits + self.dhidden,
            3: self.logits + self.dhidden + self.dweight,
            4: 2 * self.logits + self.dhidden + self.dweight,
        }[units]


def floor_cases(inputs: BenchInputs) -> dict[str, Callable[[], object]]:
    """The GEMMs of `Floor` as timed cases.

    Only rows that count take part. The logits go to a buffer that is there already, for nobody has to allocate them;
    the gradients are new tensors, as they are for every provider.
    """
    hidden_states, lm_head_weight = inputs.hidden_states.detach(), inputs.lm_head_weight.detach()
    if inputs.counted is not None:
        hidden_states = hidden_states[inputs.counted]
    logits = torch.mm(hidden_states, lm_head_weight.T)
    return {
        "logits": lambda: torch.mm(hidden_states, lm_head_weight.T, out=logits),
        "dhidden": lambda: torch.mm(logits, lm_head_weight),
        "dweight": lambda: torch.mm(logits.T, hidden_states),
    }


def time_alternating(
    cases: Mapping[Case, Callable[[], object]],
    rounds: Rounds,
    device: torch.device,
    after_each: Callable[[], object],
) -> dict[Case, Timing]:
    """Median and spread of each case; each round starts one case later than the one before."""
    time_once = _cuda_timer(device) if device.type == "cuda" else host_seconds
    seconds: dict[Case, list[float]] = {name: [] for name in cases}
    names = list(cases)
    stop = time.perf_counter() + rounds.seconds
    for round_number in range(rounds.most):
        if round_number >= LEAST_ROUNDS and time.perf_counter() > stop:
            break
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            if round_number >= 2 and sum(seconds[name]) > rounds.seconds * rounds.share:
                continue
            seconds[name].append(time_once(cases[name]))
            after_each()
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> Timing:
    median = statistics.median(values)
    if len(values) < 2:
        return Timing(median, math.nan, 1)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, (high - low) / median, len(values))


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def cuda_seconds(run: Callable[[], object]) -> float:
        # Every call finds a cold L2, and the GPU is busy while the host queues the first kernels.
        scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return cuda_seconds
