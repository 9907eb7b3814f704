"""Files that are whole whenever the process that writes them ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Whoever reads finds the new text or the one before it, and never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(text)
    os.replace(half, path)


def write_json(path: Path, results: dict[str, Any]) -> None:
    write_whole(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
