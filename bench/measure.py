"""One table: every provider on the same inputs, checked and weighed, then timed side by side."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.accuracy import Truth, exact
from bench.checks import Checked, check, check_in_child, load_providers, with_ceiling
from bench.inputs import BenchInputs, Shape, density, make_inputs
from bench.memory import cuda_peak, unweighed
from bench.providers import LOG_PROBS, PASSES, TRAINABLE, Provider, bind
from bench.timing import Floor, Rounds, Timing, floor_cases, time_alternating

Advance = Callable[[str, int], object]  # what comes next, and how many steps of `num_steps` are done


class Settings(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rounds: Rounds
    providers: tuple[str, ...]
    passes: tuple[str, ...] = (LOG_PROBS, TRAINABLE)
    seed: int = 0


def num_steps(settings: Settings) -> int:
    """Steps of the progress bar that a table takes."""
    cases = 3 + len(settings.passes) * len(settings.providers)
    return 1 + len(settings.providers) + cases * settings.rounds.most


def measure_table(shape: Shape, regime: str, settings: Settings, advance: Advance) -> dict[str, Any]:
    advance("inputs and exact gradients", 0)
    inputs = make_inputs(shape, regime, settings.dtype, settings.device, settings.seed)
    providers, rows = load_providers(settings.providers, settings.device)
    has_ceiling = any(provider.log_probs is None for provider in providers.values())
    truth = exact(inputs, with_ceiling(settings.passes) if has_ceiling else settings.passes)
    advance("inputs and exact gradients", 1)
    rows += _check_all(inputs, truth, providers, settings, advance)
    rows.sort(key=lambda row: settings.providers.index(row.provider))

    sound = [row for row in rows if row.status == "ok"]
    floor, timings = _time_all(inputs, sound, providers, settings, advance)
    return {
        "shape": shape._asdict(),
        "regime": regime,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "density": density(inputs),
        "beta": inputs.beta,
        "seed": settings.seed,
        "rounds": timings["floor", "logits"].rounds,
        "floor_seconds": floor._asdict(),
        "rows": [_row(row, timings.get((row.provider, row.pass_name)), floor) for row in rows],
    }


def _check_all(
    inputs: BenchInputs, truth: Truth, providers: dict[str, Provider], settings: Settings, advance: Advance
) -> list[Checked]:
    """On a CPU in a process per provider: it has a high-water mark of its own, and cannot take the table with it."""
    if settings.device.type == "cuda":
        rows = []
        for name, provider in providers.items():
            advance(f"checking {name}", 0)
            check(name, provider, inputs, settings.passes, truth, unweighed)  # compiles, and wakes libraries up
            rows += check(name, provider, inputs, settings.passes, truth, cuda_peak)
            advance(f"checking {name}", 1)
        return rows
    advance("errors and peak memory", 0)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:
        file = Path(folder) / "inputs.pt"
        torch.save((tuple(inputs), tuple(truth)), file)

        def in_child(name: str) -> list[Checked]:
            rows = check_in_child(file, name, settings.passes)
            advance("errors and peak memory", 1)
            return rows

        return [row for rows in pool.map(in_child, providers) for row in rows]


def _time_all(
    inputs: BenchInputs, sound: list[Checked], providers: dict[str, Provider], settings: Settings, advance: Advance
) -> tuple[Floor, dict[tuple[str, str], Timing]]:
    runs = {name: bind(provider, inputs) for name, provider in providers.items()}
    cases = {("floor", gemm): run for gemm, run in floor_cases(inputs).items()}
    cases |= {(row.provider, row.pass_name): runs[row.provider][row.pass_name] for row in sound}
    for row in sound:
        if providers[row.provider].compiles_per_shape:
            cases[row.provider, row.pass_name]()
    timings = time_alternating(cases, settings.rounds, settings.device, lambda: advance("timing", 1))
    return Floor(*(timings["floor", gemm].median for gemm in Floor._fields)), timings


def _row(checked: Checked, timing: Timing | None, floor: Floor) -> dict[str, Any]:
    units = PASSES.get(checked.pass_name)
    return {
        "provider": checked.provider,
        "pass": checked.pass_name,
        "status": checked.status,
        "seconds": timing.median if timing else None,
        "spread": finite(timing.spread if timing else None),
        "units": units,
        "over_floor": timing.median / floor.of(units) if timing and units else None,
        "peak_bytes": checked.peak_bytes,
        **{f"{name}_error": finite(value) for name, value in checked.errors._asdict().items()},
    }


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
