"""What is in force on this machine for one head: the code's defaults, or what `copg_kernels.tune` found and kept.

Logits come about in one of two ways. "fused": a Triton kernel multiplies, and the logits stay in its registers.
"sliced": cuBLAS writes the float32 logits of a slice of the vocabulary, and a Triton kernel reads them once.

A process reads its file once, when its first operator asks, and keeps what it has read: equal calls give equal bits.
The environment variable COPG_TUNED names another file, or is "off". A head that the file does not have, to the last
entry of its vocabulary, has the code's defaults: its neighbours' tiles may be of no use to it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.kernels.language import INTERPRETING, triton

WAYS = ("fused", "sliced")
VARIABLE = "COPG_TUNED"
OFF = ("off", "0")
INTERPRETER = "interpreter"


class Settings(NamedTuple):
    """How a head's logits are made on a device. None: what the code has."""

    logps: str = "fused"
    """The way of log-probabilities, and of the gradients that compute these logits again."""
    loss: str = "fused"
    """The way of tiles that stay until the loss's coefficients are known."""
    blocks: dict[str, Any] | None = None
    """Fields of `kernels.blocks.Blocks`."""
    workspace_bytes: int | None = None


class Entry(NamedTuple):
    """The settings of one head."""

    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    settings: Settings


class InForce(NamedTuple):
    """What a device's file has said."""

    entries: tuple[Entry, ...]
    path: Path | None  # the file, where it is the source
    source: str  # it, or why there is none: for people


_trying: list[Settings] = []
_in_force: dict[str, InForce] = {}
_lock = threading.Lock()


def settings_of(weight: Tensor) -> Settings:
    """For a head's weight (V, H)."""
    return settings_for(weight.device, weight.dtype, *weight.shape)


def settings_for(device: torch.device, dtype: torch.dtype, vocab_size: int, hidden_size: int) -> Settings:
    """For a head of this shape. Also while torch.compile traces, for which a size may be a symbol."""
    for settings in _trying[-1:]:
        return settings
    for entry in _entries(device):
        if entry.dtype == dtype and entry.vocab_size == vocab_size and entry.hidden_size == hidden_size:
            return entry.settings
    return Settings()


def widest_block(device: torch.device, dtype: torch.dtype) -> int:
    """The largest BLOCK_V of any head's settings; 0 without one."""
    every = _trying[-1:] or [entry.settings for entry in _entries(device) if entry.dtype == dtype]
    return max([0, *(settings.blocks["BLOCK_V"] for settings in every if settings.blocks is not None)])


@contextmanager
def trying(settings: Settings) -> Iterator[None]:
    """Within, `settings` are in force for every head, in every thread: what tuning and tests need."""
    _trying.append(settings)
    try:
        yield
    finally:
        _trying.pop()


def device_name(device: torch.device) -> str | None:
    """What a file calls the device; None where the kernels do not run."""
    if INTERPRETING:
        return INTERPRETER
    return torch.cuda.get_device_name(device) if device.type == "cuda" and triton is not None else None


def in_force(name: str) -> InForce:
    """Of the device of that name: read from the disk at the first call."""
    if name not in _in_force:
        with _lock:
            if name not in _in_force:
                _in_force[name], unusable = _read(name)
                if unusable:
                    warnings.warn(unusable, stacklevel=2)
    return _in_force[name]


# To torch.compile the file is a constant: it reads nothing into the graph, and breaks none.
@torch.compiler.assume_constant_result
def _entries(device: torch.device) -> tuple[Entry, ...]:
    name = device_name(device)
    return () if name is None else in_force(name).entries


def _read(name: str) -> tuple[InForce, str | None]:
    """And a warning, where there is a file that cannot be used."""
    # Here, because it describes the block table, which asks for settings.
    from copg_kernels.tuning.file import Unusable, default_path, read

    named = os.environ.get(VARIABLE, "")
    if named.lower() in OFF:
        return InForce((), None, f"{VARIABLE}={named}: the code's defaults"), None
    path = Path(os.path.expanduser(named)) if named else default_path(name)
    if path is None or not (named or os.path.exists(path)):
        return InForce((), None, f"no file{f' {path}' if path else ''}: the code's defaults"), None
    try:
        return InForce(read(path, name), path, str(path)), None
    except Unusable as why:
        ignored = f"{path} is ignored, and the code's defaults are in force: {why}"
        return InForce((), None, ignored), f"copg_kernels: {ignored} (`python -m copg_kernels.tune` writes a new one)"
