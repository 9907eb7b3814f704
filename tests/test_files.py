"""Files of a run: what is read executes nothing, and what is written is on the disk before it takes its name."""

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch

from copg_kernels.integrations.references import FILE_NAME, restore_references
from train.checkpoint import atomic_folder, load_state


class Trap:
    """An object that writes a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize(
    "name, read",
    [("state.pt", load_state), (FILE_NAME, lambda folder: restore_references(folder, {}))],
    ids=["state of a run", "references of CoPGTrainer"],
)
def test_a_checkpoint_with_code_in_it_is_not_executed(name, read, tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"format": Trap(sprung)}, tmp_path / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read(tmp_path)
    assert not sprung.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert sprung.exists()  # the trap does work


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """A power cut after the rename finds whole files: each flushed before, its folder too, and their parent after."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        of = os.fstat(descriptor)
        events.append((of.st_ino, of.st_size if stat.S_ISREG(of.st_mode) else None))
        fsync(descriptor)

    def renamed(source, target):
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_folder(tmp_path / "step-1") as folder:
        (folder / "weights").write_bytes(b"12345")
        (folder / "inner").mkdir()
        (folder / "inner" / "state").write_bytes(b"123")
    final = tmp_path / "step-1"
    sizes = {"weights": 5, "inner/state": 3, "inner": None, ".": None}
    before = events[: events.index("renamed")]
    assert set(before) == {((final / name).stat().st_ino, size) for name, size in sizes.items()}
    assert before[-1] == (final.stat().st_ino, None)
    assert events[len(before) :] == ["renamed", (tmp_path.stat().st_ino, None)]
