"""Every launch of an interpreted kernel as a hostile GPU would run it.

Each launch is run three times, the last two on copies of what it was given:

    as it comes   each load and store is looked up: it must lie within a tensor of the launch, no address is written by
                  two programs, and no program reads what another writes
    reversed      programs in reverse order, each tensor followed at once by a page that cannot be read
    permuted      programs in a scattered order, each tensor preceded at once by such a page

All three must leave the same bits behind.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor


class Access(NamedTuple):
    """What one program read or wrote in one instruction."""

    program: int
    addresses: np.ndarray
    is_store: bool


@contextmanager
def audited() -> Iterator[None]:
    """Within, every launch is audited."""
    execute = GridExecutor.__call__

    def launch(self, *args, **kwargs) -> None:
        arguments = _arguments(self.fn, args, kwargs)
        given = {name: _extent(tensor).clone() for name, tensor in _tensors(arguments).items()}
        with _traced() as accesses:
            execute(self, **arguments)
        if accesses:  # none where there are no programs
            _check_bounds(self.fn.__name__, accesses, _tensors(arguments))
            _check_programs(self.fn.__name__, accesses, _tensors(arguments))
        for order, at_end in (("reversed", True), ("permuted", False)):
            copies = {name: _between_pages(extent, at_end) for name, extent in given.items()}
            with _in_order(order):
                execute(self, **_replaced(arguments, copies))
            for name, tensor in _tensors(arguments).items():
                _check_bits(f"{self.fn.__name__}, {order}: {name}", copies[name], _extent(tensor))

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


def _arguments(kernel: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """By name, without the compile options."""
    parameters = inspect.signature(kernel).parameters
    return dict(zip(parameters, args, strict=False)) | {k: v for k, v in kwargs.items() if k in parameters}


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    bases = {name: value.base if isinstance(value, TensorDescriptor) else value for name, value in arguments.items()}
    return {name: base for name, base in bases.items() if isinstance(base, Tensor) and base.numel()}


def _extent(tensor: Tensor) -> Tensor:
    """From its first to its last element, what lies between its rows included."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((length,), (1,))


def _replaced(arguments: dict[str, Any], extents: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments with these extents in their tensors' place."""
    replaced = dict(arguments)
    for name, extent in extents.items():
        old = arguments[name]
        base = old.base if isinstance(old, TensorDescriptor) else old
        new = extent.as_strided(base.shape, base.stride())
        if isinstance(old, TensorDescriptor):
            new = TensorDescriptor(new, old.shape, old.strides, old.block_shape)
        replaced[name] = new
    return replaced


def _check_bits(name: str, copy: Tensor, tensor: Tensor) -> None:
    copy, tensor = copy.view(torch.uint8), tensor.view(torch.uint8)
    assert torch.equal(copy, tensor), f"{name} has other bits: {int((copy != tensor).sum())} of {copy.numel()} bytes"


@contextmanager
def _traced() -> Iterator[list[Access]]:
    """Every load and store within."""
    accesses: list[Access] = []

    def tracing(method: Any, mask_at: int, is_store: bool) -> Any:
        def wrapper(self, pointers, *rest, **options):
            (x, y, z), (_, ny, nz) = self.grid_idx, self.grid_dim
            program = (x * ny + y) * nz + z
            mask = np.asarray(rest[mask_at].data, dtype=bool)
            accesses.append(Access(program, pointers.data[mask].ravel(), is_store))
            return method(self, pointers, *rest, **options)

        return wrapper

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", tracing(load, 0, False)),
        mock.patch.object(InterpreterBuilder, "create_masked_store", tracing(store, 1, True)),
    ):
        yield accesses


def _check_bounds(kernel: str, accesses: list[Access], tensors: dict[str, Tensor]) -> None:
    """Every address is that of an element of a tensor of the launch."""
    addresses = np.unique(np.concatenate([access.addresses for access in accesses])).astype(np.int64)
    known = np.zeros(addresses.shape, dtype=bool)
    for tensor in tensors.values():
        offset, rest = np.divmod(addresses - tensor.data_ptr(), tensor.element_size())
        inside = (offset >= 0) & (rest == 0)
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
            if stride:
                index, offset = np.divmod(offset, stride)
                inside &= index < size
        known |= inside & (offset == 0)
    if not known.all():
        stray = int(addresses[~known][0])
        near = {n: (stray - t.data_ptr()) // t.element_size() for n, t in tensors.items()}
        name, element = min(near.items(), key=lambda item: abs(item[1] - tensors[item[0]].numel() / 2))
        raise AssertionError(
            f"{kernel} touches {(~known).sum()} addresses outside its tensors, such as element {element} of {name} "
            f"{tuple(tensors[name].shape)}"
        )


def _check_programs(kernel: str, accesses: list[Access], tensors: dict[str, Tensor]) -> None:
    """No address is written by two programs, or read by one and written by another."""
    stores = _by_address([access for access in accesses if access.is_store])
    if not stores.size:
        return
    twice = stores[0, 1:][np.diff(stores[0]) == 0]
    assert not twice.size, f"{kernel}: two programs write to {_owner(int(twice[0]), tensors)}"
    loads = _by_address([access for access in accesses if not access.is_store])
    at = np.searchsorted(stores[0], loads[0]).clip(max=stores.shape[1] - 1)
    foreign = (stores[0, at] == loads[0]) & (stores[1, at] != loads[1])
    assert not foreign.any(), (
        f"{kernel}: a program reads what another writes in {_owner(int(loads[0][foreign][0]), tensors)}"
    )


def _by_address(accesses: list[Access]) -> np.ndarray:
    """(2, n): addresses in order, and the program of each, every pair once."""
    if not accesses:
        return np.empty((2, 0), dtype=np.int64)
    programs = [np.full(access.addresses.size, access.program) for access in accesses]
    pairs = np.stack(
        [np.concatenate([access.addresses for access in accesses]).astype(np.int64), np.concatenate(programs)]
    )
    return np.unique(pairs, axis=1)


def _owner(address: int, tensors: dict[str, Tensor]) -> str:
    for name, tensor in tensors.items():
        if 0 <= address - tensor.data_ptr() < _extent(tensor).numel() * tensor.element_size():
            return f"{name}[{(address - tensor.data_ptr()) // tensor.element_size()}]"
    raise AssertionError("no tensor has this address")


@contextmanager
def _in_order(order: str) -> Iterator[None]:
    """Program i of n does what program n - 1 - i, or another one, is there for."""
    set_grid_idx = InterpreterBuilder.set_grid_idx

    def elsewhere(self, x, y, z):
        nx, ny, nz = self.grid_dim
        n, i = nx * ny * nz, (x * ny + y) * nz + z
        step = next(s for s in range(max(2, n // 3), 2 * n + 3) if math.gcd(s, n) == 1)
        i = n - 1 - i if order == "reversed" else (i * step + n // 2) % n
        set_grid_idx(self, i // (ny * nz), i // nz % ny, i % nz)

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", elsewhere):
        yield


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _between_pages(extent: Tensor, at_end: bool) -> Tensor:
    """A copy that ends, or begins, where a page begins, or ends, that nobody may touch.

    At the end as near as 16 bytes allow, which descriptors and vector loads need.
    """
    size = extent.numel() * extent.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + mmap.PAGESIZE + room):
        assert _libc.mprotect(page, mmap.PAGESIZE, 0) == 0, "mprotect failed"
    offset = mmap.PAGESIZE + (room - -(-size // 16) * 16 if at_end else 0)
    copy = torch.frombuffer(memory, dtype=extent.dtype, count=extent.numel(), offset=offset)
    return copy.copy_(extent)
