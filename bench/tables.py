"""Results as text, for the terminal and for the README."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from bench.providers import EAGER
from bench.timing import Floor

HEADER = (
    "provider",
    "pass",
    "median",
    "spread",
    "/ 1 GEMM",
    "/ 3 GEMMs",
    "/ 4 GEMMs",
    "peak MiB",
    "/ eager",
    "log-prob error",
    "dX error",
    "dW error",
)


def title(table: dict[str, Any]) -> str:
    shape = table["shape"]
    return (
        f"{shape['name']}: T={shape['num_tokens']} H={shape['hidden_size']} V={shape['vocab_size']} "
        f"{table['dtype']}, groups of {shape['group_size']} x {shape['completion_length']} tokens, "
        f"regime {table['regime']} ({100 * table['density']:.3f} % significant), "
        f"median of {table['rounds']}"
    )


def floor_line(table: dict[str, Any]) -> str:
    floor = Floor(**table["floor_seconds"])
    gemms = f"X W^T {_time(floor.logits)}, G W {_time(floor.dhidden)}, G^T X {_time(floor.dweight)}"
    sums = ", ".join(f"{units} = {_time(floor.of(units))}" for units in (1, 3, 4))
    return f"torch.mm in the same rounds: {gemms}; GEMMs: {sums}"


def cells(table: dict[str, Any]) -> list[tuple[str, ...]]:
    """A tuple per row, in the order of HEADER; a provider without a time shows why in place of its median."""
    eager_peaks = {row["pass"]: row["peak_bytes"] for row in table["rows"] if row["provider"] == EAGER}
    return [_cells(row, eager_peaks.get(row["pass"])) for row in table["rows"]]


def plain(table: dict[str, Any]) -> str:
    """Aligned columns for a terminal. A reason in the place of a median runs on to the right."""
    rows = cells(table)
    narrow = [text if row["seconds"] is not None else text[:2] for text, row in zip(rows, table["rows"], strict=True)]
    widths = [max(map(len, column)) for column in zip_longest(HEADER, *narrow, fillvalue="")]
    lines = []
    for row in [HEADER, *rows]:
        padded = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([title(table), lines[0], "-" * len(lines[0]), *lines[1:], floor_line(table)])


def markdown(table: dict[str, Any]) -> str:
    lines = [_pipes(HEADER), _pipes(("---", "---", *["---:"] * (len(HEADER) - 2)))]
    lines += [_pipes(row) for row in cells(table)]
    return "\n".join([f"**{title(table)}**", "", *lines, "", floor_line(table)])


def _cells(row: dict[str, Any], eager_peak: int | None) -> tuple[str, ...]:
    peak = row["peak_bytes"]
    timed = row["seconds"] is not None
    return (
        row["provider"],
        row["pass"],
        _time(row["seconds"]) if timed else row["status"],
        "-" if row["spread"] is None else f"{100 * row['spread']:.1f} %",
        *(_number(row["over_floor"].get(units), ".2f") for units in ("1", "3", "4")),
        _peak(peak) if timed else "-",
        _number(peak / eager_peak if timed and peak is not None and eager_peak else None, ".2f"),
        *(_number(row[f"{name}_error"], ".1e") for name in ("logps", "dhidden", "dweight")),
    )


def _peak(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _pipes(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
