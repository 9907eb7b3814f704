"""The run's log: JSON lines, the first with configuration and versions, then one per step and per evaluation."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

import copg_kernels

PACKAGES = ("triton", "numpy", "transformers", "tokenizers", "peft", "datasets")


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


@contextmanager
def open_log(path: Path, resume_step: int | None) -> Iterator[TextIO]:
    """A new log, or the old one without the steps after the checkpoint that the run continues from."""
    if resume_step is not None and path.exists():  # a kill may come between the first checkpoint and the log
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(True) if _is_kept(line, resume_step)]
        rewritten = path.with_suffix(".partial")
        with _named(path):
            rewritten.write_text("".join(kept), encoding="utf-8")
            os.replace(rewritten, path)
    log = path.open("w" if resume_step is None else "a", encoding="utf-8")
    try:
        yield log
    finally:
        with suppress(OSError):  # closing tries once more what write_line has failed to write, and said so
            log.close()


def write_line(log: TextIO, record: dict) -> None:
    with _named(log.name):
        log.write(json.dumps(record) + "\n")
        log.flush()


def open_tensorboard(folder: Path, resume_step: int | None) -> Any:
    """A writer of event files that hides what an interrupted run wrote after its checkpoint."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the tensorboard package, which is not installed") from None
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)


def write_scalars(writer: Any, record: dict) -> None:
    """The numbers of a line of the log, by their names."""
    step = record.get("step", record.get("evaluated_at"))
    for name, value in record.items():
        if isinstance(value, float) and step is not None:
            writer.add_scalar(name, value, step)


def read_records(path: Path, key: str) -> list[dict]:
    """The lines that have this key."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if key in record]


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """The file in the message of a failed write, which has none."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _is_kept(line: str, resume_step: int) -> bool:
    try:
        record = json.loads(line)
        return record.get("step", record.get("evaluated_at", 0)) <= resume_step
    except ValueError:  # the line that a kill cut in two
        return False
