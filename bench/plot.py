"""Results as a picture: time over the GEMM floor, and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.providers import OURS
from bench.tables import title


def plot(tables: list[dict[str, Any]], path: Path) -> None:
    """A line of panels per table: both passes against their floor, then the memory of loss+gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(tables), 3, figsize=(14, 0.8 + 2.4 * len(tables)), squeeze=False, layout="constrained"
    )
    for line, table in zip(axes, tables, strict=True):
        line[1].set_title(title(table), fontsize=9)
        _time_bars(line[0], table, "log-probs", "1")
        _time_bars(line[1], table, "loss+gradients", "3")
        _memory_bars(line[2], table)
        line[1].tick_params(labelleft=False)
        line[2].tick_params(labelleft=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _time_bars(axis: Any, table: dict[str, Any], pass_name: str, units: str) -> None:
    rows = _rows(table, pass_name)
    heights = [row["over_floor"].get(units, 0.0) for row in rows]
    axis.axvline(1, color="gray", linestyle="--", linewidth=1, zorder=0)
    bars = axis.barh([row["provider"] for row in rows], heights, color=_colors(rows))
    axis.bar_label(bars, [f"{height:.2f}" if height else "no time" for height in heights], padding=3)
    axis.set_xlabel(f"{pass_name}: time / {units} GEMM{'s' if units != '1' else ''}", fontsize=9)
    axis.margins(x=0.2)
    axis.invert_yaxis()


def _memory_bars(axis: Any, table: dict[str, Any]) -> None:
    rows = _rows(table, "loss+gradients")
    mebibytes = [(row["peak_bytes"] or 0) / 2**20 for row in rows]
    bars = axis.barh([row["provider"] for row in rows], mebibytes, color=_colors(rows))
    labels = [
        "not measured" if row["peak_bytes"] is None else f"{size:.0f}"
        for row, size in zip(rows, mebibytes, strict=True)
    ]
    axis.bar_label(bars, labels, padding=3)
    axis.set_xlabel("loss+gradients: peak MiB above inputs and gradients", fontsize=9)
    axis.margins(x=0.2)
    axis.invert_yaxis()


def _colors(rows: list[dict[str, Any]]) -> list[str]:
    return ["tab:orange" if row["provider"] == OURS else "tab:blue" for row in rows]


def _rows(table: dict[str, Any], pass_name: str) -> list[dict[str, Any]]:
    return [row for row in table["rows"] if row["pass"] == pass_name]
