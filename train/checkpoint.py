"""Checkpoints that are whole or absent, whatever interrupts the writing.

A checkpoint is a folder `step-00000050` that is written under another name, flushed to the disk and then
renamed; the one before it goes only after that. It is a model that `from_pretrained` of transformers, or of peft for
adapters, reads: configuration, weights (safetensors) and tokenizer; and `state.pt`: optimizer, random number
generators, step, reference log-probs, the run's configuration, digest of the data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

# Of state.pt and of what lies beside it.
FORMAT = 2


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def save_checkpoint(
    run_dir: Path, model: Any, tokenizer: Any, state: dict, weights: dict[str, Tensor] | None = None
) -> Path:
    """Writes the checkpoint of state["step"] and removes older ones; OSError, with these intact, where that fails."""
    final = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    if final.exists():
        return final
    older = checkpoints(run_dir)
    try:
        with atomic_folder(final) as folder:
            save_model(folder, model, tokenizer, weights)
            torch.save(state | {"format": FORMAT}, folder / "state.pt")
    # A full disk is a RuntimeError to torch.save and a SafetensorError to safetensors.
    except (OSError, RuntimeError, SafetensorError) as error:
        stands = f"{older[-1]} stands" if older else "there is none before it"
        free = shutil.disk_usage(run_dir).free / 2**20
        raise OSError(f"{final} could not be written, {free:.1f} MiB are free there: {error}; {stands}") from error
    for folder in older:
        shutil.rmtree(folder)
    return final


def save_model(folder: Path, model: Any, tokenizer: Any, weights: dict[str, Tensor] | None = None) -> None:
    """The model with its own weights, or with these, where its own are shards."""
    model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)


def load_state(folder: Path) -> dict:
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError(f"{folder} was written by another version of this program")
    return state


def rng_state() -> dict:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def restore_rng(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"])


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final`, or replaces it, at the end; it vanishes if the writing fails."""
    scratch = final.with_name(f".{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            _flush_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _flush_to_disk(final.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
