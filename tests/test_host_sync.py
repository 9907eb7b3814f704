"""On a GPU nothing waits for the device: no number is read on the host, so that a CUDA graph can hold a whole step.

Without a GPU its path runs on tensors that hold no numbers, where whatever reads one raises: the operators with all
their launches, which are counted instead of made. The twins of the torch backend do read numbers, of counted rows say.
What a GPU's path reads by design: boundaries of ragged groups whose tiles do not all fit the workspace, and in
`linear_sequence_loss` whether a loss that went in chunks was a mean over groups.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from copg_kernels import (
    checks,
    copg_loss,
    linear_copg_loss,
    linear_logps,
    linear_sequence_loss,
    losses,
    sequence_logps,
    sequence_loss,
)
from copg_kernels.kernels import blocks
from copg_kernels.kernels.exp_tile import _exp_tile_kernel
from copg_kernels.kernels.language import triton
from copg_kernels.ops import linear_copg_op, linear_logps_bwd_op, linear_logps_op
from tests.conftest import DEVICE
from tests.numerics import assert_close

T, V, H, N = 128, 5000, 16, 8
# 32 tokens make a group: 324 kB of bfloat16, 647 kB of float32.
WORKSPACES = {"one chunk": 2**30, "chunks": 700_000, "recomputed": 2**18}
on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels that a GPU would be given, where tensors are on one as far as the code can tell."""
    if triton is None:
        pytest.skip("no Triton")
    made: list[str] = []
    monkeypatch.setattr(type(_exp_tile_kernel), "run", lambda self, *args, **options: made.append(self.fn.__name__))
    monkeypatch.setattr(blocks, "is_regular", lambda weight: False)  # these tensors have no address
    monkeypatch.setattr(checks, "_on_gpu", lambda tensor: True)
    return made


def operands(dtype=torch.float32) -> tuple:
    numbers = [torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((T, H), (V, H), (V,))]
    return numbers[0], numbers[1], torch.randint(V, (T,), device=DEVICE), numbers[2]


def completions() -> tuple:
    edges = [torch.arange(0, last + 1, step, dtype=torch.int32, device=DEVICE) for last, step in ((T, T // N), (N, 2))]
    return *torch.randn(2, N, device=DEVICE), *edges


def test_a_number_that_is_read_is_noticed(launches):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        checks.completion_boundaries(*operands()[::2], completions()[2])[0].item()


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("sparse_eps", [None, 1e-3], ids=["exact", "sparse"])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen head"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_the_fused_loss(launches, frozen_head, sparse_eps, average, workspace):
    needs = [True, not frozen_head, not frozen_head]
    entropy = (not sparse_eps, 0.0 if sparse_eps else 0.1 * average)
    options = (0.3, average, needs, *entropy, 0.9, 8.0, 1.25, -100, sparse_eps, WORKSPACES[workspace], "triton")
    with FakeTensorMode():
        # The function behind the operator, which itself would be satisfied with the shapes of its results.
        linear_copg_op._init_fn(*operands(), *completions(), [T // N, 2], *options)
    assert "_contrast_kernel" in launches
    if not (frozen_head or sparse_eps):
        tiles = {"one chunk": 1, "chunks": 4, "recomputed": 0}
        assert launches.count("_exp_tile_kernel") == tiles[workspace]


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen head"])
def test_log_probs(launches, frozen_head):
    options = (0.9, 8.0, 1.25, -100, 2**20, "triton")
    with FakeTensorMode():
        inputs = operands()
        slopes, wanted = "entropy" if frozen_head else "none", [True] * 4
        logps, lse, _, entropy, *_ = linear_logps_op._init_fn(*inputs, slopes, wanted, *options)
        linear_logps_bwd_op._init_fn(logps, entropy, *inputs, logps, lse, entropy, [True, True, True], *options)
    assert "_token_statistics_kernel" in launches and "_softmax_minus_label_kernel" in launches


def test_sparse_log_probs(launches):
    with FakeTensorMode():
        hidden_states, weight, labels, _ = operands()
        leaves = hidden_states.requires_grad_(), weight.requires_grad_()
        logps = linear_logps(*leaves, labels, sparse_eps=1e-3, backend="triton")
        torch.autograd.grad(logps.sum(), leaves)
    assert "_gather_product_kernel" in launches


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_a_loss_of_the_callers_in_one_chunk(launches, ragged):
    with FakeTensorMode():
        hidden_states, weight, labels, _ = operands()
        ref_logps, rewards, cu_seqlens, cu_groups = completions()
        leaves, options = (hidden_states.requires_grad_(), weight.requires_grad_()), dict(beta=0.3, backend="triton")
        if ragged:
            options |= dict(cu_seqlens=cu_seqlens, cu_groups=cu_groups, loss=copg_loss)
        else:
            hidden_states, labels = hidden_states.view(N, -1, H), labels.view(N, -1)
            options |= dict(loss=losses.dpo_loss, group_size=2)
        loss = linear_sequence_loss(hidden_states, weight, labels, ref_logps, rewards, **options).loss
        torch.autograd.grad(loss, leaves)
    assert "_exp_tile_kernel" in launches


@pytest.mark.parametrize("in_a_graph", [False, True], ids=["eager", "in a CUDA graph"])
def test_a_loss_of_the_callers_in_chunks(launches, in_a_graph, monkeypatch):
    """Read once, whether it is a mean over groups; a graph has no host to read, and its logits are computed again."""
    monkeypatch.setattr(sequence_loss, "capturing", lambda tensor: in_a_graph)
    with FakeTensorMode():
        hidden_states, weight, labels, _ = operands()
        batch = (hidden_states.view(N, -1, H).requires_grad_(), weight, labels.view(N, -1), *completions()[:2])
        options = dict(loss=losses.dpo_loss, beta=0.3, group_size=2, backend="triton")
        options |= dict(workspace_bytes=WORKSPACES["chunks"])
        if in_a_graph:
            linear_sequence_loss(*batch, **options).loss.backward()
            return
        with pytest.raises(DataDependentOutputException):
            linear_sequence_loss(*batch, **options)
    assert launches.count("_exp_tile_kernel") == 4


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_losses_on_log_probs(launches, ragged):
    """With everything that is checked about their arguments."""
    with FakeTensorMode():
        labels, (ref_logps, rewards, cu_seqlens, cu_groups) = operands()[2], completions()
        token_logps = torch.randn(T, device=DEVICE, requires_grad=True)
        logps = sequence_logps(token_logps, labels, cu_seqlens=cu_seqlens, average=True)
        if ragged:
            copg_loss(logps, ref_logps, rewards, beta=0.3, cu_groups=cu_groups).backward()
            return
        for loss in (copg_loss, losses.ipo_loss, losses.dpo_loss, losses.rloo_loss, losses.raft_loss):
            loss(logps, ref_logps, rewards, beta=0.3, group_size=2).backward(retain_graph=True)


# With a GPU

STEPS = {
    "linear_copg_loss": lambda batch, completions, **options: (
        linear_copg_loss(*batch, *completions, beta=0.3, group_size=2, **options).loss
    ),
    "linear_copg_loss, sparse": lambda batch, completions, **options: (
        linear_copg_loss(*batch, *completions, beta=0.3, group_size=2, sparse_eps=1e-3, **options).loss
    ),
    "linear_logps": lambda batch, completions, **options: linear_logps(*batch, **options).square().mean(),
    "linear_sequence_loss": lambda batch, completions, **options: (
        linear_sequence_loss(*batch, *completions, loss=losses.dpo_loss, beta=0.3, group_size=2, **options).loss
    ),
}


def padded(dtype=torch.bfloat16) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(hidden_states, lm_head_weight, labels), (ref_logps, rewards)"""
    hidden_states, weight, labels, _ = operands(dtype)
    labels[::5] = -100
    batch = [hidden_states.view(N, -1, H).requires_grad_(), weight.requires_grad_(), labels.view(N, -1)]
    return batch, list(completions()[:2])


def gradients(step, batch, numbers, **options) -> list[torch.Tensor]:
    loss = step(batch, numbers, **options)
    return [loss.detach(), *torch.autograd.grad(loss, batch[:2])]


@on_a_gpu
@pytest.mark.parametrize("step", STEPS)
def test_no_call_of_cuda_waits(step):
    batch, numbers = padded()
    gradients(STEPS[step], batch, numbers)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(STEPS[step], batch, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(step, batch, numbers, new_inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """What a graph of `step` on these tensors gives once they hold the new inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels compile and cuBLAS takes its workspace outside of the capture
            gradients(step, batch, numbers, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(step, batch, numbers, **options)
    with torch.no_grad():
        for held, new in zip([*batch, *numbers], new_inputs, strict=True):
            held.copy_(new)
    graph.replay()
    return captured


@on_a_gpu
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("step", STEPS)
def test_a_cuda_graph_replays_on_new_inputs(step, workspace):
    new_batch, new_numbers = padded()
    options = dict(workspace_bytes=WORKSPACES[workspace])
    found = replayed(STEPS[step], *padded(), [*new_batch, *new_numbers], **options)
    if step != "linear_sequence_loss" or workspace == "one chunk":
        eager = gradients(STEPS[step], new_batch, new_numbers, **options)
        assert all(torch.equal(*pair) for pair in zip(found, eager, strict=True))
        return
    base, gold = (
        gradients(STEPS[step], [x.to(dtype) for x in new_batch[:2]] + new_batch[2:], new_numbers, backend="torch")
        for dtype in (torch.float32, torch.float64)
    )
    for name, actual, in_float32, exact in zip(("loss", "dhidden", "dweight"), found, base, gold, strict=True):
        assert_close(name, actual, in_float32, exact)
