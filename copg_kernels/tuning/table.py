"""What a run has found, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from copg_kernels.tuned import Settings

HEADER = ("head", "what", "candidate", "ms", "/ GEMM", "ratio", "spread", "verdict")


def table(entries: Iterable[dict[str, Any]]) -> str:
    """Of entries as they are in the file; as a Markdown table whose columns line up."""
    rows = [HEADER, *(row for entry in entries for row in _rows(entry))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in (lines[0], "-|-".join("-" * width for width in widths), *lines[1:]))


def described(settings: Settings) -> str:
    """In one line."""
    blocks = "the code's blocks"
    if settings.blocks is not None:
        blocks = "blocks " + ", ".join(f"{name}={value}" for name, value in settings.blocks.items())
    workspace = "the code's workspace"
    if settings.workspace_bytes is not None:
        workspace = f"workspace {settings.workspace_bytes / 2**20:g} MiB"
    return f"log-probs {settings.logps}, loss {settings.loss}, {blocks}, {workspace}"


def _rows(entry: dict[str, Any]) -> list[tuple[str, ...]]:
    found = entry["measured"]
    unit = found["gemm_seconds"]
    rows = [
        *(("code's defaults", each["pass"], *_times(each["default_seconds"], unit)) for each in found["passes"]),
        *((each["field"], each["value"], "", "", *_ratio(each), each["verdict"]) for each in found["tried"]),
        *(("kept settings", each["pass"], *_times(each["seconds"], unit), *_ratio(each)) for each in found["passes"]),
        ("kept settings", "log-ratio at the reference", "", "", "", "", f"{found['log_ratio_at_reference']:.2g} nats"),
        *(("sparse / exact", each["regime"], "", "", *_ratio(each), each["verdict"]) for each in found["sparse"]),
    ]
    head = f"{entry['dtype']} {entry['vocab_size']} x {entry['hidden_size']}"
    return [(head, *row, *("",) * (len(HEADER) - 1 - len(row))) for row in rows]


def _times(seconds: float, unit: float) -> tuple[str, str]:
    return f"{seconds * 1e3:.2f}", f"{seconds / unit:.2f}"


def _ratio(each: dict[str, Any]) -> tuple[str, str]:
    return ("", "") if each["ratio"] is None else (f"{each['ratio']:.3f}", f"{each['spread']:.3f}")
