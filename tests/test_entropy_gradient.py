"""The entropy's gradient: beside that of the log-probabilities, and as a bonus in the fused losses."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from copg_kernels import (
    linear_copg_loss,
    linear_logps,
    linear_logps_and_entropy,
    linear_sequence_loss,
    losses,
    ops,
    sequence_logps,
)
from copg_kernels.reference import copg_loss_ref, linear_entropy_ref, linear_logps_ref, sequence_logps_ref
from tests.conftest import DEVICE
from tests.numerics import assert_close, relative_error, upcast
from tests.test_work import MatmulFlops

T, H = 38, 24
# Several splits of a kernel's vocabulary; two of the twins' smallest slices.
V = {"torch": 301, "triton": 130}
FULL = dict(logit_scale=0.8, softcap=6.0, temperature=1.25)
HEADS = pytest.mark.parametrize("head", [{}, FULL], ids=["plain", "head"])
# What is trained, and which gradients a frozen head expects.
TRAINED = {
    "all": (("hidden_states", "lm_head_weight", "bias"), "both"),
    "weight": (("lm_head_weight",), "logps"),
    "bias": (("bias",), "both"),
    "frozen, both": (("hidden_states",), "both"),
    "frozen, logps": (("hidden_states",), "logps"),
    "frozen, entropy": (("hidden_states",), "entropy"),
}
# Interpreted kernels take a hundred times as long: of each way they have, one.
FEW = [("all", "both"), ("all", "entropy"), ("frozen, logps", "both"), ("frozen, logps", "logps")]
FEW += [("frozen, entropy", "entropy")]
ARRIVES = {"both": (1.0, 1.0), "logps": (1.0, None), "entropy": (None, 1.0)}


def operands(backend: str, dtype: torch.dtype = torch.float32, trained: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every fifth row is ignored, every third sure of its label."""
    weight = 2 * torch.randn(V[backend], H, device=DEVICE) / H**0.5
    labels = torch.randint(V[backend], (T,), device=DEVICE)
    hidden_states = torch.randn(T, H, device=DEVICE)
    hidden_states[::3] += 3 * weight[labels[::3]]
    labels[::5] = -100
    floats = dict(hidden_states=hidden_states, lm_head_weight=weight, bias=torch.randn(V[backend], device=DEVICE))
    return {n: x.to(dtype).requires_grad_(n in trained) for n, x in floats.items()} | dict(labels=labels)


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor], arrives: str) -> dict[str, Tensor]:
    """By the trained operands, of fixed upstream gradients of (log-probs, entropy)."""
    upstream = torch.linspace(-1.0, 1.0, T, dtype=outputs[0].dtype, device=DEVICE)
    upstream = torch.stack([upstream, upstream.flip(0).square()])
    upstream[:, 4] = 0.0
    wanted = zip(outputs, upstream, ARRIVES[arrives], strict=True)
    value = sum((output * weights).sum() for output, weights, arrived in wanted if arrived)
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def references(inputs: dict[str, Tensor], dtype: torch.dtype, arrives: str, **head: float) -> dict[str, Tensor]:
    wide = upcast(inputs, dtype)
    return gradients((linear_logps_ref(**wide, **head), linear_entropy_ref(**wide, **head)), wide, arrives)


@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients(dtype, head, backend):
    for name, arrives in product(TRAINED, ARRIVES) if backend == "torch" else FEW:
        trained, expected = TRAINED[name]
        inputs = operands(backend, dtype, trained)
        outputs = linear_logps_and_entropy(**inputs, **head, expected_gradients=expected, backend=backend)
        actual = gradients(outputs, inputs, arrives)
        gold, base = (references(inputs, wide, arrives, **head) for wide in (torch.float64, torch.float32))
        for name, gradient in actual.items():
            assert gradient.dtype == dtype
            assert_close(f"{name}, {arrives} of {trained}", gradient, base[name], gold[name], few_terms=True)


def test_gradcheck():
    """In float64, by differences; both outputs at once."""
    for trained, expected in TRAINED.values():
        inputs = operands("torch", torch.float64, trained)
        small = {n: x[:8].detach() if n in ("hidden_states", "labels") else x.detach() for n, x in inputs.items()}
        leaves = [small[name].requires_grad_() for name in trained]

        def both(*values, small=small, trained=trained, expected=expected):
            changed = small | dict(zip(trained, values, strict=True))
            return linear_logps_and_entropy(**changed, **FULL, expected_gradients=expected)

        torch.autograd.gradcheck(both, leaves, fast_mode=True)


def test_confident_rows(backend):
    """An entropy of 1e-5 has a gradient of 1e-4, which a rounded probability minus one would drown."""
    inputs = operands(backend, trained=("hidden_states",))
    del inputs["bias"]
    with torch.no_grad():
        rows = inputs["labels"].clamp(min=0)
        length = torch.linspace(4.0, 9.0, T, device=DEVICE).unsqueeze(1)
        inputs["hidden_states"][:] = length * inputs["lm_head_weight"][rows]
    for expected in ("both", "entropy"):
        entropy = linear_logps_and_entropy(**inputs, expected_gradients=expected, backend=backend)[1]
        wide = upcast(inputs, torch.float64)
        gold = torch.autograd.grad(linear_entropy_ref(**wide).sum(), wide["hidden_states"])[0]
        actual = torch.autograd.grad(entropy.sum(), inputs["hidden_states"])[0]
        sure = (entropy > 1e-7) & (entropy < 1e-3)
        assert sure.sum() > 3
        for row in sure.nonzero().squeeze(1).tolist():
            assert relative_error(actual[row], gold[row]) < 2e-3


@pytest.mark.parametrize("expected", ["both", "entropy"])
def test_logits_of_a_thousand(expected, backend):
    """What rounding leaves of a log-sum-exp there, 3e-5, is no part of log p. These logits are not rounded."""
    inputs = operands(backend, trained=("hidden_states",))
    with torch.no_grad():
        for name, steps in (("hidden_states", 2), ("lm_head_weight", 8), ("bias", 1)):
            inputs[name].mul_(steps).round_().div_(steps)
        inputs["bias"] += 1000
    entropy = linear_logps_and_entropy(**inputs, expected_gradients=expected, backend=backend)[1]
    (actual,) = torch.autograd.grad(entropy.sum(), inputs["hidden_states"])
    wide = upcast(inputs, torch.float64)
    (gold,) = torch.autograd.grad(linear_entropy_ref(**wide).sum(), wide["hidden_states"])
    assert relative_error(actual, gold) < 3e-6


@pytest.mark.parametrize("expected", ["both", "entropy"])
def test_entries_of_probability_zero(expected, backend):
    """A bias that masks half of the vocabulary, a label among it: as if that half were not there."""
    inputs = operands(
        backend, trained=("hidden_states", "lm_head_weight") if expected == "both" else ("hidden_states",)
    )
    half = V[backend] // 2
    inputs["labels"] = inputs["labels"].where(inputs["labels"] < half, 3)
    inputs["bias"] = inputs["bias"].detach().clone()
    inputs["bias"][half:] = float("-inf")
    left = upcast(inputs, torch.float64)
    left |= dict(lm_head_weight=left["lm_head_weight"][:half], bias=left["bias"][:half])
    gold = torch.autograd.grad(linear_entropy_ref(**left).sum(), left["hidden_states"])[0]
    inputs["labels"][1] = V[backend] - 1
    entropy = linear_logps_and_entropy(**inputs, expected_gradients=expected, backend=backend)[1]
    leaves = [x for x in inputs.values() if x.requires_grad]
    actual, *of_weight = torch.autograd.grad(entropy.sum(), leaves)
    assert relative_error(actual, gold) < 1e-5
    assert all((gradient[half:] == 0).all() and gradient.isfinite().all() for gradient in of_weight)


def test_what_reaches_an_ignored_token_goes_no_further(backend):
    for name in TRAINED if backend == "torch" else ("all", "frozen, entropy"):
        trained, expected = TRAINED[name]
        inputs = operands(backend, trained=trained)
        logps, entropy = linear_logps_and_entropy(**inputs, expected_gradients=expected, backend=backend)
        upstream = torch.ones(2, T, device=DEVICE)
        upstream[:, ::5] = float("nan")
        leaves = [inputs[name] for name in trained]
        for gradient in torch.autograd.grad((logps, entropy), leaves, tuple(upstream)):
            assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("scale", [1e-9, 1e5])
def test_small_and_large_gradients_in_float16(scale, backend):
    """Such as a loss scale makes of them, and a mean over many tokens."""
    inputs = operands(backend, torch.float16, ("lm_head_weight",))
    outputs = linear_logps_and_entropy(**inputs, backend=backend)
    upstream = (torch.ones(T, device=DEVICE), -torch.ones(T, device=DEVICE))
    (exact,) = torch.autograd.grad(outputs, inputs["lm_head_weight"], upstream, retain_graph=True)
    (scaled,) = torch.autograd.grad(outputs, inputs["lm_head_weight"], tuple(scale * x for x in upstream))
    expected = (exact.double() * scale).half()
    if scale < 1:
        assert (scaled - expected).abs().max() <= 2 * torch.finfo(torch.float16).smallest_normal / 1024
    else:
        finite = expected.isfinite() & scaled.isfinite()
        assert relative_error(scaled[finite], expected[finite]) < 2e-3


def test_a_second_backward_pass_and_equal_bits(backend):
    for name in TRAINED if backend == "torch" else ("all", "frozen, entropy"):
        trained, expected = TRAINED[name]
        inputs = operands(backend, trained=trained)
        leaves = [inputs[name] for name in trained]
        several = []
        for _ in range(2):
            value = torch.cat(linear_logps_and_entropy(**inputs, expected_gradients=expected, backend=backend)).sum()
            several += [torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2)]
        assert all(torch.equal(*pair) for found in several[1:] for pair in zip(found, several[0], strict=True))
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(value, leaves, create_graph=True)


def test_under_compile(backend):
    for name in ("all", "frozen, both", "frozen, logps") if backend == "torch" else ("all",):
        trained, expected = TRAINED[name]
        inputs = operands(backend, trained=trained)
        function = partial(linear_logps_and_entropy, expected_gradients=expected, backend=backend)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for arrives in ARRIVES:
            pair = (gradients(f(**inputs), inputs, arrives) for f in (compiled, function))
            for actual, gradient in zip(*(found.values() for found in pair), strict=True):
                torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-7)


def test_edges(backend):
    for trained, expected in TRAINED.values():
        inputs = operands(backend, trained=trained)
        ignored = inputs | dict(labels=torch.full((T,), -100, device=DEVICE))
        values = torch.cat(linear_logps_and_entropy(**ignored, expected_gradients=expected, backend=backend))
        assert all((x == 0).all() for x in torch.autograd.grad(values.sum(), [inputs[name] for name in trained]))
        empty = inputs | dict(hidden_states=inputs["hidden_states"][:0], labels=inputs["labels"][:0])
        values = torch.cat(linear_logps_and_entropy(**empty, expected_gradients=expected, backend=backend))
        assert all((x == 0).all() for x in torch.autograd.grad(values.sum(), [inputs[name] for name in trained]))
    with pytest.raises(ValueError, match='expected_gradients must be "logps", "entropy" or "both", got \'all\''):
        linear_logps_and_entropy(**inputs, expected_gradients="all")


# Units of work


OPERATORS = {op._qualname: op for op in vars(ops).values() if isinstance(op, torch._library.custom_ops.CustomOpDef)}


class EveryFlop(MatmulFlops):
    """Sees into our own operators, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = OPERATORS.get(func._schema.name)
        if operator is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return operator._init_fn(*args, **(kwargs or {}))


def units(function, inputs: dict[str, Tensor], arrives: str) -> float:
    """Head GEMMs of forward and backward pass, in units of 2 T V H."""
    with EveryFlop() as counter:
        gradients(function(**inputs), inputs, arrives)
    num_rows = (inputs["labels"] != -100).sum().item()
    return counter.flops / (2 * num_rows * V["torch"] * H)


@pytest.mark.parametrize(
    ("trained", "arrives", "expected"),
    [
        (("hidden_states", "lm_head_weight"), "both", 4),
        (("hidden_states", "lm_head_weight"), "logps", 4),
        (("hidden_states", "lm_head_weight"), "entropy", 4),
        (("lm_head_weight",), "both", 3),
    ],
)
def test_units_of_a_trainable_head(trained, arrives, expected):
    inputs = operands("torch", trained=trained)
    del inputs["bias"]
    assert units(partial(linear_logps_and_entropy, backend="torch"), inputs, arrives) == expected


@pytest.mark.parametrize(
    ("expected_gradients", "by_what_arrives"),
    [
        ("both", dict(both=3, logps=3, entropy=3)),
        ("logps", dict(both=4, logps=2, entropy=4)),
        ("entropy", dict(both=4, logps=4, entropy=2)),
    ],
)
def test_units_of_a_frozen_head(expected_gradients, by_what_arrives):
    inputs = operands("torch", trained=("hidden_states",))
    del inputs["bias"]
    function = partial(linear_logps_and_entropy, expected_gradients=expected_gradients, backend="torch")
    assert {arrives: units(function, inputs, arrives) for arrives in ARRIVES} == by_what_arrives


# As a bonus in the fused losses

N, L, COEF = 8, 5, 0.7


def square_of_the_mean(logps, ref_logps, rewards, *, beta, group_size):
    return logps.mean() ** 2


FUSED = {
    "copg": (linear_copg_loss, copg_loss_ref),
    "any loss": (partial(linear_sequence_loss, loss=losses.rebel_loss), losses.rebel_loss),
    "not over groups": (partial(linear_sequence_loss, loss=square_of_the_mean), square_of_the_mean),
}
# (whether the workspace holds all tokens, group_size)
SCHEDULES = {"one chunk": (True, 2), "chunks": (False, 2), "group beyond the workspace": (False, 8)}


def workspace_of(holds_all: bool, backend: str) -> int:
    """For more than all of the 40 tokens, or for 32 of them and a few more."""
    return 2**20 if holds_all else {"torch": 45_000, "triton": 27_000}[backend]


def batch(backend: str, dtype: torch.dtype = torch.float32, trained: tuple[str, ...] = ()) -> dict[str, Tensor]:
    inputs = operands(backend, dtype)
    labels = torch.randint(V[backend], (N, L), device=DEVICE)
    labels[::3, 3:] = -100
    hidden_states = torch.randn(N, L, H, device=DEVICE)
    hidden_states[:, 0] += 2 * inputs["lm_head_weight"].float()[labels[:, 0]]
    inputs |= dict(hidden_states=hidden_states.to(dtype), labels=labels)
    floats = dict(ref_logps=-20 * torch.rand(N, device=DEVICE), rewards=torch.randn(N, device=DEVICE))
    return {name: x.requires_grad_(name in trained) for name, x in inputs.items()} | floats


def with_bonus(loss, inputs: dict, *, average: bool = False, **options) -> Tensor:
    """The loss minus the bonus, in plain PyTorch."""
    inputs, head = dict(inputs), {n: options.pop(n) for n in FULL if n in options}
    per_completion = (inputs.pop("ref_logps"), inputs.pop("rewards"))
    logps = sequence_logps_ref(linear_logps_ref(**inputs, **head), inputs["labels"], average=average)
    entropy = linear_entropy_ref(**inputs, **head).sum() / (inputs["labels"] != -100).sum()
    return loss(logps, *per_completion, **options) - COEF * entropy


@pytest.mark.parametrize(
    ("loss", "trained", "schedule", "units"),
    [
        ("copg", ("hidden_states", "lm_head_weight", "bias"), "one chunk", 3),
        ("copg", ("hidden_states", "lm_head_weight"), "chunks", 3),
        ("copg", ("hidden_states", "lm_head_weight", "bias"), "group beyond the workspace", 4),
        ("copg", ("hidden_states",), "chunks", 2),
        ("copg", ("hidden_states",), "group beyond the workspace", 3),
        ("copg", (), "chunks", 1),
        ("any loss", ("hidden_states", "lm_head_weight", "bias"), "chunks", 3),
        ("any loss", ("hidden_states", "lm_head_weight"), "group beyond the workspace", 4),
        ("any loss", ("hidden_states",), "one chunk", 2),
        ("any loss", (), "chunks", 1),
        ("not over groups", ("hidden_states", "lm_head_weight"), "chunks", 4),
        ("not over groups", ("hidden_states",), "chunks", 3),
    ],
)
@HEADS
def test_bonus(loss, trained, schedule, units, head, backend):
    """In every schedule: loss and gradients of the reference, and the units that were promised."""
    holds_all, group_size = SCHEDULES[schedule]
    fused, reference = FUSED[loss]
    inputs = batch(backend, trained=trained)
    options = dict(beta=0.3, group_size=group_size, **head)
    memory = dict(workspace_bytes=workspace_of(holds_all, backend), backend=backend)
    output = fused(**inputs, **options, **memory, entropy_coef=COEF)
    assert output.gemm_units == units and output.entropy is None and not output.mean_entropy.requires_grad
    wide, narrow = upcast(inputs, torch.float64), upcast(inputs, torch.float32)
    gold, base = (with_bonus(reference, values, **options) for values in (wide, narrow))
    torch.testing.assert_close(output.loss.double(), gold, rtol=1e-5, atol=1e-6)
    plain = fused(**inputs, **options, **memory).loss
    torch.testing.assert_close(output.loss + COEF * output.mean_entropy, plain, rtol=1e-6, atol=1e-6)
    for name in trained:
        pairs = ((output.loss, inputs), (base, narrow), (gold, wide))
        actual = (torch.autograd.grad(value, values[name], retain_graph=True)[0] for value, values in pairs)
        assert_close(name, *actual, few_terms=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bonus_in_16_bits(dtype, backend):
    trained = ("hidden_states", "lm_head_weight", "bias")
    inputs = batch(backend, dtype, trained)
    options = dict(beta=0.3, group_size=2, average_logps=True, **FULL)
    loss = linear_copg_loss(**inputs, **options, backend=backend, entropy_coef=COEF, return_entropy=True).loss
    wide, narrow = upcast(inputs, torch.float64), upcast(inputs, torch.float32)
    options["average"] = options.pop("average_logps")
    gold, base = (with_bonus(copg_loss_ref, values, **options) for values in (wide, narrow))
    for name in trained:
        pairs = ((loss, inputs), (base, narrow), (gold, wide))
        actual = (torch.autograd.grad(value, values[name], retain_graph=True)[0] for value, values in pairs)
        assert_close(name, *actual, few_terms=True)


def test_bonus_where_the_reference_is_far(backend):
    """At a low temperature kernels compute some blocks of rows once more, and the entropy's part of them with it."""
    inputs = batch(backend, trained=("hidden_states", "lm_head_weight"))
    inputs["bias"][:64] -= 100  # the reference is the largest logit of these
    options = dict(beta=0.3, group_size=2, temperature=0.5)
    loss = linear_copg_loss(**inputs, **options, entropy_coef=COEF, backend=backend).loss
    wide, narrow = upcast(inputs, torch.float64), upcast(inputs, torch.float32)
    gold, base = (with_bonus(copg_loss_ref, values, **options) for values in (wide, narrow))
    for name in ("hidden_states", "lm_head_weight"):
        pairs = ((loss, inputs), (base, narrow), (gold, wide))
        actual = (torch.autograd.grad(value, values[name], retain_graph=True)[0] for value, values in pairs)
        assert_close(name, *actual, few_terms=True)


def test_bonus_of_packed_completions_equals_the_parts(backend):
    """The sum of what is public: log-probs and entropy, a loss on sequences, the mean."""
    inputs = batch(backend, trained=("hidden_states", "lm_head_weight"))
    packed = dict(hidden_states=inputs["hidden_states"].view(-1, H), labels=inputs["labels"].view(-1))
    cu_seqlens = torch.tensor([0, 4, 6, 13, 17, 24, 30, 31, 40], dtype=torch.int32, device=DEVICE)
    options = dict(beta=0.3, group_size=2)
    output = linear_copg_loss(
        **inputs | packed, **options, cu_seqlens=cu_seqlens, entropy_coef=-COEF, return_entropy=True, backend=backend
    )
    operands = {name: x for name, x in (inputs | packed).items() if name not in ("ref_logps", "rewards")}
    per_token_logps, entropy = linear_logps_and_entropy(**operands, backend=backend)
    logps = sequence_logps(per_token_logps, packed["labels"], cu_seqlens=cu_seqlens)
    counted = packed["labels"] != -100
    parts = losses.rebel_loss(logps, inputs["ref_logps"], inputs["rewards"], **options) * 0.3 / 4
    parts = parts + COEF * entropy[counted].mean()
    torch.testing.assert_close(output.loss, parts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.mean_entropy, entropy[counted].mean())
    torch.testing.assert_close(output.entropy, entropy.detach())
    leaves = [inputs["hidden_states"], inputs["lm_head_weight"]]
    for pair in zip(torch.autograd.grad(output.loss, leaves), torch.autograd.grad(parts, leaves), strict=True):
        assert relative_error(*pair) < 1e-5


@pytest.mark.parametrize("loss", ["copg", "any loss"])
def test_bonus_is_a_number_and_of_an_exact_softmax(loss):
    fused = partial(FUSED[loss][0], **batch("torch"), beta=0.3, group_size=2)
    for wrong in ("0.1", float("nan"), float("inf"), True, None):
        with pytest.raises(ValueError, match="entropy_coef must be a finite number, got"):
            fused(entropy_coef=wrong)
    with pytest.raises(ValueError, match=r"entropy_coef needs sparse_eps = None, got 0\.001"):
        fused(entropy_coef=0.1, sparse_eps=1e-3)


@pytest.mark.parametrize("loss", ["copg", "any loss"])
def test_bonus_under_compile(loss, backend):
    inputs = batch(backend, trained=("hidden_states", "lm_head_weight"))
    function = partial(FUSED[loss][0], **inputs, beta=0.3, group_size=2, entropy_coef=COEF, backend=backend)
    compiled = torch.compile(lambda: function().loss, fullgraph=True, backend="aot_eager")
    leaves = [inputs["hidden_states"], inputs["lm_head_weight"]]
    pairs = (torch.autograd.grad(value, leaves) for value in (compiled(), function().loss))
    assert all(relative_error(*pair) < 1e-5 for pair in zip(*pairs, strict=True))


def test_no_bonus_changes_no_bit(backend):
    inputs = batch(backend, trained=("hidden_states", "lm_head_weight"))
    leaves = [inputs["hidden_states"], inputs["lm_head_weight"]]
    values = [linear_copg_loss(**inputs, beta=0.3, group_size=2, backend=backend, **options).loss
              for options in ({}, dict(entropy_coef=0), dict(entropy_coef=0.0, return_entropy=True))]  # fmt: skip
    found = [(value, *torch.autograd.grad(value, leaves)) for value in values]
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(other, found[0], strict=True))
    operands = {name: x for name, x in inputs.items() if name not in ("ref_logps", "rewards")}
    both = linear_logps(**operands, backend=backend), linear_logps_and_entropy(**operands, backend=backend)[0]
    assert torch.equal(*both)
