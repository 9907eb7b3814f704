"""Every way that torch has of differentiating: right, or refused in words."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from copg_kernels import copg_loss, linear_copg_loss, linear_logps, linear_sequence_loss, losses
from copg_kernels.schedules.workspace import kept_bytes_per_token, least_workspace_bytes
from tests.conftest import DEVICE
from tests.numerics import relative_error

N, L, H, V = 6, 5, 16, 97

OPERATORS = {
    "linear_logps": lambda x, w, y, *_, **options: linear_logps(x, w, y, **options).square().sum(),
    "linear_copg_loss": lambda *batch, **options: linear_copg_loss(*batch, beta=0.3, group_size=2, **options).loss,
    "linear_sequence_loss": lambda *batch, **options: (
        linear_sequence_loss(*batch, loss=losses.dpo_loss, beta=0.3, group_size=2, **options).loss
    ),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def batch(V: int = V) -> tuple[torch.Tensor, ...]:
    labels = torch.randint(V, (N, L), device=DEVICE)
    labels[1, 2:] = -100
    hidden_states, weight = torch.randn(N, L, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    return hidden_states, weight, labels, torch.randn(N, device=DEVICE), torch.randn(N, device=DEVICE)


def trained(batch: tuple, weight: bool = True) -> tuple[torch.Tensor, ...]:
    return batch[0].clone().requires_grad_(), batch[1].clone().requires_grad_(weight), *batch[2:]


# Backwards, more than once.


@pytest.mark.parametrize("sparse_eps", [None, 1e-9], ids=["exact", "sparse"])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen head"])
@each_operator
def test_a_second_backward_pass_after_the_first_was_used(operator, frozen_head, sparse_eps, backend):
    """Gradients belong to the caller, who clips and zeroes them; what waits for another pass stays as it was."""
    inputs = trained(batch(), weight=not frozen_head)
    leaves = [x for x in inputs if x.requires_grad]
    loss = operator(*inputs, backend=backend, sparse_eps=sparse_eps)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.zero_()
    loss.backward(retain_graph=True)
    for x, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, first)
        torch.nn.utils.clip_grad_norm_([x], 1e-3)
    clipped = [x.grad.clone() for x in leaves]
    loss.backward()
    for x, first, left in zip(leaves, once, clipped, strict=True):
        torch.testing.assert_close(x.grad, left + first)


@each_operator
def test_a_graph_that_was_not_kept_is_gone(operator):
    inputs = trained(batch())
    loss = operator(*inputs, backend="torch")  # freed by autograd, not by a backend
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# Forwards, and by torch.func.


def gradient(operator, inputs: tuple) -> torch.Tensor:
    leaf = inputs[0].clone().requires_grad_()
    return torch.autograd.grad(operator(leaf, *inputs[1:]), leaf)[0]


@pytest.mark.parametrize("sparse_eps", [None, 1e-3], ids=["exact", "sparse"])
@each_operator
def test_forward_mode_is_refused(operator, sparse_eps, backend):
    x, *others = batch()

    def function(x):
        return operator(x, *others, backend=backend, sparse_eps=sparse_eps)

    refused = pytest.raises(NotImplementedError, match="no forward-mode derivatives")
    with refused:
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with refused:
        torch.func.jvp(lambda w: operator(x, w, *others[1:], backend=backend), (others[0],), (others[0],))
    with refused:
        torch.func.jacfwd(function)(x)
    with forward_ad.dual_level(), refused:
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    with refused:
        torch.compile(lambda x: torch.func.jvp(function, (x,), (x,)), backend="eager")(x)


@each_operator
def test_torch_func_gradients_are_refused(operator, backend):
    x, *others = batch()

    def function(x):
        return operator(x, *others, backend=backend)

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian, torch.func.grad_and_value):
        with pytest.raises(NotImplementedError, match=r"torch\.func\.grad|forward-mode"):
            transform(function)(x)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
        torch.func.vmap(torch.func.grad(function))(torch.stack([x, x]))
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad"):
        torch.func.grad(lambda both: torch.func.vmap(function)(both).sum())(torch.stack([x, x]))


def test_constants_within_torch_func_are_no_derivatives(backend):
    """Reference log-probs, say, in a function that is differentiated for other parameters."""
    inputs = batch()
    scale = torch.tensor(2.0, device=DEVICE)
    expected = linear_logps(*inputs[:3], backend=backend).sum()
    slope = torch.func.grad(lambda scale: scale * linear_logps(*inputs[:3], backend=backend).sum())(scale)
    torch.testing.assert_close(slope, expected)


@each_operator
def test_vmap_is_one_after_the_other(operator, backend):
    x, *others = batch()
    both = torch.stack([x, 2 * x]).requires_grad_()

    def function(x):
        return operator(x, *others, backend=backend)

    values = torch.func.vmap(function)(both)
    expected = torch.stack([function(one) for one in both])
    torch.testing.assert_close(values, expected)
    upstream = torch.tensor([1.0, -3.0], device=DEVICE)
    pair = [torch.autograd.grad(value, both, upstream)[0] for value in (values, expected)]
    assert relative_error(*pair) < 1e-5


def test_vmap_that_is_refused(backend):
    x, *others = trained(batch())
    with pytest.raises(NotImplementedError, match=r"sparse_eps must be None under torch\.func\.vmap"):
        torch.func.vmap(lambda x: linear_logps(x, *others[:2], backend=backend, sparse_eps=1e-3))(torch.stack([x, x]))
    compiled = torch.compile(torch.func.vmap(lambda x: OPERATORS["linear_copg_loss"](x, *others, backend=backend)))
    with pytest.raises(Exception, match=r"NotImplementedError: .*torch\.func\.vmap within torch\.compile"):
        compiled(torch.stack([x, x])).sum().backward()


# A loss with tensors and a memory of its own.

# A vocabulary of which a third of the tokens fills the smallest workspace: one step of it for all of them.
WIDE = {"torch": 800, "triton": 97}
WAYS = [
    "one chunk",
    "chunks, declared",
    "chunks",
    "a group too large",
    "frozen head",
    "head frozen, in chunks",
    "no head",
]


def bound_for(way: str, backend: str) -> int | None:
    if way in ("one chunk", "frozen head", "no head"):
        return None
    tokens = 2 * L if way != "a group too large" else 1
    least = least_workspace_bytes(N * L, H, torch.float32, DEVICE, backend)
    return max(least, tokens * kept_bytes_per_token(WIDE[backend], torch.float32, DEVICE, backend))


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_with_a_baseline_that_learns(way, backend):
    """Its own gradient arrives, the loss is called with the log-probs of all completions, and once unless declared."""
    x, w, *others = trained(batch(WIDE[backend]), weight="head" not in way)
    x.requires_grad_(way != "no head")
    baseline = torch.randn(N, device=DEVICE, requires_grad=True)
    seen = []

    def loss(logps, ref_logps, rewards, *, beta, group_size):
        seen.append(logps.detach().clone())
        advantages = rewards - baseline - beta * (logps - ref_logps)
        return (-(advantages.detach() * logps) + advantages.square()).mean()

    if way == "chunks, declared":
        loss = losses.separable(loss)
    workspace = bound_for(way, backend)
    output = linear_sequence_loss(
        x, w, *others, loss=loss, beta=0.3, group_size=2, backend=backend, workspace_bytes=workspace
    )
    assert torch.equal(seen[-1], output.logps) and (len(seen) == 1 or way == "chunks, declared")
    leaves = [leaf for leaf in (x, w, baseline) if leaf.requires_grad]
    actual = torch.autograd.grad(output.loss, leaves)
    logps = (x @ w.T).log_softmax(-1).gather(-1, others[0].clamp(min=0)[..., None])[..., 0]
    logps = logps.masked_fill(others[0] == -100, 0.0).sum(1)
    expected = torch.autograd.grad(loss(logps, *others[1:], beta=0.3, group_size=2), leaves)
    assert all(relative_error(*pair) < 1e-5 for pair in zip(actual, expected, strict=True))


def test_a_loss_with_a_memory(backend):
    """A running mean of the log-probs, which a call with completions still at the reference would spoil."""
    running = []

    def loss(logps, ref_logps, rewards, *, beta, group_size):
        running.append(logps.mean().item())
        return ((logps - sum(running) / len(running)) * rewards).mean()

    inputs = trained(batch(WIDE[backend]))
    workspace = bound_for("chunks", backend)
    for _ in range(2):
        output = linear_sequence_loss(
            *inputs, loss=loss, beta=0.3, group_size=2, backend=backend, workspace_bytes=workspace
        )
        assert output.gemm_units == 4
    assert len(running) == 2 and running[0] == running[1] == output.logps.mean().item()


@pytest.mark.parametrize("way", ["one chunk", "chunks"])
def test_a_loss_with_a_network_of_its_own_under_autocast(way, backend):
    """Its layers run in the caller's precision, whichever schedule calls it."""
    inputs, head = trained(batch(WIDE[backend])), torch.nn.Linear(1, 1, device=DEVICE)

    def loss(logps, ref_logps, rewards, *, beta, group_size):
        values = head(rewards.unsqueeze(1))
        assert values.dtype == torch.bfloat16
        return (values.squeeze(1).float() - logps).square().mean()

    with torch.autocast(DEVICE.type, torch.bfloat16):
        options = dict(beta=0.3, group_size=2, backend=backend, workspace_bytes=bound_for(way, backend))
        linear_sequence_loss(*inputs, loss=loss, **options).loss.backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.any()


@pytest.mark.parametrize("way", ["one chunk", "chunks"])
def test_a_loss_that_works_in_place(way, backend):
    inputs = trained(batch(WIDE[backend]))

    def in_place(logps, ref_logps, rewards, *, beta, group_size):
        logps -= ref_logps
        return logps.mul_(beta).sub_(rewards).square_().mean()

    def plain(logps, ref_logps, rewards, *, beta, group_size):
        return (beta * (logps - ref_logps) - rewards).square().mean()

    options = dict(beta=0.3, group_size=2, backend=backend, workspace_bytes=bound_for(way, backend))
    outputs = [linear_sequence_loss(*inputs, loss=loss, **options) for loss in (in_place, plain)]
    assert torch.equal(*(output.logps for output in outputs))
    pairs = zip(*(torch.autograd.grad(output.loss, inputs[:2]) for output in outputs), strict=True)
    assert all(relative_error(*pair) < 1e-6 for pair in pairs)


def test_declared_through_partial(backend):
    """A loss of the package keeps its three units in chunks, whatever arguments are bound to it."""
    inputs, workspace = trained(batch(WIDE[backend])), bound_for("chunks", backend)
    loss = partial(losses.ppo_loss, old_logps=inputs[3])
    options = dict(beta=0.3, group_size=2, backend=backend, workspace_bytes=workspace)
    assert linear_sequence_loss(*inputs, loss=loss, **options).gemm_units == 3
    assert linear_sequence_loss(*inputs, loss=lambda *a, **k: loss(*a, **k), **options).gemm_units == 4


@pytest.mark.parametrize("workspace", [None, "chunks"])
def test_a_loss_that_forgets_the_log_probs(workspace, backend):
    inputs = trained(batch(WIDE[backend]))
    own = torch.tensor(1.0, device=DEVICE, requires_grad=True)
    output = linear_sequence_loss(
        *inputs, loss=lambda *_, **__: own * 3, beta=0.3, group_size=2, backend=backend,
        workspace_bytes=bound_for(workspace, backend) if workspace else None,
    )  # fmt: skip
    output.loss.backward()
    assert own.grad == 3 and not any(x.grad is not None and x.grad.any() for x in inputs[:2])


@pytest.mark.parametrize("value", [3.0, torch.zeros(2), torch.tensor(1), None], ids=str)
def test_a_loss_that_returns_no_scalar(value, backend):
    with pytest.raises(TypeError, match="loss must return a floating-point scalar tensor, got"):
        linear_sequence_loss(*trained(batch()), loss=lambda *_, **__: value, beta=0.3, group_size=2, backend=backend)


@pytest.mark.parametrize("name", ["ref_logps", "rewards"])
def test_constants_that_require_a_gradient(name, backend):
    """They would get none, and nobody would notice."""
    inputs = dict(zip(("hidden_states", "lm_head_weight", "labels", "ref_logps", "rewards"), batch(), strict=True))
    inputs[name].requires_grad_()
    refused = pytest.raises(ValueError, match=f"{name} must not require a gradient.*pass {name}.detach")
    numbers = (torch.randn(N, device=DEVICE), inputs["ref_logps"], inputs["rewards"])
    options = dict(beta=0.3, group_size=2)
    with refused:
        linear_copg_loss(**inputs, **options, backend=backend)
    with refused:
        linear_sequence_loss(**inputs, **options, loss=losses.dpo_loss, backend=backend)
    for loss in (copg_loss, losses.ipo_loss, losses.rebel_loss):
        with refused:
            loss(*numbers, **options)
    with torch.no_grad():
        assert copg_loss(*numbers, **options).isfinite()
        linear_copg_loss(**inputs, **options, backend=backend)
