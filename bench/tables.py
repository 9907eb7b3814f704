"""Results as text, for the terminal and for the README."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from bench.loaders import EAGER, OURS, OURS_SPARSE
from bench.timing import Floor

HEADER = (
    "provider",
    "pass",
    "median",
    "spread",
    "GEMMs",
    "/ GEMMs",
    "/ ours",
    "peak MiB",
    "/ eager",
    "log-prob error",
    "dX error",
    "dW error",
)


def title(table: dict[str, Any]) -> str:
    shape = table["shape"]
    ignored = f", {100 * shape['ignored']:.0f} % ignored" if shape["ignored"] else ""
    return (
        f"{shape['name']}: T={shape['num_tokens']} H={shape['hidden_size']} V={shape['vocab_size']} "
        f"{table['dtype']}, groups of {shape['group_size']} x {shape['completion_length']} tokens{ignored}, "
        f"regime {table['regime']} ({100 * table['density']:.3f} % significant), "
        f"median of {table['rounds']}"
    )


def floor_line(table: dict[str, Any]) -> str:
    floor = Floor(**table["floor_seconds"])
    gemms = f"X W^T {_time(floor.logits)}, G W {_time(floor.dhidden)}, G^T X {_time(floor.dweight)}"
    sums = ", ".join(f"{units} = {_time(floor.of(units))}" for units in (1, 2, 3, 4))
    return f"torch.mm in the same rounds: {gemms}; GEMMs: {sums}"


def fastest_line(table: dict[str, Any]) -> str:
    """Per pass the fastest of the others over ours: below 1, somebody else is faster."""
    ours, parts = _by_pass(table, OURS, "seconds"), []
    for pass_name, seconds in ours.items():
        others = [
            (row["seconds"], row["provider"])
            for row in table["rows"]
            if row["pass"] == pass_name and row["provider"] not in (OURS, OURS_SPARSE) and row["seconds"] is not None
        ]
        if others and seconds:
            fastest, name = min(others)
            parts.append(f"{pass_name} {fastest / seconds:.2f} ({name})")
    return "fastest peer / ours: " + (", ".join(parts) or "none to compare")


def cells(table: dict[str, Any]) -> list[tuple[str, ...]]:
    """A tuple per row, in the order of HEADER; a provider without a time shows why in place of its median."""
    ours, eager = _by_pass(table, OURS, "seconds"), _by_pass(table, EAGER, "peak_bytes")
    return [_cells(row, ours.get(row["pass"]), eager.get(row["pass"])) for row in table["rows"]]


def plain(table: dict[str, Any]) -> str:
    """A table for a terminal. A reason in the place of a median runs on to the right."""
    shown = [row["seconds"] is not None for row in table["rows"]]
    rows = cells(table)
    lines = aligned([HEADER, *rows], [True, *shown])
    return "\n".join([title(table), lines[0], "-" * len(lines[0]), *lines[1:], fastest_line(table), floor_line(table)])


def aligned(rows: list[tuple[str, ...]], measured: list[bool]) -> list[str]:
    """Columns of one width; rows that were not `measured` do not widen any but their first two."""
    narrow = [row if counts else row[:2] for row, counts in zip(rows, measured, strict=True)]
    widths = [max(map(len, column)) for column in zip_longest(*narrow, fillvalue="")]
    lines = []
    for row in rows:
        padded = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def markdown(table: dict[str, Any]) -> str:
    lines = pipes(HEADER, cells(table))
    return "\n".join([f"**{title(table)}**", "", *lines, "", fastest_line(table), "", floor_line(table)])


def pipes(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, its first two columns of text and the others of numbers."""
    return [_pipe(header), _pipe(("---", "---", *["---:"] * (len(header) - 2))), *map(_pipe, rows)]


def _by_pass(table: dict[str, Any], provider: str, key: str) -> dict[str, Any]:
    return {row["pass"]: row[key] for row in table["rows"] if row["provider"] == provider}


def _cells(row: dict[str, Any], our_seconds: float | None, eager_peak: int | None) -> tuple[str, ...]:
    seconds, peak = row["seconds"], row["peak_bytes"]
    if seconds is None:
        figures = (row["status"], "-", "-", "-", "-", "-", "-")
    else:
        figures = (
            _time(seconds),
            "-" if row["spread"] is None else f"{100 * row['spread']:.1f} %",
            str(row["units"]),
            number(row["over_floor"], ".2f"),
            number(seconds / our_seconds if our_seconds else None, ".2f"),
            "not measured" if peak is None else f"{peak / 2**20:.0f}",
            number(peak / eager_peak if peak is not None and eager_peak else None, ".2f"),
        )
    errors = (number(row[f"{name}_error"], ".1e") for name in ("logps", "dhidden", "dweight"))
    return (row["provider"], row["pass"], *figures, *errors)


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _pipe(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
