"""What happens to a provider before it is timed: loaded, run once per pass, weighed, and held to the truth.

python -m bench.checks inputs.pt <provider> <pass>...        prints the rows of the table as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.accuracy import Errors, Truth, gradient_errors, logps_error, wrong
from bench.inputs import BenchInputs, Shape, make_inputs
from bench.loaders import LOADERS
from bench.memory import host_peak
from bench.provenance import ROOT
from bench.providers import BONUS, LOG_PROBS, MEAN_CE, PASSES, TRAINABLE, Provider, Run, bind

NO_ENTROPY = "not available: no gradient of the entropy"
WARM_UP = Shape("warm-up", 64, 16, 8, 4)
Weigh = Callable[[Run], tuple[tuple[Tensor, ...], int | None]]  # runs it; what it returned and its peak


class Checked(NamedTuple):
    """One row of the table before it is timed."""

    provider: str
    pass_name: str
    status: str  # "ok", or why there is no time
    errors: Errors = Errors()
    peak_bytes: int | None = None


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


def check(
    name: str, provider: Provider, inputs: BenchInputs, passes: tuple[str, ...], truth: Truth, weigh: Weigh
) -> list[Checked]:
    """A row per pass. Wrong log-probs cost a provider the time of every pass, for all are made of them."""
    runs, rows, logps = bind(provider, inputs), [], None
    dtype = inputs.hidden_states.dtype
    wanted = [pass_name for pass_name in runs if pass_name in with_ceiling(passes)]
    for pass_name in runs:
        if pass_name != LOG_PROBS and pass_name not in wanted:
            continue
        try:
            row = _check_pass(name, pass_name, runs[pass_name], truth, weigh)
        except Exception as failure:  # a contestant that cannot run here must not take the table with it
            row = Checked(name, pass_name, f"failed: {_named(failure)}")
        logps = row.errors.logps if pass_name == LOG_PROBS else logps
        row = row._replace(errors=row.errors._replace(logps=logps))
        if row.status == "ok":
            row = row._replace(status=wrong(row.errors, dtype, provider.gradient_error) or "ok")
        if pass_name in wanted:
            rows.append(row)
    if BONUS in passes and BONUS not in runs and provider.log_probs is not None:  # a ceiling has rows of its own
        rows.append(Checked(name, BONUS, NO_ENTROPY))
    return rows


def check_in_child(file: Path, name: str, passes: tuple[str, ...]) -> list[Checked]:
    """By a process that does nothing else."""
    command = [sys.executable, "-m", "bench.checks", str(file), name, *passes]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [Checked(name, "all", f"failed, exit status {child.returncode}: {reason}")]
    rows = json.loads(child.stdout.splitlines()[-1])
    return [Checked(*row)._replace(errors=Errors(*row[3])) for row in rows]


def with_ceiling(passes: tuple[str, ...]) -> tuple[str, ...]:
    """The ceiling stands beside the loss whose work comes closest to its own."""
    return (*passes, MEAN_CE) if TRAINABLE in passes else passes


def _check_pass(name: str, pass_name: str, run: Run, truth: Truth, weigh: Weigh) -> Checked:
    returned, peak = weigh(run)
    is_logps = pass_name == LOG_PROBS
    errors = logps_error(returned[0], truth) if is_logps else gradient_errors(pass_name, returned, truth)
    return Checked(name, pass_name, "ok", errors, peak)


def _child_main(file: str, name: str, *passes: str) -> None:
    operands, truth = torch.load(file)
    inputs = BenchInputs(*operands)
    inputs.hidden_states.requires_grad_()
    inputs.lm_head_weight.requires_grad_()
    provider = LOADERS[name](torch.device("cpu"))
    # Thread pools and code pages come with the first call, and a compiler with the first call at a shape.
    # Others warm up on a tiny shape, so that a buffer they keep for the real one is charged to them.
    small = make_inputs(WARM_UP, "flat", inputs.hidden_states.dtype, "cpu")
    warm_up = bind(provider, inputs if provider.compiles_per_shape else small)
    for pass_name in PASSES:
        if pass_name in warm_up and pass_name in with_ceiling(passes):
            _try(warm_up[pass_name])
    print(json.dumps(check(name, provider, inputs, passes, Truth(*truth), host_peak)))


def _try(run: Run) -> None:
    try:
        run()
    except Exception:  # the check that follows reports it
        pass


def _named(failure: Exception) -> str:
    return f"{type(failure).__name__}: {_first_line(failure)}"


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [""])[0]


if __name__ == "__main__":
    _child_main(*sys.argv[1:])
