"""Reference log-probs beside the rows of a data set, and beside the checkpoints that were trained against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

FILE_NAME = "ref_logps.pt"


class WithReferences(Dataset):
    """Rows with ref_logps, once these are known: one list per row, one number per completion."""

    def __init__(self, rows: Any) -> None:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError(f"data sets must have a length and be indexable, got {type(rows).__name__}")
        self.rows = rows
        self.ref_logps: list[list[float]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return row if self.ref_logps is None else {**row, "ref_logps": self.ref_logps[index]}

    def group_sizes(self) -> list[int]:
        if self.ref_logps is not None:
            return [len(logps) for logps in self.ref_logps]
        return [len(row["completions"]) for row in self.rows]


@torch.no_grad()
def find_references(
    data_set: WithReferences,
    batch_size: int,
    collate: Callable[[list], dict[str, Tensor]],
    logps_of: Callable[[dict[str, Tensor]], Tensor],
    quiet: bool,
) -> None:
    """Each batch by one process, the last ones by several: every process calls logps_of equally often."""
    processes, num_rows = PartialState(), len(data_set)
    batches = [list(range(num_rows)[first : first + batch_size]) for first in range(0, num_rows, batch_size)]
    batches += batches[-1:] * (-len(batches) % processes.num_processes)
    mine = batches[processes.process_index :: processes.num_processes]
    loader = DataLoader(data_set, batch_sampler=mine, collate_fn=collate)
    found: list[tuple[int, list[float]]] = []
    brings = num_rows > 0 and "ref_logps" in data_set[0]
    for rows, inputs in zip(mine, tqdm(loader, desc="reference log-probs", disable=quiet), strict=True):
        if ("ref_logps" in inputs) != brings:  # processes that gather shards would wait for this one
            raise ValueError(
                f"ref_logps must be in every row or in none, rows {rows[0]} to {rows[-1]} differ from row 0"
            )
        logps = logps_of(inputs).tolist()
        for row, size in zip(rows, inputs["group_sizes"].tolist(), strict=True):
            found.append((row, logps[:size]))
            logps = logps[size:]
    by_row = dict(gather_object(found))
    data_set.ref_logps = [by_row[row] for row in range(num_rows)]


def restore_references(folder: Path, data_sets: Mapping[str, WithReferences]) -> None:
    """Put those of a checkpoint in place of the present ones."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"resume_from_checkpoint: {path} does not exist; was the checkpoint written by CoPGTrainer?")
    saved = torch.load(path, weights_only=True)
    for name, rows in data_sets.items():
        if [len(logps) for logps in saved.get(name, [])] != rows.group_sizes():
            raise ValueError(f"resume_from_checkpoint: {path} was written for other data ({name})")
        rows.ref_logps = saved[name]


class ReferencesCallback(TrainerCallback):
    """Finds those that had to wait for the sharded model; saves beside every checkpoint those it was trained with."""

    def __init__(self, find: Callable[[], None], data_sets: Callable[[], Mapping[str, WithReferences]]) -> None:
        self.find, self.data_sets = find, data_sets

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.find()

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            references = {name: rows.ref_logps for name, rows in self.data_sets().items()}
            torch.save(references, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME)
