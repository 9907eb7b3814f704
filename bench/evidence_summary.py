"""What became of each part of `make gpu-evidence`, in one page that is true whenever the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.parts import NOT_RUN, PASSED, RUNNING, WAITING, Line
from bench.tables import pipes

HEADER = ("part", "what became of it", "seconds")


class Page(NamedTuple):
    """What does not change from part to part."""

    heading: str
    origin: dict[str, Any]  # bench.provenance
    left_out: list[str]  # files of tests


def summary(page: Page, lines: Mapping[str, Line], minutes: float | None) -> str:
    """With `minutes`, of a run that has come to its end."""
    table = "\n".join(pipes(HEADER, [_cells(line) for line in lines.values()]))
    left_out = f"Tests left out, for a GPU changes next to nothing in them: {', '.join(page.left_out)}."
    return "\n\n".join([page.heading, _from_where(page.origin), _verdict(lines, minutes), table, left_out]) + "\n"


def told(line: Line) -> str:
    seconds = "" if line.seconds is None else f"{line.seconds:.1f} s"
    return f"{line.status:<9} {seconds:>8}  {line.name}{': ' if line.detail else ''}{line.detail}"


def _from_where(origin: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return "\n".join(
        [
            f"- device: {origin['device']}",
            f"- versions: {versions}",
            f"- date: {origin['date']}",
            f"- command: `{origin['command']}`",
            f"- commit: {origin['commit']}",
            f"- SHA-256 of copg_kernels/: {origin['source_sha256']}",
            f"- settings of its heads: {origin['tuned']}",
        ]
    )


def _verdict(lines: Mapping[str, Line], minutes: float | None) -> str:
    if minutes is None:
        return "**Not finished**: what is waiting or running here never came to its end."
    bad = [line for line in lines.values() if line.status != PASSED]
    not_run = sum(line.status == NOT_RUN for line in bad)
    verdict = (
        f"{len(bad)} of {len(lines)} parts did not pass, {not_run} of them not run" if bad else "every part passed"
    )
    return f"Finished after {minutes:.1f} minutes: **{verdict}**."


def _cells(line: Line) -> tuple[str, ...]:
    status = line.status if line.status in (PASSED, WAITING, RUNNING) else f"**{line.status}**"
    became = f"{status}: {line.detail}" if line.detail else status
    return (line.name, " ".join(became.split()), "-" if line.seconds is None else f"{line.seconds:.1f}")
