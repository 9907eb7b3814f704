"""Results as pictures: time over the GEMM floor with peak memory, and time against memory.

python bench/plot.py results.json          what bench/run.py does at its end
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.loaders import OURS, OURS_SPARSE
from bench.providers import FROZEN, LOG_PROBS, PASSES, TRAINABLE
from bench.suites import CHOSEN, HEADS
from bench.tables import title

PANELS = (LOG_PROBS, TRAINABLE, FROZEN)


def save_plots(tables: list[dict[str, Any]], json_path: Path) -> list[Path]:
    """Beside the JSON file: the bars of every table, and time against memory where several providers ran."""
    bars, pareto = json_path.with_suffix(".png"), json_path.with_name(json_path.stem + "-pareto.png")
    plot(tables, bars)
    compared = [t for t in tables if t["about"] in (HEADS, CHOSEN) and len(_timed(t, TRAINABLE)) > 1]
    if not compared:
        return [bars]
    plot_pareto(compared, pareto)
    return [bars, pareto]


def plot(tables: list[dict[str, Any]], path: Path) -> None:
    """A line of panels per table: the passes against their floor, then the memory of loss+gradients."""
    figure, axes = _figure(len(tables), len(PANELS) + 1, 0.2 * max(len(table["rows"]) for table in tables))
    for line, table in zip(axes, tables, strict=True):
        line[1].set_title(title(table), fontsize=9)
        for axis, pass_name in zip(line, PANELS, strict=False):
            _time_bars(axis, table, pass_name)
        _memory_bars(line[-1], table)
    figure.savefig(path, dpi=100)


def plot_pareto(tables: list[dict[str, Any]], path: Path) -> None:
    """Loss and gradients: each provider a point, the lower left corner the best."""
    figure, axes = _figure(1, len(tables), 4.0)
    for axis, table in zip(axes[0], tables, strict=True):
        rows = [row for row in _timed(table, TRAINABLE) if row["peak_bytes"]]
        for row, color in zip(rows, _colors(rows), strict=True):
            point = (row["peak_bytes"] / 2**20, row["over_floor"])
            axis.scatter(*point, color=color)
            axis.annotate(row["provider"], point, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.axhline(1, color="gray", linestyle="--", linewidth=1, zorder=0)
        axis.set_xscale("log")
        axis.set_xlabel("peak MiB above inputs and gradients", fontsize=8)
        axis.set_ylabel(f"time / {PASSES[TRAINABLE]} GEMMs", fontsize=8)
        axis.set_title(f"{table['shape']['name']} {table['regime']} T={table['shape']['num_tokens']}", fontsize=8)
        axis.margins(0.25)
    figure.savefig(path, dpi=100)


def _figure(lines: int, columns: int, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 0.8 + max(2.0, height) * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def _time_bars(axis: Any, table: dict[str, Any], pass_name: str) -> None:
    rows = _timed(table, pass_name)
    axis.axvline(1, color="gray", linestyle="--", linewidth=1, zorder=0)
    bars = axis.barh([row["provider"] for row in rows], [row["over_floor"] for row in rows], color=_colors(rows))
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_xlabel(f"{pass_name}: time / GEMMs of the floor: {PASSES[pass_name]}", fontsize=9)
    _finish(axis)


def _memory_bars(axis: Any, table: dict[str, Any]) -> None:
    rows = [row for row in _timed(table, TRAINABLE) if row["peak_bytes"] is not None]
    mebibytes = [row["peak_bytes"] / 2**20 for row in rows]
    bars = axis.barh([row["provider"] for row in rows], mebibytes, color=_colors(rows))
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.set_xlabel("loss+gradients: peak MiB", fontsize=9)
    _finish(axis)


def _finish(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.margins(x=0.2)
    axis.invert_yaxis()


def _colors(rows: list[dict[str, Any]]) -> list[str]:
    return ["tab:orange" if row["provider"] in (OURS, OURS_SPARSE) else "tab:blue" for row in rows]


def _timed(table: dict[str, Any], pass_name: str) -> list[dict[str, Any]]:
    return [row for row in table["rows"] if row["pass"] == pass_name and row["seconds"] is not None]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print("\n".join(map(str, save_plots(json.loads(path.read_text())["tables"], path))))
