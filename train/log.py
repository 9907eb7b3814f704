"""The run's log: JSON lines, the first with configuration and versions, then one per step."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TextIO

import torch

import copg_kernels

PACKAGES = ("triton", "numpy", "transformers", "tokenizers")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its CUDA build, which the package metadata leave out
        "copg_kernels": copg_kernels.__version__,
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def open_log(path: Path, resume_step: int | None) -> TextIO:
    """A new log, or the old one without the steps after the checkpoint that the run continues from."""
    if resume_step is None:
        return path.open("w", encoding="utf-8")
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if _is_kept(line, resume_step)]
    rewritten = path.with_suffix(".partial")
    rewritten.write_text("".join(kept), encoding="utf-8")
    os.replace(rewritten, path)
    return path.open("a", encoding="utf-8")


def write_line(log: TextIO, record: dict) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


def read_steps(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "step" in record]


def _is_kept(line: str, resume_step: int) -> bool:
    try:
        return json.loads(line).get("step", 0) <= resume_step
    except ValueError:  # the line that a kill cut in two
        return False
