"""The operators as citizens of torch: opcheck, fullgraph compilation, hooks for checkpointing."""

from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from copg_kernels import (
    copg_loss,
    linear_copg_loss,
    linear_logps,
    linear_sequence_loss,
    losses,
    sequence_logps,
)
from copg_kernels.ops import linear_copg_op, linear_logps_bwd_op, linear_logps_op
from tests.conftest import BACKENDS, DEVICE

T, V, H = 24, 67, 16


def operands(with_bias: bool = True) -> tuple:
    hidden_states = torch.randn(T, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[3] = -100
    return (
        hidden_states,
        weight,
        labels,
        torch.randn(V, device=DEVICE, requires_grad=True) if with_bias else None,
    )


def completions() -> tuple:
    cu_seqlens = torch.tensor([0, 5, 11, 12, 24], dtype=torch.int32, device=DEVICE)
    cu_groups = torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    return *torch.randn(2, 4, device=DEVICE), cu_seqlens, cu_groups


# A bias that is None goes the same way to either backend.
@pytest.mark.parametrize(
    ("backend", "with_bias"), [*((backend, True) for backend in BACKENDS), ("torch", False)], ids=str
)
def test_opcheck(with_bias, backend):
    head = (0.9, 8.0, 1.25, -100, 2**20, backend)
    torch.library.opcheck(linear_logps_op, (*operands(with_bias), "none", [with_bias] * 4, *head))
    fused_head = (0.9, 8.0, 1.25, -100, None, 2**20, backend)
    needs = [True, True, with_bias]
    # opcheck differentiates the absolute value: of a negative loss the gradients would be scaled in place.
    arguments = (*operands(with_bias), *completions(), [], 0.3, True, needs, False, -0.2 * with_bias, *fused_head)
    torch.library.opcheck(linear_copg_op, arguments)
    hidden_states, weight, labels, bias = (None if x is None else x.detach() for x in operands(with_bias))
    logps, lse, _, entropy, *_ = linear_logps_op(hidden_states, weight, labels, bias, "none", [with_bias] * 4, *head)
    upstream = torch.randn(2, T, device=DEVICE) if with_bias else (torch.randn(T, device=DEVICE), None)
    arguments = (*upstream, hidden_states, weight, labels, bias, logps, lse, entropy, needs, *head)
    torch.library.opcheck(linear_logps_bwd_op, arguments)


@pytest.mark.parametrize(("slopes", "entropy"), [("logps", True), ("logps", False), ("entropy", True)])
def test_opcheck_of_a_frozen_head(slopes, entropy, backend):
    hidden_states, weight, labels, bias = operands()
    frozen = (hidden_states, weight.detach(), labels, bias.detach())
    torch.library.opcheck(linear_logps_op, (*frozen, slopes, [entropy] * 4, 0.9, 8.0, 1.25, -100, 2**20, backend))


def programs(backend: str) -> dict:
    ref_logps, rewards, cu_seqlens, cu_groups = completions()
    options = dict(softcap=8.0, temperature=1.25, backend=backend)

    def of_tokens(hidden_states, weight, labels, bias):
        return linear_logps(hidden_states, weight, labels, bias=bias, **options).square().sum()

    def fused(hidden_states, weight, labels, bias):
        batch = (hidden_states, weight, labels, ref_logps, rewards)
        output = linear_copg_loss(*batch, beta=0.3, cu_seqlens=cu_seqlens, cu_groups=cu_groups, bias=bias, **options)
        return output.loss + 0 * output.logps.sum()

    def composed(hidden_states, weight, labels, bias):
        token_logps = linear_logps(hidden_states, weight, labels, bias=bias, **options)
        logps = sequence_logps(token_logps, labels, cu_seqlens=cu_seqlens)
        return copg_loss(logps, ref_logps, rewards, beta=0.3, cu_groups=cu_groups)

    def any_loss(hidden_states, weight, labels, bias):
        batch = (hidden_states, weight, labels, ref_logps, rewards)
        return linear_sequence_loss(
            *batch, loss=losses.dpo_loss, beta=0.3, group_size=2, cu_seqlens=cu_seqlens, bias=bias, **options
        ).loss

    return dict(of_tokens=of_tokens, fused=fused, composed=composed, any_loss=any_loss)


@pytest.mark.parametrize("program", ["of_tokens", "fused", "composed", "any_loss"])
def test_compiled_without_a_graph_break_equals_eager(program, backend):
    function = programs(backend)[program]
    inputs = operands()
    leaves = [x for x in inputs if x.requires_grad]
    eager = function(*inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert_close_gradients(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves))


def assert_close_gradients(of_compiled, of_eager) -> None:
    for pair in zip(of_compiled, of_eager, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_inductor_equals_eager():
    """All programs in one compilation, which takes seconds. Inductor's code is around the operators, which are the same
    to it whatever they call inside."""
    functions = tuple(programs("torch").values())
    inputs = operands()
    leaves = [x for x in inputs if x.requires_grad]

    def values(*inputs):
        return [function(*inputs) for function in functions]

    eager, compiled = values(*inputs), torch.compile(values, fullgraph=True)(*inputs)
    for pair in zip(compiled, eager, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
        assert_close_gradients(*(torch.autograd.grad(value, leaves, retain_graph=True) for value in pair))


def test_compiled_code_still_refuses_values():
    function = torch.compile(
        lambda logps, ref_logps, rewards: copg_loss(logps, ref_logps, rewards, beta=0.3, group_size=2), fullgraph=True
    )
    numbers = torch.randn(3, 4)
    torch.testing.assert_close(function(*numbers), copg_loss(*numbers, beta=0.3, group_size=2))
    numbers[2, 1] = float("nan")
    with pytest.raises(RuntimeError, match="rewards must be finite"):
        function(*numbers)


def test_dynamic_number_of_tokens(backend):
    """One compilation serves batches of any length."""
    function = torch.compile(lambda x, w, y: linear_logps(x, w, y, backend=backend).sum(), fullgraph=True, dynamic=True)
    hidden_states, weight, labels, _ = operands()
    for length in (24, 17, 9):
        x, y = hidden_states[:length], labels[:length]
        torch.testing.assert_close(function(x, weight, y), linear_logps(x, weight, y, backend=backend).sum())


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
def test_traced_with_tensors_that_hold_no_numbers(tracing_mode, backend):
    """As torch.export and AOTAutograd see a program: functional, and of shapes alone."""
    inputs = operands()
    function = programs(backend)["of_tokens"]
    traced = make_fx(torch.func.functionalize(function), tracing_mode=tracing_mode)(*inputs)
    torch.testing.assert_close(traced(*inputs), function(*inputs))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@pytest.mark.parametrize("around", ["body", "body and operator"])
@pytest.mark.parametrize("program", ["of_tokens", "fused", "any_loss"])
def test_activation_checkpointing(program, around, use_reentrant, backend):
    """Same gradients, to the bit: what is run again gives the same bits."""
    inputs, loss_of = operands(), programs(backend)[program]
    mixing = torch.randn(H, H, device=DEVICE, requires_grad=True)

    def body(x):
        return (x @ mixing).tanh()

    def value(again) -> torch.Tensor:
        if around == "body":
            return loss_of(again(body, inputs[0]), *inputs[1:])
        return again(lambda x, *others: loss_of(body(x), *others), *inputs)

    leaves = [mixing, *(x for x in inputs if x is not None and x.requires_grad)]
    found = []
    for again in (lambda function, *args: function(*args), partial(checkpoint, use_reentrant=use_reentrant)):
        value(again).backward()
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["trainable", "frozen head", "sparse", "fused", "any loss"])
def test_second_derivatives_are_refused(case, backend):
    """They would be wrong without a word: what the forward pass saved counts as constant."""
    hidden_states, weight, labels, _ = operands(False)
    weight.requires_grad_(case != "frozen head")
    arguments = (hidden_states, weight, labels)
    ref_logps, rewards, cu_seqlens, _ = completions()
    batch = (*arguments, ref_logps, rewards)
    if case == "fused":
        value = linear_copg_loss(*batch, beta=0.3, group_size=2, cu_seqlens=cu_seqlens, backend=backend).loss
    elif case == "any loss":
        options = dict(loss=losses.ipo_loss, beta=0.3, group_size=2, cu_seqlens=cu_seqlens, backend=backend)
        value = linear_sequence_loss(*batch, **options).loss
    else:
        value = linear_logps(*arguments, sparse_eps=1e-3 if case == "sparse" else None, backend=backend).sum()
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(value, hidden_states, create_graph=True)
