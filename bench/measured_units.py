"""What a committed run on a GPU took, in units of the torch.mm of the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.inputs import Shape
from bench.loaders import OURS, OURS_SPARSE
from bench.provenance import ROOT
from bench.providers import FROZEN, LOG_PROBS, TRAINABLE, UPSTREAM

RESULTS = ROOT / "bench" / "results"
# Path of a prediction -> provider and pass of bench/run.py.
ROWS = {
    "log-probs": (OURS, LOG_PROBS),
    "exact": (OURS, TRAINABLE),
    "frozen": (OURS, FROZEN),
    "any gradient": (OURS, UPSTREAM),
    "sparse (rl)": (OURS_SPARSE, TRAINABLE),
}
NOT_MEASURED = "not measured"


def measured_units(path: str, shape: Shape, gpu: str, folder: Path = RESULTS) -> tuple[float | None, str]:
    """Of the newest run on that GPU with that head and that many tokens; and its folder."""
    found = []
    for file in folder.glob("*/results.json"):
        results = json.loads(file.read_text())
        origin = results["provenance"]
        if gpu.lower() in origin["device"].lower():
            units = [_units(row) for table in _tables(results, shape) for row in table["rows"] if _is_of(path, row)]
            found += [(origin["date"], value, file.parent.name) for value in units if value is not None]
    if not found:
        return None, NOT_MEASURED
    _, value, name = max(found)
    return value, name


def _tables(results: dict[str, Any], shape: Shape) -> list[dict[str, Any]]:
    """Of the head in the regime and in the dtype that are predicted."""
    wanted = shape._asdict() | dict(regime="rl", dtype="bfloat16")
    del wanted["name"]
    found = (table for table in results.get("tables", []) if "shape" in table)
    return [table for table in found if all((table | table["shape"]).get(x) == y for x, y in wanted.items())]


def _is_of(path: str, row: dict[str, Any]) -> bool:
    return (row["provider"], row["pass"]) == ROWS[path]


def _units(row: dict[str, Any]) -> float | None:
    """`over_floor` is the time over as many GEMMs as nobody can avoid."""
    return None if row["over_floor"] is None else row["over_floor"] * row["units"]
