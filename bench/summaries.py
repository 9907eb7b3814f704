"""What takes more than one table to say: cost per token as T grows, and how exact 16-bit operands come out."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.suites import SCALING
from bench.tables import aligned, number, pipes


class Summary(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    measured: list[bool]

    def plain(self) -> str:
        lines = aligned([self.header, *self.rows], [True, *self.measured])
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        return "\n".join([f"**{self.title}**", "", *pipes(self.header, self.rows)])


def summaries(results: dict[str, Any]) -> list[Summary]:
    found = [_fidelity(results["fidelity"])] if results.get("fidelity") else []
    tables = [table for table in results["tables"] if table["about"] == SCALING]
    return [*found, _scaling(tables)] if len(tables) > 1 else found


def _scaling(tables: list[dict[str, Any]]) -> Summary:
    """Microseconds per token: level where the cost is linear in T."""
    sizes = [table["shape"]["num_tokens"] for table in tables]
    cost: dict[tuple[str, str], dict[int, float]] = {}
    for table, size in zip(tables, sizes, strict=True):
        for row in table["rows"]:
            if row["seconds"] is not None:
                cost.setdefault((row["provider"], row["pass"]), {})[size] = 1e6 * row["seconds"] / size
    header = ("provider", "pass", *(f"T={size}" for size in sizes))
    rows = [(*key, *(number(by_size.get(size), ".1f") for size in sizes)) for key, by_size in cost.items()]
    return Summary("cost per token as T grows, in microseconds", header, rows, [True] * len(rows))


def _fidelity(fidelity: dict[str, Any]) -> Summary:
    shape = fidelity["shape"]
    title = (
        f"fidelity with {fidelity['dtype']} operands against float64 of the same: T={shape['num_tokens']} "
        f"H={shape['hidden_size']} V={shape['vocab_size']}, {shape['completion_length']} tokens a completion, "
        f"regime {fidelity['regime']}"
    )
    header = ("provider", "status", "log-prob error", "dX error", "dW error")
    rows = []
    for row in fidelity["rows"]:
        errors = (number(row[f"{name}_error"], ".1e") for name in ("logps", "dhidden", "dweight"))
        rows.append((row["provider"], row["status"], *errors))
    return Summary(title, header, rows, [row["status"] == "measured" for row in fidelity["rows"]])
