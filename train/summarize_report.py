"""What the runs of the summarisation experiment add up to: means over seeds, best betas, figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]
MEASURES = ("reward", "kl", "length", "overlap")
SUMMED, AVERAGED = "CoPG", "CoPG, averaged"
# Hollow and dashed where a curve must lie on another one.
STYLES: dict[str, dict[str, Any]] = {
    SUMMED: dict(color="C0", marker="o"),
    "RLOO": dict(color="C3", marker="o", linestyle="--", markerfacecolor="none", markersize=9),
    "IPO": dict(color="C2", marker="s"),
    "DPO": dict(color="C1", marker="^"),
    "RLOO, no beta": dict(color="C5", marker="D"),
    "RAFT": dict(color="C4", marker="v"),
    AVERAGED: dict(color="C6", marker="x"),
}


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and standard error over seeds; no error from a single seed."""
    found = list(values)
    return {
        "mean": statistics.fmean(found),
        "se": statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None,
    }


def summarize(runs: Sequence[Record], reference: Sequence[Record]) -> Record:
    """Per method and beta what was reached; the beta with the best last validation reward is a method's best."""
    cells: dict[tuple[str, float | None], list[Record]] = {}
    for run in sorted(runs, key=lambda run: (list(STYLES).index(run["method"]), run["beta"] or 0, run["seed"])):
        cells.setdefault((run["method"], run["beta"]), []).append(run)
    sweep = [_cell(*key, cell) for key, cell in cells.items()]
    best: dict[str, Record] = {}
    for row in sweep:
        if row["method"] not in best or _last(row) > _last(best[row["method"]]):
            best[row["method"]] = row
    before = {record["seed"]: record["test"]["reward"] for record in reference}
    chosen = cells[SUMMED, best[SUMMED]["beta"]]
    return {
        "reference": _cell("reference", None, reference),
        "sweep": sweep,
        "best_beta": {method: row["beta"] for method, row in best.items()},
        "copg_minus_reference": spread(run["test"]["reward"] - before[run["seed"]] for run in chosen),
        "rloo_minus_copg": _largest_difference(cells, "RLOO", "CoPG"),
    }


def _cell(method: str, beta: float | None, runs: Sequence[Record]) -> Record:
    steps = [point["step"] for point in runs[0]["points"]]
    curves = [
        {"step": step} | {name: spread(run["points"][i][name] for run in runs) for name in MEASURES}
        for i, step in enumerate(steps)
    ]
    test = {name: spread(run["test"][name] for run in runs) for name in MEASURES}
    return {"method": method, "beta": beta, "validation": curves, "test": test}


def _last(row: Record) -> float:
    return row["validation"][-1]["reward"]["mean"]


def _largest_difference(cells: dict, method: str, other: str) -> float:
    """Of the test rewards of two methods, over betas and seeds."""
    pairs = [
        (run, twin)
        for (name, beta), runs in cells.items()
        if name == method
        for run, twin in zip(runs, cells[other, beta], strict=True)
    ]
    return max(abs(run["test"]["reward"] - twin["test"]["reward"]) for run, twin in pairs)


def table(summary: Record) -> str:
    """The test figures as text, mean and standard error over seeds; a star at each method's best beta."""
    lines = [f"{'method':16}{'beta':>8}" + "".join(f"{name:>18}" for name in MEASURES)]
    for row in [summary["reference"], *summary["sweep"]]:
        star = " *" if (row["method"], row["beta"]) in summary["best_beta"].items() else ""
        beta = "" if row["beta"] is None else f"{row['beta']:.3g}"
        values = "".join(f"{_text(row['test'][name]):>18}" for name in MEASURES)
        lines.append(f"{row['method']:16}{beta:>8}{values}{star}")
    return "\n".join(lines)


def _text(value: dict[str, float | None]) -> str:
    return " +- ".join("-" if number is None else f"{number:.3f}" for number in value.values())


# Figures


def draw_figures(results: Record, folder: Path) -> None:
    summary = results["summary"]
    compared = [row for row in summary["sweep"] if row["method"] != AVERAGED]
    title = f"{results['seeds']} seeds, mean and standard error; {results['size']} size"

    figure = Figure(figsize=(8, 6), layout="constrained")
    _plot_sweep(figure.subplots(), compared, summary["reference"], "kl", "KL to the reference, nats")
    _save(figure, title, folder / "reward-kl.png")

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_steps(left, compared, summary)
    _plot_betas(right, compared, summary["reference"])
    _save(figure, title, folder / "reward-step.png")

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    averaging = [row for row in summary["sweep"] if row["method"] in (SUMMED, AVERAGED)]
    _plot_sweep(left, averaging, summary["reference"], "length", "length of samples, tokens")
    _plot_sweep(right, averaging, summary["reference"], "kl", "KL to the reference, nats")
    _save(figure, title, folder / "averaging.png")


def _plot_sweep(axis: Axes, rows: Sequence[Record], reference: Record, measure: str, label: str) -> None:
    """Test reward against a measure: a line over beta per method; small dots are evaluations during training."""
    for method, cells in _by_method(rows).items():
        x, xerr = _columns(cells, measure)
        y, yerr = _columns(cells, "reward")
        axis.errorbar(x, y, yerr, xerr, label=method, capsize=2, **STYLES[method])
        for cell, place in zip(cells, zip(x, y, strict=True), strict=True):
            if cell["beta"] is not None:
                axis.annotate(f"{cell['beta']:.2g}", place, fontsize=7, textcoords="offset points", xytext=(3, 3))
        points = [point for cell in cells for point in cell["validation"]]
        axis.scatter(
            [point[measure]["mean"] for point in points],
            [point["reward"]["mean"] for point in points],
            s=6,
            alpha=0.4,
            color=STYLES[method]["color"],
        )
    start = reference["test"]
    axis.scatter([start[measure]["mean"]], [start["reward"]["mean"]], marker="*", s=120, color="black")
    _finish(axis, label, "reward on test prompts, by beta; dots: validation while training; star: reference")


def _plot_steps(axis: Axes, rows: Sequence[Record], summary: Record) -> None:
    for method, cells in _by_method(rows).items():
        cell = next(cell for cell in cells if cell["beta"] == summary["best_beta"][method])
        beta = "" if cell["beta"] is None else f", beta {cell['beta']:.2g}"
        points = [summary["reference"]["validation"][0], *cell["validation"]]
        axis.errorbar(
            [point["step"] for point in points],
            [point["reward"]["mean"] for point in points],
            [point["reward"]["se"] or 0.0 for point in points],
            label=method + beta,
            capsize=2,
            **STYLES[method],
        )
    _finish(axis, "step", "reward on validation prompts, at each method's best beta")


def _plot_betas(axis: Axes, rows: Sequence[Record], reference: Record) -> None:
    for method, cells in _by_method(rows).items():
        y, yerr = _columns(cells, "reward")
        if cells[0]["beta"] is None:
            axis.axhline(y[0], label=method, linestyle="-.", color=STYLES[method]["color"])
        else:
            axis.errorbar([cell["beta"] for cell in cells], y, yerr, label=method, capsize=2, **STYLES[method])
    axis.axhline(reference["test"]["reward"]["mean"], color="black", linestyle=":", label="reference")
    axis.set_xscale("log")
    _finish(axis, "beta, reward per nat", "reward on test prompts after the last step")


def _by_method(rows: Sequence[Record]) -> dict[str, list[Record]]:
    methods: dict[str, list[Record]] = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    return methods


def _columns(cells: Sequence[Record], measure: str) -> tuple[list[float], list[float]]:
    values = [cell["test"][measure] for cell in cells]
    return [value["mean"] for value in values], [value["se"] or 0.0 for value in values]


def _finish(axis: Axes, xlabel: str, title: str) -> None:
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)


def _save(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
