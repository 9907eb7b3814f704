"""One table: every provider on the same inputs, checked, then timed side by side, then weighed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
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
    has_ceiling = any(provider.log_probs is None for provider in providers.values())
    truth = exact(inputs, _with_ceiling(settings.passes) if has_ceiling else settings.passes)
    advance("inputs and exact gradients", 1)
    for name, provider in providers.items():
        advance(f"checking {name}", 0)
        rows += check(name, provider, inputs, settings.passes, truth)
        advance(f"checking {name}", 1)
    rows.sort(key=lambda row: settings.providers.index(row.provider))

    sound = [row for row in rows if row.status == "ok"]
    floor, timings = _time_all(inputs, sound, providers, settings, advance)
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


def check(name: str, provider: Provider, inputs: BenchInputs, passes: tuple[str, ...], truth: Truth) -> list[Checked]:
    """A row per pass. Wrong log-probs cost a provider the time of every pass, for all are made of them."""
    runs, rows, logps = bind(provider, inputs), [], None
    wanted = [pass_name for pass_name in PASSES if pass_name in runs and pass_name in _with_ceiling(passes)]
    for pass_name in runs:
        if pass_name != LOG_PROBS and pass_name not in wanted:
            continue
        try:
            errors, status = _errors(pass_name, runs[pass_name], truth), "ok"
        except Exception as failure:  # a contestant that cannot run here must not take the table with it
            errors, status = Errors(), f"failed: {_named(failure)}"
        logps = errors.logps if pass_name == LOG_PROBS else logps
        errors = errors._replace(logps=logps)
        if status == "ok":
            status = wrong(errors, inputs.hidden_states.dtype) or "ok"
        if pass_name in wanted:
            rows.append(Checked(name, pass_name, status, errors))
    return rows


def _errors(pass_name: str, run: Run, truth: Truth) -> Errors:
    returned = run()
    return logps_error(returned[0], truth) if pass_name == LOG_PROBS else gradient_errors(pass_name, returned, truth)


def _with_ceiling(passes: tuple[str, ...]) -> tuple[str, ...]:
    """The ceiling stands beside the loss whose work comes closest to its own."""
    return (*passes, MEAN_CE) if TRAINABLE in passes else passes


def _time_all(
    inputs: BenchInputs, sound: list[Checked], providers: dict[str, Provider], settings: Settings, advance: Advance
) -> tuple[Floor, dict[tuple[str, str], Timing]]:
    runs = {name: bind(provider, inputs) for name, provider in providers.items()}
    cases = {("floor", gemm): run for gemm, run in floor_cases(inputs).items()}
    cases |= {(row.provider, row.pass_name): runs[row.provider][row.pass_name] for row in sound}
    timings = time_alternating(cases, settings.rounds, settings.device, lambda: advance("timing", 1))
    return Floor(*(timings["floor", gemm].median for gemm in Floor._fields)), timings


def _weigh_all(
    inputs: BenchInputs, sound: list[Checked], providers: dict[str, Provider], settings: Settings, advance: Advance
) -> dict[str, dict[str, int]]:
    """Peak bytes by provider and pass."""
    advance("peak memory", 0)
    passes: dict[str, list[str]] = {}
    for row in sound:
        passes.setdefault(row.provider, []).append(row.pass_name)
    if settings.device.type == "cuda":
        peaks = {name: cuda_peaks(providers[name], inputs, passes[name]) for name in passes}
    else:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:
            inputs_file = Path(folder) / "inputs.pt"
            torch.save(tuple(inputs), inputs_file)
            found = pool.map(lambda name: host_peaks_in_child(inputs_file, name, passes[name]), passes)
            peaks = dict(zip(passes, found, strict=True))
    advance("peak memory", len(providers))
    return peaks


def _row(checked: Checked, timing: Timing | None, floor: Floor, peaks: dict[str, dict[str, int]]) -> dict[str, Any]:
    units = PASSES.get(checked.pass_name)
    return {
        "provider": checked.provider,
        "pass": checked.pass_name,
        "status": checked.status,
        "seconds": timing.median if timing else None,
        "spread": _finite(timing.spread if timing else None),
        "units": units,
        "over_floor": timing.median / floor.of(units) if timing and units else None,
        "peak_bytes": peaks.get(checked.provider, {}).get(checked.pass_name),
        **{f"{name}_error": _finite(value) for name, value in checked.errors._asdict().items()},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _named(failure: Exception) -> str:
    return f"{type(failure).__name__}: {_first_line(failure)}"


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [""])[0]
