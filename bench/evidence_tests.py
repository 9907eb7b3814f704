"""The tests that a GPU changes: which files, in which order, and how each of them went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.log_failures import OUTCOMES, RUNNING, append, read_log, record
from bench.parts import CRASHED, FAILED, PASSED, TIMED_OUT, Ended, Line, Part, how_it_ended
from bench.provenance import ROOT

# Those that run operators on tests.conftest.DEVICE. What the kernels compute comes first, then what is asked of them
# beyond numbers, then what torch does with them; random calls fill whatever time there is.
FILES = (
    "tests/test_launches.py",
    "tests/test_kernels.py",
    "tests/test_linear_logps.py",
    "tests/test_copg.py",
    "tests/test_closed_groups.py",
    "tests/test_product_slices.py",
    "tests/test_scale_gradient.py",
    "tests/test_sparse_kernels.py",
    "tests/test_entropy.py",
    "tests/test_token_statistics.py",
    "tests/test_entropy_gradient.py",
    "tests/test_scales.py",
    "tests/test_layouts.py",
    "tests/test_derivatives.py",
    "tests/test_host_sync.py",
    "tests/test_work.py",
    "tests/test_losses.py",
    "tests/test_sparse.py",
    "tests/test_amp.py",
    "tests/test_refusals.py",
    "tests/test_wrappers.py",
    "tests/test_torch.py",
    "tests/test_fuzz.py",
)
# Interpreted kernels are why its own default is small; compiled, each new case may cost a compilation.
OPTIONS = {"tests/test_fuzz.py": ("--fuzz-cases", "40")}
# How often a file goes on after a test that took the process with it.
TRIES_AGAIN = 2
NAMED = 3


def left_out(folder: Path = ROOT / "tests") -> list[str]:
    """Files of tests that no GPU changes: of the benchmark, training, trainers, ranks over gloo, documents."""
    return sorted(path.name for path in folder.glob("test_*.py") if f"tests/{path.name}" not in FILES)


def test_parts(log: Path, seconds: float, options: Sequence[str] = ()) -> list[Part]:
    return [_part(file, log, seconds, options) for file in FILES]


def judge(log: Path, ended: Ended) -> Line:
    """From the log, so that a process that died counts for what it had done."""
    file = f"tests/{ended.part.name.split(',')[0]}"
    found = read_log(log, file)
    line = partial(Line, ended.part.name, seconds=ended.seconds)
    if ended.timed_out:
        return line(TIMED_OUT, _said(found, [f"in {nodeid}" for nodeid in found[RUNNING]]))
    bad = found["failed"] + found["error"] + found["crashed"]  # of earlier tries, too
    if not found[RUNNING] and (ended.returncode == 0 or (bad and ended.returncode in (1, 2))):
        return line(FAILED if bad else PASSED, _said(found))
    # They have an outcome now, and are passed over when the file goes on.
    for nodeid in found[RUNNING]:
        append(log, record("crashed", nodeid))
    return line(CRASHED, _said(found, [*(f"in {nodeid}" for nodeid in found[RUNNING]), how_it_ended(ended)]))


def _part(file: str, log: Path, seconds: float, options: Sequence[str]) -> Part:
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.log_failures")
    told = ("--log-failures", str(log), "--tb=short", "--showlocals", "--no-summary")
    command = (*pytest, *told, *options, *OPTIONS.get(file, ()), str(ROOT / file))
    return Part(Path(file).name, command, seconds, ((),) * TRIES_AGAIN)


def _said(found: dict[str, list[str]], where: Sequence[str] = ()) -> str:
    """How many of each outcome, the first that went wrong by name, and where it ended."""
    counts = [f"{len(found[outcome])} {outcome}" for outcome in OUTCOMES if found[outcome]]
    bad = [nodeid.split("::", 1)[-1] for nodeid in found["failed"] + found["error"]]
    more = [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
    return "; ".join(filter(None, [", ".join(counts), ", ".join(bad[:NAMED] + more), *where]))
