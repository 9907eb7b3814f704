"""The file of tuned settings: one per device, Triton and torch, whole at any time, and never believed unread."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch

from copg_kernels.kernels.blocks import Blocks
from copg_kernels.kernels.language import triton
from copg_kernels.tuned import WAYS, Entry, Settings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MOST_BYTES = 2**40


class Unusable(ValueError):
    """Why a file cannot be used."""


def origin(device: str) -> dict[str, Any]:
    """What a file must agree with, word for word: settings of other kernels or compilers mean nothing here."""
    import copg_kernels

    versions = {"copg_kernels": copg_kernels.__version__, "triton": _triton_version(), "torch": torch.__version__}
    return {"format": FORMAT, "device": device, **versions}


def default_path(device: str) -> Path | None:
    """In the user's cache folder; None where there is no home to have one in."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    name = f"{device}-triton-{_triton_version()}-torch-{torch.__version__}".lower()
    return folder / "copg_kernels" / (re.sub(r"[^a-z0-9.+]+", "-", name).strip("-") + ".json")


def read(path: Path, device: str) -> tuple[Entry, ...]:
    """The settings in a file for this device and these versions.

    Raises:
        Unusable: there is none, or anything in it is not what it should be.
    """
    content = contents(path)
    for name, expected in origin(device).items():
        if content.get(name) != expected:
            raise Unusable(f"its {name} is {content.get(name)!r}, here it is {expected!r}")
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise Unusable(f"its entries must be a list, got {_short(entries)}")
    return tuple(_entry(number, entry) for number, entry in enumerate(entries))


def write(path: Path, device: str, entries: list[dict[str, Any]]) -> None:
    """These entries, in place of a file's own of the same heads; its others stay, where it is one for this device.

    Whoever reads finds the new file or the one before it, whenever this process ends, and of two processes that write
    at once neither loses what the other has found.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        try:
            read(path, device)
            kept = contents(path)["entries"]
        except Unusable:
            kept = []
        new = {_head(entry) for entry in entries}
        every = [*(entry for entry in kept if _head(entry) not in new), *entries]
        text = json.dumps(origin(device) | {"entries": every}, indent=1, allow_nan=False) + "\n"
        half = path.with_name(f"{path.name}.{os.getpid()}.half")
        try:
            half.write_text(text, encoding="utf-8")
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)


def is_replaceable(path: Path) -> bool:
    """Whether nothing is lost with what is there but another such file."""
    try:
        return not path.exists() or {"format", "entries"} <= set(contents(path))
    except Unusable:
        return False


def contents(path: Path) -> dict[str, Any]:
    """The JSON object in a file, as it comes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise Unusable(f"it must be a JSON object, got {_short(content)}")
    return content


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process of this machine is within for this folder, where its system can say so."""
    if fcntl is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)  # and with it goes the lock


def _head(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["dtype"], entry["vocab_size"], entry["hidden_size"]


def _entry(number: int, entry: Any) -> Entry:
    where = f"entry {number}"
    if not isinstance(entry, dict):
        raise Unusable(f"{where} must be an object, got {_short(entry)}")
    if entry.get("dtype") not in [*DTYPES]:
        raise Unusable(f"dtype of {where} must be one of {', '.join(DTYPES)}, got {_short(entry.get('dtype'))}")
    for name in ("vocab_size", "hidden_size"):
        _require(_is_count(2**31), entry, name, where, "a positive number")
    for name in ("logps", "loss"):
        _require(lambda value: value in WAYS, entry, name, where, f"one of {', '.join(WAYS)}")
    if entry.get("workspace_bytes") is not None:
        _require(_is_count(_MOST_BYTES), entry, "workspace_bytes", where, "null or a positive number of bytes")
    if entry.get("blocks") is not None:
        check_blocks(entry["blocks"], f"the blocks of {where}")
    settings = Settings(*(entry.get(name) for name in Settings._fields))  # type: ignore[arg-type]
    return Entry(DTYPES[entry["dtype"]], entry["vocab_size"], entry["hidden_size"], settings)


def check_blocks(blocks: Any, where: str) -> None:
    """Raises Unusable where an operator could not take them."""
    if not isinstance(blocks, dict) or set(blocks) != set(Blocks._fields):
        raise Unusable(f"{where} must have the fields {', '.join(Blocks._fields)}, got {_short(blocks)}")
    for name, kind in get_type_hints(Blocks).items():
        is_right, expected = _FIELDS.get(name) or _TYPES[kind]
        _require(is_right, blocks, name, where, expected)


def _require(is_right: Callable[[Any], bool], values: dict[str, Any], name: str, where: str, expected: str) -> None:
    if not is_right(values.get(name)):
        raise Unusable(f"{name} of {where} must be {expected}, got {_short(values.get(name))}")


def _is_count(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_power_of_two(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: _is_count(most)(value) and value >= least and value & (value - 1) == 0


# Tensor cores take no tile below 16; a vocabulary tile is stored in quarters of at least 16 bytes.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "BLOCK_N": (_is_power_of_two(16, 512), "a power of two from 16 to 512"),
    "BLOCK_V": (_is_power_of_two(32, 512), "a power of two from 32 to 512"),
    "BLOCK_H": (_is_power_of_two(16, 512), "a power of two from 16 to 512"),
    "num_warps": (_is_power_of_two(1, 32), "a power of two from 1 to 32"),
    "num_stages": (_is_count(16), "a number from 1 to 16"),
    "precision": (lambda value: value in ("ieee", "tf32x3"), "ieee or tf32x3"),
    "max_registers": (lambda value: value is None or _is_count(255)(value), "null or a number up to 255"),
}
_TYPES: dict[type, tuple[Callable[[Any], bool], str]] = {
    int: (_is_count(2**20), "a positive number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _triton_version() -> str:
    return triton.__version__ if triton is not None else "none"
