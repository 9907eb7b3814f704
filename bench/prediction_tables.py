"""Predictions as text."""

from __future__ import annotations

from typing import Any

from bench.costs import RULES
from bench.tables import aligned, pipes

HEADER = ("path", "", "predicted units", "predicted ms", "GEMMs", "target", "measured units")
# Units of a path; below it passes are added up.
SMALL = 0.008


def plain(results: dict[str, Any]) -> str:
    heads = ["\n".join([_title(head), "", *_summary(head), *_breakdowns(head)]) for head in results["heads"]]
    assumed = "\n".join(["Assumed of the GPU and the inputs:", *(f"  {one}" for one in results["assumptions"])])
    return "\n\n".join([_first(results), *heads, f"What a pass takes:\n\n{RULES}", assumed])


def markdown(results: dict[str, Any]) -> str:
    """The tables alone, for a page."""
    parts = [_first(results)]
    for head in results["heads"]:
        parts += [f"**{_title(head)}**", "\n".join(pipes(HEADER, [_row(one) for one in head["paths"]]))]
        parts += [f"{one['path']}: {one['note']}." for one in head["paths"] if one["note"]]
    return "\n\n".join(parts)


def verdict(units: tuple[float, float], target: float) -> str:
    """Whether the prediction is within the target or beyond it, or paper cannot tell."""
    low, high = units
    return "within" if high <= target else "beyond" if low > target else "open"


def _first(results: dict[str, Any]) -> str:
    origin = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return f"Predicted for an {results['gpu']}, not measured: {origin['date'][:10]}, {versions}."


def _title(head: dict[str, Any]) -> str:
    shape, way = head["shape"], head["way"]
    return "{name}: T={num_tokens} H={hidden_size} V={vocab_size} bfloat16, ".format(**shape) + f"way {way}"


def _summary(head: dict[str, Any]) -> list[str]:
    rows = [_row(one) for one in head["paths"]]
    return aligned([HEADER, *rows], [True] * (len(rows) + 1))


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    measured = one["measured"]
    return (
        one["path"],
        verdict(one["units"], one["target"]),
        _range(one["units"]),
        _range(one["milliseconds"], ".1f"),
        f"{one['gemms']:.2f}",
        f"{one['target']:.2f}",
        one["measured_in"] if measured is None else f"{measured:.2f} ({one['measured_in']})",
    )


def _breakdowns(head: dict[str, Any]) -> list[str]:
    lines = []
    for one in head["paths"]:
        shown = [part for part in one["parts"] if part["units"][1] >= SMALL]
        rest = [part for part in one["parts"] if part["units"][1] < SMALL]
        rows = [_part(part) for part in shown] + ([_part(_added(rest))] if rest else [])
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines += ["", one["path"] + (f": {one['note']}" if one["note"] else "")]
        lines += [_padded(row, widths) for row in rows]
    return lines


def _part(part: dict[str, Any]) -> tuple[str, ...]:
    size = f"{part['gigabytes']:.2f} GB"
    about = part["about"]
    if any(part["l2"]):
        about += f"; by the L2 alone {_range(part['l2'])}"
    return part["name"], f"{part['launches']} x", _range(part["units"], ".3f"), size, about


def _added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(
        name="all others",
        launches=sum(part["launches"] for part in parts),
        units=tuple(sum(part["units"][end] for part in parts) for end in (0, 1)),
        gigabytes=sum(part["gigabytes"] for part in parts),
        about="",
        l2=(0, 0),
    )


def _padded(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers, about = row
    cells = [name.ljust(widths[0]), *(x.rjust(width) for x, width in zip(numbers, widths[1:], strict=True))]
    return "  ".join(["", *cells, about]).rstrip()


def _range(values: tuple[float, float], spec: str = ".2f") -> str:
    low, high = (format(value, spec) for value in values)
    return low if low == high else f"{low} - {high}"
