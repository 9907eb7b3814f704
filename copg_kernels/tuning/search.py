"""One head's settings: a candidate at a time beside the best so far, its numbers before its times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels import tuned
from copg_kernels.copg import sequence_logps
from copg_kernels.kernels.blocks import Blocks, head_blocks, is_regular
from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.schedules.tile_ops import can_keep_tiles
from copg_kernels.schedules.workspace import default_workspace_bytes
from copg_kernels.tuned import WAYS, Settings
from copg_kernels.tuning.file import Unusable, check_blocks
from copg_kernels.tuning.passes import (
    FROZEN,
    LOG_PROBS,
    PASSES,
    SPARSE_EPS,
    SPARSE_ERROR,
    TRAINABLE,
    UPSTREAM,
    Case,
    Run,
)
from copg_kernels.tuning.timing import Compared, compare, time_once

TAKEN, STAYS = "taken", "not faster"
MEBIBYTE = 2**20
# Of the device's memory, the most that a tuned workspace may take above the code's default.
MEMORY_SHARE = 32


class Lost(RuntimeError):
    """The device no longer answers: nothing that is timed from here on would mean anything."""


class Tried(NamedTuple):
    """A candidate, and what became of it."""

    field: str
    value: str
    ratio: float | None  # of its time to that of the best before it; None: it got no time
    spread: float | None
    verdict: str


class Trial(NamedTuple):
    """A candidate still to be tried."""

    field: str
    value: Any
    passes: tuple[str, ...]  # whose time in sum decides
    change: Callable[[Settings], Settings]


class Budget(NamedTuple):
    rounds: int
    until: float  # of time.monotonic(): no candidate is begun after it

    @property
    def is_spent(self) -> bool:
        return time.monotonic() > self.until


Trials = Callable[[Case, Settings], Iterable[Trial]]  # from some settings on


def improved(case: Case, best: Settings, trials: Trials, budget: Budget) -> Iterator[tuple[Settings, Tried]]:
    """The best settings after each trial, which is the last where the time is up.

    Raises:
        Lost: the device broke over a candidate.
    """
    for trial in trials(case, best):
        if budget.is_spent:
            return
        candidate = trial.change(best)
        if candidate == best:
            continue
        tried = partial(Tried, trial.field, _shown(trial))
        refused = checked(case, candidate)
        if refused is not None:
            yield best, tried(None, None, refused)
            continue
        found = _compare(case, best, candidate, trial.passes, budget.rounds)["all"]
        if found.is_faster:
            # Among so many candidates, chance would have some win: once more.
            found = _compare(case, best, candidate, trial.passes, budget.rounds)["all"]
        if found.is_faster:
            best = candidate
        yield best, tried(found.ratio, found.spread, TAKEN if found.is_faster else STAYS)


def checked(case: Case, settings: Settings) -> str | None:
    """Why the settings are out of the question: a pass that raises, is wrong, or is another one when it runs again."""
    try:
        with tuned.trying(settings):
            for name, run in case.runs().items():
                returned = run()
                wrong = case.wrong(name, returned)
                if wrong is None and not _same_bits(returned, run()):
                    wrong = f"{name} has other bits when it runs again"
                if wrong is not None:
                    return f"wrong numbers: {wrong}"
    except Exception as failure:  # whatever a compiler, a driver or a launcher makes of it
        said = (str(failure).strip().splitlines() or [""])[0][:160]
        reason = f"does not run: {type(failure).__name__}: {said}"
        _require_alive(case, reason)
        return reason
    return None


def measured(case: Case, best: Settings, rounds: int) -> dict[str, Compared]:
    """The settings beside the code's, in each pass and in "all"."""
    return _compare(case, Settings(), best, PASSES, rounds)


def log_ratio_at_reference(case: Case, settings: Settings) -> float:
    """Between a loss's log-probs and those of `linear_logps`, of the same policy: 0 where both have the same bits."""
    runs = case.runs()
    with tuned.trying(settings):
        reference = sequence_logps(runs[LOG_PROBS]()[0], case.labels)
        return max((runs[name]()[-1] - reference).abs().max().item() for name in (TRAINABLE, FROZEN))


def sparse_beside_exact(case: Case, settings: Settings, rounds: int) -> Compared | str | None:
    """Loss and gradients from the compact softmax, over those from the whole; None where there are none."""
    if not can_keep_tiles(case.weight.dtype, "triton"):
        return None
    exact, sparse = (_within(settings, case.runs(eps)[TRAINABLE]) for eps in (None, SPARSE_EPS))
    try:
        wrong = case.wrong(TRAINABLE, sparse(), SPARSE_ERROR)
        exact()
        return f"wrong numbers: {wrong}" if wrong else compare({"": (exact, sparse)}, rounds, _device(case))["all"]
    except Exception as failure:
        reason = f"does not run: {type(failure).__name__}"
        _require_alive(case, reason)
        return reason


def gemm_seconds(case: Case, rounds: int) -> float:
    """Of the product that nobody can avoid, the shortest of the rounds."""
    hidden_states, weight = case.hidden_states.detach().flatten(0, 1), case.weight.detach()
    logits = torch.mm(hidden_states, weight.T)
    return min(
        time_once(lambda: torch.mm(hidden_states, weight.T, out=logits), _device(case)) for _ in range(rounds + 1)
    )


def ways_and_workspace(case: Case, best: Settings) -> Iterator[Trial]:
    """What matters most, and compiles little."""
    for field, passes in (("logps", (LOG_PROBS, UPSTREAM)), ("loss", (TRAINABLE, FROZEN))):
        for way in WAYS:
            yield Trial(field, way, passes, partial(_replace, field, way))
    with tuned.trying(Settings()):
        default = default_workspace_bytes("triton", case.weight)
    for size in (default // 4, default // 2, 2 * default, 4 * default):
        if size <= default + _spare_bytes(case):
            yield Trial("workspace_bytes", size, PASSES[1:], partial(_replace, "workspace_bytes", size))


def blocks(case: Case, best: Settings) -> Iterator[Trial]:
    """Fields of the block table one after another: all combinations would take hours, most of them to compile."""
    if not is_regular(case.weight):
        return
    table = table_entry(case.weight, best)
    choices: list[dict[str, Any]] = [
        *({"tiles_per_split": number} for number in (table.tiles_per_split // 2, 2 * table.tiles_per_split)),
        {"BLOCK_N": table.BLOCK_V, "BLOCK_V": table.BLOCK_N},
        *({"BLOCK_N": size} for size in (table.BLOCK_N // 2, 2 * table.BLOCK_N)),
        *({"BLOCK_V": size} for size in (table.BLOCK_V // 2, 2 * table.BLOCK_V)),
        *({"BLOCK_H": size} for size in (table.BLOCK_H // 2, 2 * table.BLOCK_H)),
    ]
    if not INTERPRETING:
        choices += [{"num_warps": number} for number in (4, 8)]
        choices += [{"num_stages": table.num_stages + step} for step in (-1, 1)]
    for fields in choices:
        try:
            check_blocks(table._replace(**fields)._asdict(), "the candidate")
        except Unusable:
            continue
        value = " x ".join(str(value) for value in fields.values())
        yield Trial(" x ".join(fields), value, PASSES, partial(_with_blocks, case.weight, fields))


def table_entry(weight: Tensor, settings: Settings) -> Blocks:
    """The blocks that the settings mean."""
    with tuned.trying(settings):
        return head_blocks(weight)


def _compare(case: Case, old: Settings, new: Settings, passes: tuple[str, ...], rounds: int) -> dict[str, Compared]:
    runs = case.runs()
    pairs = {name: (_within(old, runs[name]), _within(new, runs[name])) for name in passes}
    return compare(pairs, rounds, _device(case))


def _within(settings: Settings, run: Run) -> Run:
    def wrapper() -> tuple[Tensor, ...]:
        with tuned.trying(settings):
            return run()

    return wrapper


def _replace(field: str, value: Any, settings: Settings) -> Settings:
    return settings._replace(**{field: value})


def _with_blocks(weight: Tensor, fields: dict[str, Any], settings: Settings) -> Settings:
    entry = table_entry(weight, settings)
    changed = entry._replace(**fields)
    return settings if changed == entry else settings._replace(blocks=changed._asdict())


def _spare_bytes(case: Case) -> int:
    """More workspace than the default, where the device has so much that it will not be missed."""
    if not case.weight.is_cuda:
        return 0
    return torch.cuda.get_device_properties(case.weight.device).total_memory // MEMORY_SHARE


def _same_bits(returned: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(returned, again, strict=True))


def _require_alive(case: Case, reason: str) -> None:
    try:
        if case.weight.is_cuda:
            torch.cuda.synchronize(case.weight.device)
    except Exception as error:
        raise Lost(f"the GPU no longer answers after a candidate that {reason}") from error


def _device(case: Case) -> torch.device:
    return case.weight.device


def _shown(trial: Trial) -> str:
    return f"{trial.value // MEBIBYTE} MiB" if trial.field == "workspace_bytes" else str(trial.value)
