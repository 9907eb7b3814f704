"""What the tables of the evidence are measured with: settings tuned on the same GPU, kept beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.parts import CRASHED, FAILED, PASSED, TIMED_OUT, Ended, Line, Part, how_it_ended

# Of its time, what the search may take: it finishes the head it is at.
SEARCH = 0.75


def tune_part(folder: Path, seconds: float, options: Sequence[str] = ()) -> Part:
    command = (sys.executable, "-X", "faulthandler", "-m", "copg_kernels.tune", "--out", str(file_of(folder)))
    return Part("tune", (*command, "--minutes", f"{max(SEARCH * seconds, 0.1) / 60:.3f}", *options), seconds)


def file_of(folder: Path) -> Path:
    return folder / "tuned.json"


def judge(ended: Ended) -> Line:
    """Ours with wrong numbers is a failure; a candidate's is a row of its table."""
    line = partial(Line, ended.part.name, seconds=ended.seconds)
    file = Path(ended.part.command[ended.part.command.index("--out") + 1])
    entries = json.loads(file.read_text())["entries"] if file.exists() else []
    found = f"{len(entries)} heads"
    if ended.timed_out:
        return line(TIMED_OUT, found)
    if ended.returncode == 1:
        return line(FAILED, f"{found}; {how_it_ended(ended)}")
    if ended.returncode:
        return line(CRASHED, f"{found}; {how_it_ended(ended)}")
    return line(PASSED if entries else FAILED, found)
