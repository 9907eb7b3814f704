"""One table: every provider on the same inputs, checked, then timed side by side, then weighed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.accuracy import Errors, Truth, exact, gradient_errors, logps_error, wrong
from bench.inputs import BenchInputs, Shape, density, make_inputs
from bench.loaders import LOADERS
from bench.memory import cuda_peaks, host_peaks_in_child
from bench.providers import LOG_PROBS, MEAN_CE, PASSES, TRAINABLE, Provider, Run, bind
from bench.timing import Floor, Rounds, Timing, floor_cases, time_alternating

Advance = Callable[[str, int], object]  # what comes next, and how many steps of `num_steps` are done


class Settings(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rounds: Rounds
    providers: tuple[str, ...]
    passes: tuple[str, ...] = (LOG_PROBS, TRAINABLE)
    seed: int = 0


class Checked(NamedTuple):
    """One row of the table before it is timed."""

    provider: str
    pass_name: str
    status: str  # "ok", or why there is no time
    errors: Errors = Errors()


def num_steps(settings: Settings) -> int:
    """Steps of the progress bar that a table takes."""
    cases = 3 + len(settings.passes) * len(settings.providers)
    return 1 + 2 * len(settings.providers) + cases * settings.rounds.most


def measure_table(shape: Shape, regime: str, settings: Settings, advance: Advance) -> dict[str, Any]:
    advance("inputs and exact gradients", 0)
    inputs = make_inputs(shape, regime, settings.dtype, settings.device, settings.seed)
    providers, rows = load_providers(settings.providers, settings.device)
    truth = exact(inputs, _with_ceiling(settings.passes) if _has_ceiling(providers) else settings.passes)
    advance("inputs and exact gradients", 1)
    for name, provider in providers.items():
        advance(f"checking {name}", 0)
        rows += check(name, bind(provider, inputs), settings.passes, truth)
        advance(f"checking {name}", 1)
    rows.sort(key=lambda row: settings.providers.index(row.provider))

    sound = [row for row in rows if row.status == "ok"]
    runs = {name: bind(provider, inputs) for name, provider in providers.items()}
    floor, timings = _time_all(inputs, sound, runs, settings, advance)
    peaks = _weigh_all(inputs, sound, providers, settings, advance)
    return {
        "shape": shape._asdict(),
        "regime": regime,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "density": density(inputs),
        "beta": inputs.beta,
        "seed": settings.seed,
        "rounds": timings["floor", "logits"].rounds,
        "floor_seconds": floor._asdict(),
        "rows": [_row(row, timings.get((row.provider, row.pass_name)), floor, peaks) for row in rows],
    }


def load_providers(names: tuple[str, ...], device: torch.device) -> tuple[dict[str, Provider], list[Checked]]:
    """Those that can be had, and a row with the reason for each of the others."""
    providers, missing = {}, []
    for name in names:
        try:
            providers[name] = LOADERS[name](device)
        except ImportError as reason:
            missing.append(Checked(name, "all", _first_line(reason)))
        except Exception as failure:  # a library that cannot even be imported here
            missing.append(Checked(name, "all", f"failed to load: {_named(failure)}"))
    return providers, missing


def check(name: str, runs: dict[str, Run], passes: tuple[str, ...], truth: Truth) -> Iterator[Checked]:
    """A row per pass. Wrong log-probs cost a provider the time of every pass, for all are made of them."""
    wanted = [pass_name for pass_name in _with_ceiling(passes) if pass_name in runs]
    logps = Errors()
    dtype = next(iter(truth.gradients.values()))[0].dtype if truth.gradients else truth.token_logps.dtype
    for pass_name in dict.fromkeys([LOG_PROBS, *wanted] if LOG_PROBS in runs else wanted):
        try:
            returned = runs[pass_name]()
        except Exception as failure:  # a contestant that cannot run here must not take the table with it
            errors, status = Errors(), f"failed: {_named(failure)}"
        else:
            dtype = returned[0].dtype if pass_name != LOG_PROBS else dtype
            if pass_name == LOG_PROBS:
                errors = logps = logps_error(returned[0], truth)
            else:
                errors = gradient_errors(pass_name, returned, truth)._replace(logps=logps.logps)
            status = "ok"
        if pass_name in wanted:
            yield Checked(name, pass_name, status, errors)
