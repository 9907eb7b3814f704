"""All heads of a run, in the order in which they matter: what the file gets, as it is found."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from copg_kernels.tuned import Settings
from copg_kernels.tuning.passes import PASSES, REGIMES, Case, Head, make_case
from copg_kernels.tuning.search import (
    STAYS,
    Budget,
    Trials,
    Tried,
    blocks,
    checked,
    gemm_seconds,
    improved,
    log_ratio_at_reference,
    measured,
    sparse_beside_exact,
    ways_and_workspace,
)
from copg_kernels.tuning.table import described


class Plan(NamedTuple):
    """What to tune, where, and for how long."""

    heads: list[Head]
    num_tokens: int
    repeats: int
    until: float  # of time.monotonic(): no candidate is begun after it
    device: torch.device


class Refused(RuntimeError):
    """Why a head cannot be tuned."""


class Progress(NamedTuple):
    """Of one head."""

    settings: Settings = Settings()
    tried: tuple[Tried, ...] = ()


def found_entries(plan: Plan, say: Callable[[str], object]) -> Iterator[tuple[Head, dict[str, Any] | Refused]]:
    """A head and its entry of the file, each time there is more to say of it; or why there will be none.

    Ways and workspace come first, for every head: they matter most, and compile least. Each step has its share of the
    time that is left.

    Raises:
        search.Lost: the device broke.
    """
    progress = dict.fromkeys(plan.heads, Progress())
    steps = [(trials, head) for trials in (ways_and_workspace, blocks) for head in plan.heads]
    for number, (trials, head) in enumerate(steps):
        if head not in progress:
            continue
        if time.monotonic() > plan.until:
            say("the time is up")
            return
        try:
            progress[head], entry = _step(plan, head, progress[head], trials, 1 / (len(steps) - number), say)
            yield head, entry
        except (Refused, torch.OutOfMemoryError) as failure:
            del progress[head]
            why = str(failure) if isinstance(failure, Refused) else "it does not fit the device's memory"
            yield head, Refused(f"{named(head)}: {why}")


def named(head: Head) -> str:
    return f"{str(head.dtype).removeprefix('torch.')} {head.vocab_size} x {head.hidden_size}"


def _step(
    plan: Plan, head: Head, progress: Progress, trials: Trials, share: float, say: Callable[[str], object]
) -> tuple[Progress, dict[str, Any]]:
    """`share` of the time that is left once the inputs are there and the code's defaults are compiled."""
    case = make_case(head, plan.num_tokens, plan.device)
    if not progress.tried:
        wrong = checked(case, Settings())
        if wrong is not None:
            raise Refused(f"with the code's defaults, {wrong}")
    now = time.monotonic()
    budget = Budget(plan.repeats, now + share * max(0.0, plan.until - now))
    for settings, tried in improved(case, progress.settings, trials, budget):
        progress = Progress(settings, (*progress.tried, tried))
        say(f"{named(head)}: {_told(tried)}")
    progress, entry = _confirmed(plan, head, case, progress)
    if trials is blocks and not budget.is_spent:
        entry["measured"]["sparse"] = _sparse(plan, head, case, progress.settings)
    return progress, entry


def _confirmed(plan: Plan, head: Head, case: Case, progress: Progress) -> tuple[Progress, dict[str, Any]]:
    """The entry. All that was taken on the way has to be faster than the defaults once more, together."""
    times = measured(case, progress.settings, plan.repeats)
    seconds = {name: times[name].new_seconds for name in PASSES}
    if progress.settings != Settings() and not times["all"].is_faster:
        together = Tried("all of it", described(progress.settings), times["all"].ratio, times["all"].spread, STAYS)
        progress = Progress(Settings(), (*progress.tried, together))
        seconds = {name: times[name].old_seconds for name in PASSES}
    passes = [
        {
            "pass": name,
            "default_seconds": times[name].old_seconds,
            "seconds": seconds[name],
            "ratio": times[name].ratio if progress.settings != Settings() else 1.0,
            "spread": times[name].spread,
        }
        for name in PASSES
    ]
    return progress, {
        "dtype": str(head.dtype).removeprefix("torch."),
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        **progress.settings._asdict(),
        "measured": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "num_tokens": plan.num_tokens,
            "repeats": plan.repeats,
            "gemm_seconds": gemm_seconds(case, plan.repeats),
            "log_ratio_at_reference": log_ratio_at_reference(case, progress.settings),
            "passes": passes,
            "tried": [tried._asdict() for tried in progress.tried],
            "sparse": [],
        },
    }


def _sparse(plan: Plan, head: Head, case: Case, settings: Settings) -> list[dict[str, Any]]:
    """Told and not acted upon: the gradients are others."""
    rows: list[dict[str, Any]] = []
    for regime in REGIMES:
        inputs = case if regime == "peaked" else make_case(head, plan.num_tokens, plan.device, regime)
        found = sparse_beside_exact(inputs, settings, plan.repeats)
        if isinstance(found, str):
            rows.append({"regime": regime, "ratio": None, "spread": None, "verdict": found})
        elif found is not None:
            times = {"ratio": found.ratio, "spread": found.spread}
            rows.append({"regime": regime, **times, "verdict": "for you to choose"})
    return rows


def _told(tried: Tried) -> str:
    times = "" if tried.ratio is None else f" {tried.ratio:.3f} of the time, spread {tried.spread:.3f}:"
    return f"{tried.field} {tried.value}:{times} {tried.verdict}"
