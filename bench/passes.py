"""What an operator does on a GPU, pass by pass: it is called at its real shapes, and nothing is computed.

The tensors have shapes, types and strides and no memory, and say that they are on a GPU. So the schedules decide as
they would there, every launch of Triton is written down instead of run (`recording`), and so is every operation of
torch that moves data. Nobody keeps a list of passes: what the code does tomorrow is what is recorded then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.inputs import BETA, Shape
from bench.providers import SPARSE_EPS
from bench.recording import Launch, recorded
from copg_kernels import linear_copg_loss, linear_logps
from copg_kernels.tuned import Settings, trying

GROUP_SIZE = 2
# Of torch, and where among the arguments the left operand is.
PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1}
# Reads as much as it returns, wherever that is in its first argument.
_PICKS = {"index_select", "gather", "embedding"}


class TorchOp(NamedTuple):
    """An operation of torch."""

    name: str
    bytes: int
    product: tuple[int, int, int] | None = None  # (M, N, K)
    out_bytes: int = 0  # of it, what is written, and what it is added to


class Operand(NamedTuple):
    """A tensor, or a descriptor's: to hold the tensor itself would keep autograd from handing it on without a copy."""

    shape: tuple[int, ...]
    bytes: int


Pass = TorchOp | Launch


class Path(NamedTuple):
    """Something a caller asks for."""

    name: str
    run: Callable[..., None]
    trains_head: bool = True
    trains: bool = True


def _logps(hidden_states: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    linear_logps(hidden_states, weight, labels, backend="triton", **options)


def _upstream(hidden_states: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    logps = linear_logps(hidden_states, weight, labels, backend="triton", **options)
    logps.backward(torch.empty_like(logps))


def _loss(hidden_states: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    ref_logps, rewards = hidden_states.new_empty((2, len(labels)), dtype=torch.float32)
    options |= dict(beta=BETA, group_size=GROUP_SIZE, backend="triton")
    out = linear_copg_loss(hidden_states, weight, labels, ref_logps, rewards, **options)
    out.loss.backward()


def _sparse(hidden_states: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    _loss(hidden_states, weight, labels, sparse_eps=SPARSE_EPS, **options)


PATHS = (
    Path("log-probs", _logps, trains=False),
    Path("exact", _loss),
    Path("frozen", _loss, trains_head=False),
    Path("any gradient", _upstream),
    Path("sparse (rl)", _sparse),
)


def passes_of(
    path: Path, shape: Shape, target: str, way: str = "fused", workspace_bytes: int | None = None
) -> list[Pass]:
    """In their order; in bfloat16, every token counted."""
    passes: list[Pass] = []
    rows = shape.num_tokens // shape.completion_length

    def launched(launch: Launch) -> None:
        passes.append(_without_tensors(launch))

    with _on_paper(), recorded(target, launched), trying(Settings(logps=way, loss=way)):
        shapes = (rows, shape.completion_length, shape.hidden_size), (shape.vocab_size, shape.hidden_size)
        hidden_states, weight = (torch.empty(sizes, dtype=torch.bfloat16, device="meta") for sizes in shapes)
        labels = torch.empty(hidden_states.shape[:2], dtype=torch.int64, device="meta")
        with _Recording(passes):
            hidden_states.requires_grad_(path.trains)
            weight.requires_grad_(path.trains and path.trains_head)
            path.run(hidden_states, weight, labels, workspace_bytes=workspace_bytes)
    return passes


@contextmanager
def _on_paper() -> Iterator[None]:
    """Tensors without memory say that they are on a GPU; no autocast is on, and their device has none."""
    with (
        mock.patch.object(Tensor, "is_cuda", property(lambda self: True), create=True),
        mock.patch.object(torch, "autocast", lambda *args, **options: nullcontext()),
    ):
        yield


def _without_tensors(launch: Launch) -> Launch:
    arguments = dict(launch.arguments)
    for name, value in launch.arguments.items():
        tensor = getattr(value, "base", value)  # of a descriptor
        if isinstance(tensor, Tensor):
            arguments[name] = Operand(tuple(tensor.shape), tensor.numel() * tensor.element_size())
    return launch._replace(arguments=arguments)


class _Recording(TorchDispatchMode):
    def __init__(self, passes: list[Pass]) -> None:
        super().__init__()
        self.passes = passes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        short = name.removeprefix("aten::")
        # Of a product with another type than its operands', releases of torch differ in what they know.
        out = kwargs["out"] if "out" in kwargs and short in PRODUCTS else func(*args, **kwargs)
        if name.startswith("aten::") and not short.startswith(("empty", "new_empty")):
            work = _product(short, args, out) if short in PRODUCTS else _moved(func, short, args, kwargs, out)
            if work is not None:
                self.passes.append(work)
        return out


def _product(name: str, args: tuple, out: Tensor) -> TorchOp:
    first = PRODUCTS[name]
    left, right = args[first], args[first + 1]
    M, K = left.shape[-2:]
    written = _bytes(out) * (1 + first)
    return TorchOp(f"{name} to {_type(out)}", _bytes(left) + _bytes(right) + written, (M, right.shape[-1], K), written)


def _moved(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> TorchOp | None:
    """Bytes read and written; None of a view, and where nothing was to be done."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    if not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in results):
        return None
    written = sum(map(_bytes, results))
    read = [_bytes(tensor) for tensor in tensors]
    if name in _PICKS:
        read[0] = min(read[0], written)
    if name in ("copy_", "fill_", "zero_") or name.startswith("new_") or name.endswith("_like"):
        read[0] = 0
    return TorchOp(f"torch {name}", sum(read) + written, out_bytes=written)


def _bytes(tensor: Tensor) -> int:
    """In memory: an expanded axis is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
