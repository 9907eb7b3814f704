"""Checkpoints that are whole or absent, whatever interrupts the writing.

A checkpoint is a folder `step-00000050` that is written under another name, flushed to the disk and then
renamed; the one before it goes only after that. It holds the policy (safetensors), the tokenizer and
`state.pt`: optimizer, random number generators, step, reference log-probs, configuration, digest of the data.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer
from torch import nn


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def save_checkpoint(run_dir: Path, model: nn.Module, tokenizer: Tokenizer, state: dict) -> Path:
    final = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    if final.exists():
        return final
    with atomic_folder(final) as folder:
        save_model(model, str(folder / "model.safetensors"))
        tokenizer.save(str(folder / "tokenizer.json"))
        torch.save(state, folder / "state.pt")
    for older in checkpoints(run_dir)[:-1]:
        shutil.rmtree(older)
    return final


def load_state(folder: Path) -> dict:
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_weights(folder: Path, model: nn.Module) -> None:
    load_model(model, str(folder / "model.safetensors"))


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
    """A folder to write into that becomes `final` at the end, or vanishes if the writing fails."""
    scratch = final.with_name(f".{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            _flush_to_disk(path)
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
