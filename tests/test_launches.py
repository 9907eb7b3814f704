"""Every kernel, in every form, against float64 and as a hostile GPU would launch it: see `calls` and `launches`."""

from __future__ import annotations

import importlib
import pkgutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from copg_kernels import kernels
from copg_kernels.kernels.language import INTERPRETING, jit, tl
from tests import calls
from tests.calls import ALIGNED, EVEN, FULL, MULTIPLE, NARROW, ONE, ONE_MORE, PLAIN, PRIME, Call
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import assert_close, assert_logps_close

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="audits interpreted launches")
ROOT = Path(__file__).resolve().parents[1]

BFLOAT16 = [
    *calls.calls([MULTIPLE], [torch.bfloat16], [PLAIN]),
    *calls.calls([PRIME, ONE, ONE_MORE, ALIGNED], [torch.bfloat16], [FULL]),
    *calls.calls([NARROW], [torch.bfloat16], [FULL], ["chunks"]),
]
SLICED = [
    *calls.calls([MULTIPLE], [torch.bfloat16], [PLAIN], way="sliced"),
    *calls.calls([PRIME], [torch.bfloat16, torch.float32, torch.float16], [FULL], way="sliced"),
]
OTHERS = [*calls.calls([PRIME], [torch.float32, torch.float16], [FULL])]
EVERY_DTYPE = [torch.float32, torch.bfloat16, torch.float16]
ON_A_GPU = [*calls.calls([EVEN], EVERY_DTYPE, [PLAIN, FULL])]
ON_A_GPU += calls.calls([EVEN], EVERY_DTYPE, [PLAIN, FULL], way="sliced")


@pytest.mark.parametrize("call", BFLOAT16 + OTHERS + SLICED + (ON_A_GPU if DEVICE.type == "cuda" else []), ids=str)
def test_in_any_order_and_with_nothing_beside(call: Call, audited_launches):
    inputs, batch = calls.operands(call, DEVICE), calls.completions(call, DEVICE)
    with calls.room(call):
        outcome = calls.run(call, inputs, batch, "triton")
    gold, base = (calls.reference(call, inputs, batch, dtype) for dtype in (torch.float64, torch.float32))
    for name, value in outcome.values.items():
        assert_logps_close(name, value, base.values[name], gold.values[name], largest_logit=10.0)
    for name, gradient in outcome.gradients.items():
        assert_close(name, gradient, base.gradients[name], gold.gradients[name], few_terms=True)


def test_every_kernel_is_among_the_calls_in_bfloat16(monkeypatch):
    """By their names: no kernel is run."""
    every = {
        kernel.fn.__name__: kernel
        for module in pkgutil.iter_modules(kernels.__path__)
        for name, kernel in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items()
        if name.endswith("_kernel")
    }
    launched: set[str] = set()
    for kind in {type(kernel) for kernel in every.values()}:
        monkeypatch.setattr(kind, "run", lambda self, *args, **options: launched.add(self.fn.__name__))
    for call in BFLOAT16:
        with calls.room(call):
            calls.run(call, calls.operands(call, DEVICE), calls.completions(call, DEVICE), "triton")
    assert len(every) >= 12 and launched == set(every)


@jit
def _past_its_end_kernel(x_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr + tl.program_id(0) + 1))


@jit
def _same_place_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr + tl.program_id(0)))


@jit
def _of_its_neighbour_kernel(x_ptr, out_ptr):
    program = tl.program_id(0)
    tl.store(out_ptr + program, tl.load(x_ptr + program) + tl.load(out_ptr + (program + 1) % 3))


FAULTS = {
    "element 3 of x_ptr": _past_its_end_kernel,
    "two programs write to out_ptr": _same_place_kernel,
    "a program reads what another writes in out_ptr": _of_its_neighbour_kernel,
}


@interpreted
@pytest.mark.parametrize("message", FAULTS)
def test_faults_that_the_audit_sees(message):
    from tests import launches

    with pytest.raises(AssertionError, match=message), launches.audited():
        FAULTS[message][(3,)](torch.ones(3), torch.zeros(3))


@interpreted
@pytest.mark.parametrize("order", ["reversed", "permuted"])
def test_another_order_shows_in_the_bits(order):
    from tests import launches

    found = []
    for way in (nullcontext(), launches._in_order(order)):
        out = torch.zeros(3)
        with way:
            _of_its_neighbour_kernel[(3,)](torch.arange(3.0), out)
        found.append(out)
    assert not torch.equal(*found)


@interpreted
@pytest.mark.parametrize("at_end, element", [(True, 4), (False, -1)], ids=["after it", "before it"])
def test_pages_beside_a_tensor_cannot_be_read(at_end, element):
    script = f"""
import ctypes, torch
from tests.launches import _between_pages
copy = _between_pages(torch.arange(4.0), {at_end})
assert copy.tolist() == [0, 1, 2, 3]
print("made", flush=True)
ctypes.c_float.from_address(copy.data_ptr() + 4 * {element}).value
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "made\n" and run.returncode == -signal.SIGSEGV
