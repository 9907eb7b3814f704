"""Units of GEMM work and peak memory: what the cost model promises, counted.

On the torch backend, whose products torch sees; a kernel has its own inside.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from copg_kernels import linear_copg_loss, linear_logps
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.schedules import closed_groups, forward, frozen_head, recompute
from copg_kernels.schedules.chunks import Batch
from tests.conftest import DEVICE

T, V, H = 96, 700, 40


class MatmulFlops(TorchDispatchMode):
    """Counts every matrix product, in-place and out= variants included, which FlopCounterMode leaves out.

    It does not see into copg_kernels' own operators.
    """

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif not name.startswith("copg_kernels::"):
            assert not any(word in name for word in ("matmul", "bmm", "einsum", "linear", "addmv", "conv"))
        return func(*args, **(kwargs or {}))


def units(wanted: tuple[bool, bool] | None, counted: int = T) -> float:
    """Head GEMMs of `counted` rows, in units of 2 T V H: the schedules' own products, below the operators."""
    hidden_states, weight = torch.randn(T, H), torch.randn(V, H)
    labels = torch.where(torch.arange(T) < counted, torch.randint(V, (T,)), -100)
    head, options = (
        Head(weight, None, 1.0, None, 1.0),
        dict(ignore_index=-100, workspace_bytes=2**20, backend="torch"),
    )
    with MatmulFlops() as counter:
        logps, lse, _ = forward.token_logps(hidden_states, head, labels, **options)
        if wanted:
            needs = recompute.Needs(*wanted, bias=False)
            recompute.token_logps_bwd(torch.randn(T), hidden_states, head, labels, logps, lse, needs, **options)
    return counter.flops / (2 * counted * V * H)


def test_units_of_work():
    assert units(None) == 1
    assert units((True, True)) == 4
    assert units((True, False)) == 3
    assert units((False, True)) == 3


def test_units_of_work_of_a_frozen_head():
    """Whatever the upstream gradient: the backward pass only scales rows."""
    hidden_states, weight, labels = torch.randn(T, H), torch.randn(V, H), torch.randint(V, (T,))
    head = Head(weight, None, 1.0, None, 1.0)
    for workspace in (10 * V * 4, 2**20):
        with MatmulFlops() as counter:
            frozen_head.token_logps_and_slopes(
                hidden_states, head, labels, ignore_index=-100, workspace_bytes=workspace, backend="torch"
            )
        assert counter.flops == 2 * (2 * T * V * H)


def closed_units(needs: recompute.Needs, workspace_bytes: int) -> float:
    """The same for the loss with its gradients, in groups of two completions of 12 tokens."""
    hidden_states, weight, labels = torch.randn(T, H), torch.randn(V, H), torch.randint(V, (T,))
    cu_seqlens = torch.arange(0, T + 1, 12, dtype=torch.int32)
    cu_groups = torch.arange(0, T // 12 + 1, 2, dtype=torch.int32)
    completions = Completions(cu_seqlens, cu_groups, *torch.randn(2, T // 12), 0.3, False, cu_groups.numel() - 1)
    batch = Batch(hidden_states, Head(weight, None, 1.0, None, 1.0), labels, completions, -100)
    with MatmulFlops() as counter:
        options = dict(sparse_eps=None, workspace_bytes=workspace_bytes, backend="torch")
        _, _, units, _ = closed_groups.copg(batch, needs, **options)
    assert units == counter.flops / (2 * T * V * H)
    return units


def test_units_of_work_of_closed_groups():
    both, head_frozen = recompute.Needs(True, True, False), recompute.Needs(True, False, False)
    for groups_per_chunk in (1, 3, 4):
        workspace = groups_per_chunk * 24 * V * 4
        assert closed_units(both, workspace) == 3
        assert closed_units(head_frozen, workspace) == 2
        assert closed_units(recompute.Needs(False, True, False), workspace) == 2
        assert closed_units(recompute.Needs(False, False, False), workspace) == 1
    assert closed_units(both, 24 * V * 4 - 1) == 4
    assert closed_units(head_frozen, 24 * V * 4 - 1) == 2


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors but views of `known`."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known, self.seen = known.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.seen.add(tuple(result.shape))
        return result


def test_frozen_head_makes_nothing_of_the_size_of_the_head():
    hidden_states, weight, labels = torch.randn(T, H), torch.randn(V, H), torch.randint(V, (T,))
    head, options = Head(weight, None, 1.0, None, 1.0), dict(ignore_index=-100, workspace_bytes=2**20, backend="torch")
    with Shapes(weight) as shapes:
        frozen_head.token_logps_and_slopes(hidden_states, head, labels, **options)
    assert (T, H) in shapes.seen and not {(V, H), (H, V)} & shapes.seen


def test_ignored_rows_cost_nothing():
    assert units(None, counted=T // 3) == 1
    assert units((True, True), counted=T // 3) == 4


def test_no_gradient_no_backward(monkeypatch):
    """Under no_grad, and where nothing requires it, only the forward schedule runs."""
    monkeypatch.setattr(recompute, "token_logps_bwd", lambda *args, **kwargs: pytest.fail("backward ran"))
    hidden_states, weight = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.randint(9, (8,))
    with torch.no_grad():
        assert not linear_logps(hidden_states, weight, labels).requires_grad
    assert not linear_logps(hidden_states.detach(), weight.detach(), labels).requires_grad


# The subprocess's arguments: workspaces in MiB, 0 for the reference. It prints for each the peak above inputs and
# gradients in MiB.
MEASURE = """
import sys
import torch
from copg_kernels import linear_copg_loss
from copg_kernels.reference import linear_copg_loss_ref

def peak(reset=False):
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

T, V, H = 1024, 32000, 128
def step(rows, workspace):
    x, w = torch.randn(rows, H, requires_grad=True), torch.randn(V, H).mul_(0.1).requires_grad_()
    labels, cu_seqlens = torch.randint(V, (rows,)), torch.arange(0, rows + 1, rows // 4, dtype=torch.int32)
    numbers = torch.randn(2, 4)
    x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)
    before = peak(reset=True)
    if not workspace:
        loss = linear_copg_loss_ref(x, w, labels, *numbers, beta=0.1, group_size=2, cu_seqlens=cu_seqlens)
    else:
        options = dict(workspace_bytes=workspace * 2**20)
        loss = linear_copg_loss(x, w, labels, *numbers, beta=0.1, group_size=2, cu_seqlens=cu_seqlens, **options).loss
    gradients = torch.autograd.grad(loss, (x, w))
    return peak() - before - sum(g.numel() * g.element_size() for g in gradients) / 2**20

for workspace in map(int, sys.argv[1:]):
    step(64, workspace)  # thread pools and library buffers are not the operator's
    print(step(T, workspace))
"""


def peaks_mib(*workspaces: int) -> list[float]:
    """Of one process, which gives back all of a step's memory at its end: else the next would seem to need less."""
    command = [sys.executable, "-c", MEASURE, *map(str, workspaces)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return [float(line) for line in run.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
def test_peak_memory_on_a_cpu():
    """Workspace, a scaled copy of the hidden states, the kept gradients, and O(T): never the 125 MiB of logits."""
    workspaces = (8, 32, 72)  # recomputed twice, then in closed groups of 62.5 MiB
    *peaks, eager = peaks_mib(*workspaces, 0)
    assert eager > 2 * 1024 * 32000 * 4 / 2**20
    for workspace, peak in zip(workspaces, peaks, strict=True):
        # 24 MiB for MKL's packing buffers and the allocator, measured 4 to 20.
        kept = (3 * 1024 * 128 + 32000 * 128) * 4 / 2**20
        assert peak < workspace + kept + 24
        assert peak < 0.35 * eager


# What torch gives cuBLAS on Hopper unless CUBLAS_WORKSPACE_CONFIG says otherwise, 8 MiB on others. It may be given once
# more, for a stream or a library of cuBLAS that had none.
CUBLAS_WORKSPACE = 32 * 2**20


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_peak_memory_on_a_gpu():
    T, V, H = 4096, 128_256, 1024
    x = torch.randn(T, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(V, H, device=DEVICE, dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    labels, cu_seqlens = (
        torch.randint(V, (T,), device=DEVICE),
        torch.arange(0, T + 1, 1024, device=DEVICE).int(),
    )
    numbers = torch.randn(2, 4, device=DEVICE)
    # Compiled kernels and cuBLAS's workspace are there after the first call, and not the operator's.
    linear_copg_loss(x, w, labels, *numbers, beta=0.1, group_size=2, cu_seqlens=cu_seqlens).loss.backward()
    x.grad = w.grad = None
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_logps(x, w, labels)
        packed_rows, statistics = T * H * 2, 64 * T
        assert torch.cuda.max_memory_allocated() - before < packed_rows + statistics + 16 * 2**20
    kept = (T * H + V * H) * 2
    for workspace, units in ((128 * 2**20, 4), (1100 * 2**20, 3)):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = linear_copg_loss(
            x, w, labels, *numbers, beta=0.1, group_size=2, cu_seqlens=cu_seqlens, workspace_bytes=workspace
        )
        gradients = torch.autograd.grad(output.loss, (x, w))
        above = torch.cuda.max_memory_allocated() - before - sum(g.numel() * 2 for g in gradients)
        assert output.gemm_units == units
        rows = T * H * (2 + 2 + 4)  # packed, scaled, and their gradient in float32
        assert above < max(workspace + rows, kept) + CUBLAS_WORKSPACE
        del output, gradients
