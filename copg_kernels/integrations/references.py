"""Reference log-probs beside the rows of a data set, and beside the checkpoints that were trained against them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

FILE_NAME = "ref_logps.pt"


class WithReferences(Dataset):
    """Rows with ref_logps: one list per row, one number per completion."""

    def __init__(self, rows: Any, ref_logps: list[list[float]]) -> None:
        self.rows, self.ref_logps = rows, ref_logps

    def __len__(self) -> int:
        return len(self.ref_logps)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "ref_logps": self.ref_logps[index]}


def save_references(folder: Path, data_sets: Mapping[str, WithReferences]) -> None:
    torch.save({name: rows.ref_logps for name, rows in data_sets.items()}, folder / FILE_NAME)


def restore_references(folder: Path, data_sets: Mapping[str, WithReferences]) -> None:
    """Put those of a checkpoint in place of the present ones."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"resume_from_checkpoint: {path} does not exist; was the checkpoint written by CoPGTrainer?")
    saved = torch.load(path, weights_only=True)
    for name, rows in data_sets.items():
        if [len(logps) for logps in saved.get(name, [])] != [len(logps) for logps in rows.ref_logps]:
            raise ValueError(f"resume_from_checkpoint: {path} was written for other data ({name})")
        rows.ref_logps = saved[name]
