"""What is in force on this machine for one head: the code's defaults, or what `copg_kernels.tune` found and kept.

Logits come about in one of two ways. "fused": a Triton kernel multiplies, and the logits stay in its registers.
"sliced": cuBLAS writes the float32 logits of a slice of the vocabulary, and a Triton kernel reads them once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

WAYS = ("fused", "sliced")


class Settings(NamedTuple):
    """How a head's logits are made on a device. None: what the code has."""

    logps: str = "fused"
    """The way of log-probabilities, and of the gradients that compute these logits again."""
    loss: str = "fused"
    """The way of tiles that stay until the loss's coefficients are known."""
    blocks: dict[str, Any] | None = None
    """Fields of `kernels.blocks.Blocks`."""
    workspace_bytes: int | None = None


_trying: list[Settings] = []


def settings_of(weight: Tensor) -> Settings:
    """For a head's weight (V, H)."""
    return _trying[-1] if _trying else Settings()


@contextmanager
def trying(settings: Settings) -> Iterator[None]:
    """Within, `settings` are in force for every head, in every thread: what tuning and tests need."""
    _trying.append(settings)
    try:
        yield
    finally:
        _trying.pop()
