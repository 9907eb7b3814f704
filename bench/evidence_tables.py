"""The benchmark of the evidence: a process per table, and what they have measured put together again."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.files import write_json, write_whole
from bench.loaders import EAGER, OURS, OURS_SPARSE
from bench.parts import CRASHED, FAILED, PASSED, TIMED_OUT, Ended, Line, Part, how_it_ended
from bench.provenance import ROOT
from bench.report import report
from bench.suites import FIDELITY, SUITES, title

# After a crash or a time-out: it may have been a peer's.
WITHOUT_PEERS = ("--providers", EAGER, OURS)


def table_parts(folder: Path, suite: str, seconds: float, options: Sequence[str] = ()) -> list[Part]:
    """In the suite's order, for the last may not fit; the fidelity, which is quick, after the first."""
    make = partial(_part, folder, suite, seconds, options)
    first, *others = [make(str(number), f"table {number}, {title}") for number, title in _titles(suite).items()]
    return [first, make(FIDELITY, FIDELITY), *others]


def judge(ended: Ended) -> Line:
    """Ours with wrong numbers or none is a failure; a peer's is a row of the table."""
    line = partial(Line, ended.part.name, seconds=ended.seconds)
    if ended.timed_out:
        return line(TIMED_OUT)
    if ended.returncode:
        return line(CRASHED, how_it_ended(ended))
    rows = _rows(json.loads(_json_file(ended.part).read_text()))
    bad = [f"{row['provider']}: {row['status']}" for row in rows if _is_ours_and_bad(row)]
    timed = sum(row["status"] in ("ok", "measured") for row in rows)
    return line(FAILED if bad or not timed else PASSED, "; ".join([f"{timed} of {len(rows)} rows", *bad]))


def merge(folder: Path, parts: Sequence[Part], origin: dict[str, Any], suite: str, heading: str) -> None:
    """results.json, as bench/run.py writes it, and tables.md, of what there is by now."""
    files = [_json_file(part) for part in parts]
    found = {part.name: json.loads(file.read_text()) for part, file in zip(parts, files, strict=True) if file.exists()}
    tables = [table for results in found.values() for table in results["tables"]]
    skipped = [name for number, name in _titles(suite).items() if f"table {number}, {name}" not in found]
    results = {"provenance": origin, "suite": suite, "tables": tables, "skipped": skipped}
    for measured in found.values():
        if FIDELITY in measured:
            results[FIDELITY] = measured[FIDELITY]
    write_json(folder / "results.json", results)
    write_whole(folder / "tables.md", f"{heading}\n\n{report(results, origin['source_sha256'])}\n")


def plot_part(folder: Path, seconds: float) -> Part:
    return Part("plots", (sys.executable, "bench/plot.py", str(folder / "results.json")), seconds)


def judge_plots(ended: Ended) -> Line:
    bad = ended.timed_out or ended.returncode
    return Line(ended.part.name, FAILED if bad else PASSED, how_it_ended(ended) if bad else "", ended.seconds)


def _titles(suite: str) -> dict[int, str]:
    return dict(enumerate(map(title, SUITES[suite](torch.device("cuda"))), 1))


def _part(folder: Path, suite: str, seconds: float, options: Sequence[str], only: str, name: str) -> Part:
    run = (sys.executable, "-X", "faulthandler", str(ROOT / "bench" / "run.py"), "--suite", suite, "--only", only)
    command = (*run, *options, "--no-plots", "--json", str(folder / f"table-{only}.json"))
    return Part(name, command, seconds, (WITHOUT_PEERS,))


def _json_file(part: Part) -> Path:
    return Path(part.command[part.command.index("--json") + 1])


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    tables = [*results["tables"], *([results[FIDELITY]] if FIDELITY in results else [])]
    return [row for table in tables for row in table["rows"]]


def _is_ours_and_bad(row: dict[str, Any]) -> bool:
    return row["provider"] in (OURS, OURS_SPARSE) and row["status"].startswith(("failed", "wrong numbers"))
