"""Launches written down instead of run: what Triton would compile for another GPU, with none present.

Operators are called as ever, on CPU tensors, and every launch ends where Triton would look for its compiled kernel.
From there on its own code says what the launch compiles: the types of the arguments, which of them are 1, multiples of
16 or None, and the options. Needs a process without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from copg_kernels import checks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Variant(NamedTuple):
    """One compilation of a kernel."""

    kernel: JITFunction
    source: ASTSource
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    @property
    def element(self) -> str:
        """The type of the head's operands, float32 where it has none."""
        types = " ".join(map(str, self.source.signature.values()))
        return next((name for name in ("bf16", "fp16") if name in types), "fp32")

    def describe(self) -> str:
        """The arguments that are known before the launch."""
        names = self.kernel.arg_names
        return ", ".join(f"{names[i]}={value}" for (i, *_), value in sorted(self.source.constants.items()))


class Launch(NamedTuple):
    """One launch of it."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextmanager
def recorded(target: str, launched: Callable[[Launch], None] | None = None) -> Iterator[dict[tuple, Variant]]:
    """Within, launches are for `target` and none is run; yields the variants of them, each once.

    `launched` is told of every launch, in their order.
    """
    backend = make_backend(TARGETS[target])
    binders: dict[JITFunction, Any] = {}
    variants: dict[tuple, Variant] = {}

    def write_down(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binders[self](*args, **kwargs)
        key = (self.fn.__name__, str(specialization), str(options))
        if key not in variants:
            options, *source = self._pack_args(backend, kwargs, bound, specialization, options)
            variants[key] = Variant(self, ASTSource(self, *source), options.__dict__)
        if launched is not None:
            arguments = dict(bound)
            launched(Launch(variants[key], grid(arguments) if callable(grid) else tuple(grid), arguments))

    is_amd = target.startswith("gfx")
    capability = (0, 0) if is_amd else divmod(TARGETS[target].arch, 10)
    with (
        mock.patch.object(JITFunction, "run", write_down),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(torch.version, "hip", "6.0" if is_amd else None),
        mock.patch.object(checks, "resolve_backend", lambda backend, hidden_states: backend),
    ):
        yield variants
