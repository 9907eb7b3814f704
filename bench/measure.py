"""One table: every provider on the same inputs, checked, then timed side by side, then weighed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.accuracy import Errors, Truth, exact, measure_errors, wrong
from bench.inputs import BenchInputs, Shape, density, make_inputs
from bench.memory import cuda_peaks, host_peaks_in_child
from bench.providers import LOADERS, PASSES, Provider, bind
from bench.timing import Floor, Rounds, Timing, floor_cases, time_alternating

# GEMM units a pass is set against: what nobody can avoid, and for gradients also the floor of a recompute.
FLOOR_UNITS = {"log-probs": (1,), "loss+gradients": (3, 4)}


class Settings(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rounds: Rounds
    providers: tuple[str, ...]
    seed: int = 0


class Candidate(NamedTuple):
    name: str
    provider: Provider | None
    errors: Errors | None
    status: str  # "ok", or why there is no time


def num_steps(settings: Settings) -> int:
    """Steps of the progress bar that a table takes."""
    cases = 3 + len(PASSES) * len(settings.providers)
    return 1 + 2 * len(settings.providers) + cases * settings.rounds.most


def measure_table(
    shape: Shape, regime: str, settings: Settings, advance: Callable[[str, int], object]
) -> dict[str, Any]:
    """`advance(doing, steps)` is told what comes next and how many steps of `num_steps` are done."""
    advance("inputs and exact gradients", 0)
    inputs = make_inputs(shape, regime, settings.dtype, settings.device, settings.seed)
    candidates = _check_all(inputs, settings, advance)
    sound = {c.name: c.provider for c in candidates if c.provider is not None and c.status == "ok"}

    floor, timings = _time_all(inputs, sound, settings, advance)
    peaks = _weigh_all(inputs, sound, settings, advance)
    return {
        "shape": shape._asdict(),
        "regime": regime,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "density": density(inputs),
        "beta": inputs.beta,
        "seed": settings.seed,
        "rounds": timings["floor", "logits"].rounds,
        "floor_seconds": floor._asdict(),
        "rows": [
            _row(candidate, name, timings, floor, peaks.get(candidate.name, {}))
            for candidate in candidates
            for name in PASSES
        ],
    }


def _check_all(inputs: BenchInputs, settings: Settings, advance: Callable[[str, int], object]) -> list[Candidate]:
    truth = exact(inputs)
    advance("inputs and exact gradients", 1)
    candidates = []
    for name in settings.providers:
        advance(f"checking {name}", 0)
        candidates.append(_check(name, inputs, truth))
        advance(f"checking {name}", 1)
    return candidates


def _check(name: str, inputs: BenchInputs, truth: Truth) -> Candidate:
    try:
        provider = LOADERS[name]()
    except ImportError as reason:
        return Candidate(name, None, None, f"not available: {reason}")
    try:
        errors = measure_errors(provider, inputs, truth)
    except Exception as failure:  # a contestant that cannot run here must not take the table with it
        first_line = (str(failure).strip().splitlines() or [""])[0]
        return Candidate(name, None, None, f"failed: {type(failure).__name__}: {first_line}")
    return Candidate(name, provider, errors, wrong(errors, inputs.hidden_states.dtype) or "ok")


def _time_all(
    inputs: BenchInputs,
    providers: dict[str, Provider],
    settings: Settings,
    advance: Callable[[str, int], object],
) -> tuple[Floor, dict[tuple[str, str], Timing]]:
    cases = {("floor", gemm): run for gemm, run in floor_cases(inputs).items()}
    for name, provider in providers.items():
        cases |= {(name, pass_name): run for pass_name, run in bind(provider, inputs).items()}
    timings = time_alternating(cases, settings.rounds, settings.device, lambda: advance("timing", 1))
    return Floor(*(timings["floor", gemm].median for gemm in Floor._fields)), timings


def _weigh_all(
    inputs: BenchInputs,
    providers: dict[str, Provider],
    settings: Settings,
    advance: Callable[[str, int], object],
) -> dict[str, dict[str, int]]:
    advance("peak memory", 0)
    if settings.device.type == "cuda":
        peaks = {name: cuda_peaks(provider, inputs) for name, provider in providers.items()}
    else:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:
            inputs_file = Path(folder) / "inputs.pt"
            torch.save(tuple(inputs), inputs_file)
            found = pool.map(lambda name: host_peaks_in_child(inputs_file, name), providers)
            peaks = dict(zip(providers, found, strict=True))
    advance("peak memory", len(providers))
    return peaks


def _row(
    candidate: Candidate,
    pass_name: str,
    timings: dict[tuple[str, str], Timing],
    floor: Floor,
    peaks: dict[str, int],
) -> dict[str, Any]:
    errors = candidate.errors
    has_gradients = errors is not None and pass_name == "loss+gradients"
    timing = timings.get((candidate.name, pass_name))
    return {
        "provider": candidate.name,
        "pass": pass_name,
        "status": candidate.status,
        "seconds": _finite(timing.median) if timing else None,
        "spread": _finite(timing.spread) if timing else None,
        "over_floor": {str(units): timing.median / floor.of(units) for units in FLOOR_UNITS[pass_name] if timing},
        "peak_bytes": peaks.get(pass_name),
        "logps_error": _finite(errors.logps) if errors else None,
        "dhidden_error": _finite(errors.dhidden) if errors and has_gradients else None,
        "dweight_error": _finite(errors.dweight) if errors and has_gradients else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
