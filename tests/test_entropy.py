"""Entropy beside the log-probabilities: from the same logits, and without disturbing a bit of them."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from copg_kernels import (
    CoPGLoss,
    linear_copg_loss,
    linear_logps,
    linear_logps_and_entropy,
    linear_sequence_loss,
    losses,
)
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.row_statistics import Wanted
from copg_kernels.reference import linear_entropy_ref
from copg_kernels.schedules import closed_groups, forward, frozen_head, recompute
from copg_kernels.schedules.chunks import Batch
from tests.conftest import DEVICE
from tests.test_work import MatmulFlops

T, H = 37, 24
# Several splits of a kernel's vocabulary; two of the twins' smallest slices.
V = {"torch": 301, "triton": 130}


def operands(backend: str, dtype=torch.float32, scale: float = 3.0) -> dict:
    labels = torch.randint(V[backend], (T,), device=DEVICE)
    labels[::5] = -100
    return dict(
        hidden_states=(scale * torch.randn(T, H, device=DEVICE)).to(dtype),
        lm_head_weight=(torch.randn(V[backend], H, device=DEVICE) / H**0.5).to(dtype),
        labels=labels,
    )


def entropy_of(hidden_states, lm_head_weight, labels, bias=None, **options):
    """In float64, from all logits."""
    wide = (None if x is None else x.detach().double() for x in (hidden_states, lm_head_weight, bias))
    hidden_states, lm_head_weight, bias = wide
    return linear_entropy_ref(hidden_states, lm_head_weight, labels, bias=bias, **options)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["streaming", "frozen head"])
@pytest.mark.parametrize("head", [{}, dict(logit_scale=0.8, softcap=6.0, temperature=1.25)], ids=["plain", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_entropy(dtype, head, frozen_head, backend):
    inputs = operands(backend, dtype)
    if head:
        inputs["bias"] = torch.randn(V[backend], device=DEVICE).to(dtype)
    inputs["hidden_states"].requires_grad_(frozen_head)
    logps, entropy = linear_logps_and_entropy(**inputs, **head, backend=backend)
    assert torch.equal(logps, linear_logps(**inputs, **head, backend=backend)) and entropy.requires_grad == frozen_head
    expected = entropy_of(**inputs, **head).float()
    assert expected.max() > 2 and (entropy[::5] == 0).all()
    torch.testing.assert_close(entropy, expected, rtol=2e-5, atol=2e-6)


def test_gradients_are_those_of_the_log_probs(backend):
    inputs = operands(backend)
    for name in ("hidden_states", "lm_head_weight"):
        inputs[name].requires_grad_()
    dlogps = torch.randn(T, device=DEVICE)
    both = linear_logps_and_entropy(**inputs, backend=backend)[0], linear_logps(**inputs, backend=backend)
    trained = (inputs["hidden_states"], inputs["lm_head_weight"])
    pairs = zip(*(torch.autograd.grad(logps, trained, dlogps) for logps in both), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["streaming", "frozen head"])
def test_confident_rows_keep_their_digits(frozen_head, backend):
    """An entropy of 1e-7 where the label is the sure token; where it is another, the float32 sum rounds."""
    inputs = operands(backend, scale=0.01)
    sure = torch.arange(T, device=DEVICE) % V[backend]
    with torch.no_grad():
        inputs["hidden_states"][:, :] = inputs["lm_head_weight"][sure] * 40
        inputs["lm_head_weight"][: V[backend] // 2] *= 1.5
    inputs["hidden_states"].requires_grad_(frozen_head)
    inputs["labels"] = torch.where(torch.arange(T, device=DEVICE) % 2 == 0, sure, 7)
    _, entropy = linear_logps_and_entropy(**inputs, backend=backend)
    expected = entropy_of(**inputs).float()
    assert (expected[::2] < 1e-6).any()
    torch.testing.assert_close(entropy[::2], expected[::2], rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=2e-7)


def test_entries_of_probability_zero(backend):
    """A bias that masks half of the vocabulary, a label among it."""
    inputs = operands(backend)
    bias = torch.zeros(V[backend], device=DEVICE)
    bias[V[backend] // 2 :] = float("-inf")
    inputs["labels"][1] = V[backend] - 1
    logps, entropy = linear_logps_and_entropy(**inputs, bias=bias, backend=backend)
    assert logps[1] == float("-inf")
    torch.testing.assert_close(entropy, entropy_of(**inputs, bias=bias).float(), rtol=1e-5, atol=1e-6)


def test_edges(backend):
    inputs = operands(backend)
    none = dict(inputs, labels=torch.full((T,), -100, device=DEVICE))
    assert (linear_logps_and_entropy(**none, backend=backend)[1] == 0).all()
    empty = dict(inputs, hidden_states=inputs["hidden_states"][:0], labels=inputs["labels"][:0])
    assert linear_logps_and_entropy(**empty, backend=backend)[1].shape == (0,)
    shaped = dict(
        inputs, hidden_states=inputs["hidden_states"][:36].view(3, 12, H), labels=inputs["labels"][:36].view(3, 12)
    )
    assert linear_logps_and_entropy(**shaped, backend=backend)[1].shape == (3, 12)
    with pytest.raises(TypeError, match="labels"):
        linear_logps_and_entropy(**dict(inputs, labels=inputs["labels"].float()), backend=backend)


def test_no_product_more():
    """Of the twins, whose products torch can count; kernels have theirs inside."""
    hidden_states, weight, labels = operands("torch").values()
    options = dict(ignore_index=-100, workspace_bytes=2**20, backend="torch")
    for schedule in (forward.token_logps, frozen_head.token_logps_and_slopes):
        flops = []
        for entropy in (False, True):
            with MatmulFlops() as counter:
                schedule(hidden_states, Head(weight, None, 1.0, None, 1.0), labels, **options, wanted=Wanted(entropy))
            flops.append(counter.flops)
        assert flops[0] == flops[1] > 0


# Of the fused losses

N, L = 8, 5


def square_of_the_mean(logps, ref_logps, rewards, *, beta, group_size):
    return logps.mean() ** 2


@losses.separable
def wrongly_declared(logps, ref_logps, rewards, *, beta, group_size):
    return logps.mean() ** 2


FUSED = {
    "copg": linear_copg_loss,
    "any loss": partial(linear_sequence_loss, loss=losses.rloo_loss),
    "not over groups": partial(linear_sequence_loss, loss=square_of_the_mean),
    "wrongly declared": partial(linear_sequence_loss, loss=wrongly_declared),
}
TRAINS = {"all": ["hidden_states", "lm_head_weight"], "hidden states": ["hidden_states"], "nothing": []}
# (whether the workspace holds all tokens, group_size)
SCHEDULES = {"one chunk": (True, 2), "chunks": (False, 2), "group beyond the workspace": (False, 8)}


def workspace_of(holds_all: bool, backend: str) -> int:
    """For more than all of the 40 tokens, or for 32 of them and a few more."""
    return 2**20 if holds_all else {"torch": 45_000, "triton": 27_000}[backend]


def batch(backend: str, dtype=torch.float32, trains: Sequence[str] = TRAINS["all"]) -> dict:
    labels = torch.randint(V[backend], (N, L), device=DEVICE)
    labels[::3, 3:] = -100
    tensors = dict(
        hidden_states=(3 * torch.randn(N, L, H, device=DEVICE)).to(dtype),
        lm_head_weight=(torch.randn(V[backend], H, device=DEVICE) / H**0.5).to(dtype),
    )
    leaves = {name: x.requires_grad_(name in trains) for name, x in tensors.items()}
    return leaves | dict(labels=labels, ref_logps=-torch.rand(N, device=DEVICE), rewards=torch.randn(N, device=DEVICE))


def everything(output, inputs: dict) -> list[torch.Tensor]:
    """All fields but the optional ones, and the gradients."""
    leaves = [x for x in inputs.values() if x.requires_grad]
    return [*output[:5], *(torch.autograd.grad(output.loss, leaves) if leaves else [])]


@pytest.mark.parametrize(
    ("loss", "trains", "schedule", "units"),
    [
        ("copg", "all", "one chunk", 3),
        ("copg", "all", "chunks", 3),
        ("copg", "all", "group beyond the workspace", 4),
        ("copg", "hidden states", "chunks", 2),
        ("copg", "hidden states", "group beyond the workspace", 2),
        ("copg", "nothing", "chunks", 1),
        ("any loss", "all", "chunks", 3),
        ("any loss", "all", "group beyond the workspace", 4),
        ("any loss", "hidden states", "one chunk", 2),
        ("any loss", "nothing", "chunks", 1),
        ("not over groups", "all", "chunks", 4),
        ("wrongly declared", "all", "chunks", 4),
    ],
)
def test_entropy_of_a_fused_loss(loss, trains, schedule, units, backend):
    """In every schedule: right, and nothing else changes by a bit."""
    holds_all, group_size = SCHEDULES[schedule]
    inputs = batch(backend, trains=TRAINS[trains])
    head = dict(logit_scale=0.8, softcap=6.0, temperature=1.25)
    workspace_bytes = workspace_of(holds_all, backend)
    options = dict(beta=0.3, group_size=group_size, workspace_bytes=workspace_bytes, backend=backend, **head)
    output, plain = FUSED[loss](**inputs, **options, return_entropy=True), FUSED[loss](**inputs, **options)
    assert output.gemm_units == units and plain.entropy is None and not output.entropy.requires_grad
    assert output.sparsity is None and plain.sparsity is None
    operands = (inputs["hidden_states"], inputs["lm_head_weight"], inputs["labels"])
    expected = entropy_of(*operands, **head).float()
    assert output.entropy.shape == (N, L) and expected.max() > 2
    torch.testing.assert_close(output.entropy, expected, rtol=2e-5, atol=2e-6)
    pairs = zip(everything(output, inputs), everything(plain, inputs), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_entropy_of_packed_float16_completions(backend):
    inputs = batch(backend, torch.float16)
    inputs["hidden_states"] = inputs["hidden_states"].detach().view(N * L, H).requires_grad_()
    inputs["labels"] = inputs["labels"].view(-1)
    packed = dict(cu_seqlens=torch.tensor([0, 4, 6, 13, 17, 24, 30, 31, 40], dtype=torch.int32, device=DEVICE))
    expected = entropy_of(inputs["hidden_states"], inputs["lm_head_weight"], inputs["labels"]).float()
    for loss in FUSED.values():
        output = loss(**inputs, **packed, beta=0.3, group_size=2, backend=backend, return_entropy=True)
        torch.testing.assert_close(output.entropy, expected, rtol=2e-5, atol=2e-6)


def test_entropy_of_the_module(backend):
    inputs = batch(backend)
    module = CoPGLoss(beta=0.3, group_size=2, backend=backend, return_entropy=True)
    output = module(inputs.pop("lm_head_weight"), *inputs.values())
    assert output.entropy.shape == (N, L) and (output.entropy[0, 3:] == 0).all()


@pytest.mark.parametrize("loss", FUSED)
def test_entropy_of_a_sparse_softmax_is_refused(loss):
    with pytest.raises(ValueError, match=r"return_entropy needs sparse_eps = None, got 0\.001"):
        FUSED[loss](**batch("torch"), beta=0.3, group_size=2, sparse_eps=1e-3, return_entropy=True)
    with pytest.raises(TypeError, match="return_entropy must be a bool, got 1"):
        FUSED[loss](**batch("torch"), beta=0.3, group_size=2, return_entropy=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("trains", [(True, True, False), (True, False, False), (False, False, False)])
def test_no_product_more_in_a_fused_loss(trains, schedule):
    """Of the twins, whose products torch can count; kernels have theirs inside."""
    holds_all, group_size = SCHEDULES[schedule]
    hidden_states, weight, labels, ref_logps, rewards = (x.detach() for x in batch("torch").values())
    edges = [torch.arange(0, last + 1, step, dtype=torch.int32) for last, step in ((N * L, L), (N, group_size))]
    completions = Completions(*(x.cpu() for x in edges), ref_logps.cpu(), rewards.cpu(), 0.3, False, N // group_size)
    head = Head(weight.cpu(), None, 1.0, None, 1.0)
    tokens = Batch(hidden_states.cpu().view(-1, H), head, labels.cpu().view(-1), completions, -100)
    flops = []
    for entropy in (False, True):
        with MatmulFlops() as counter:
            workspace_bytes = workspace_of(holds_all, "torch")
            options = dict(sparse_eps=None, workspace_bytes=workspace_bytes, backend="torch", entropy=entropy)
            closed_groups.copg(tokens, recompute.Needs(*trains), **options)
        flops.append(counter.flops)
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize("loss", ["copg", "any loss"])
def test_a_fused_loss_compiles_without_a_break(loss, backend):
    """A loss that is not ours takes another schedule there: the entropy's last bit may differ."""
    inputs = batch(backend)
    function = partial(FUSED[loss], beta=0.3, group_size=2, backend=backend, return_entropy=True)
    compiled = torch.compile(lambda: function(**inputs).entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), function(**inputs).entropy, rtol=1e-6, atol=1e-6)


def test_compiles_without_a_break(backend):
    inputs = operands(backend)
    compiled = torch.compile(linear_logps_and_entropy, fullgraph=True, backend="aot_eager")
    expected = linear_logps_and_entropy(**inputs, backend=backend)
    assert all(torch.equal(*pair) for pair in zip(compiled(**inputs, backend=backend), expected, strict=True))
