"""The compact softmax of the torch backend: what it keeps, what its gradients are off by, and when they are exact.

That of the kernels is another algorithm, in test_sparse_kernels.py.
"""

import pytest
import torch

from bench.inputs import Shape, make_inputs
from copg_kernels import CoPGLoss, copg_loss, linear_copg_loss, linear_logps, linear_sequence_loss
from copg_kernels.kernels import exp_tile, significant_columns
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.significant_columns import significant_columns_torch
from copg_kernels.reference import linear_copg_loss_ref, linear_logps_bwd_ref, linear_logps_ref
from copg_kernels.schedules import sparse_softmax, workspace
from copg_kernels.schedules.recompute import Needs
from tests.conftest import DEVICE
from tests.numerics import relative_error, upcast
from tests.test_work import MatmulFlops

T, V, H = 300, 4096, 64
EPS = 2.0**-14


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Four slices of the vocabulary instead of two; and blocks may keep all of it unless a test says otherwise."""
    for module in (exp_tile, workspace, significant_columns):
        monkeypatch.setattr(module, "SPLIT_TORCH", 1100)
    monkeypatch.setattr(significant_columns, "MOST_KEPT", 1.0)
    monkeypatch.setattr(significant_columns, "_HOPELESS", 2.0)


def operands(regime: str = "rl", dtype: torch.dtype = torch.float32) -> tuple:
    """Hidden states, head and labels, with every seventh token ignored."""
    inputs = make_inputs(Shape("", V, H, T, T // 2), regime, dtype, DEVICE)
    labels = inputs.labels.clone()
    labels[::7] = -100
    return inputs.hidden_states.detach().requires_grad_(), inputs.lm_head_weight.detach().requires_grad_(), labels


def compact_of(hidden_states, weight, labels, eps: float = EPS, **options):
    counted = labels != -100
    head = Head(weight.detach(), options.get("bias"), 1.0, options.get("softcap"), options.get("temperature", 1.0))
    return significant_columns_torch(hidden_states.detach()[counted], head, labels[counted], eps, 2**20)[1]


def dense(compact) -> torch.Tensor:
    """The kept entries, (counted rows, V)."""
    kept = torch.zeros(compact.dropped.numel(), V, device=DEVICE)
    for rows, columns, values in compact.blocks():
        kept[rows, columns] = values
    return kept


def softmax_of(hidden_states, weight, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """The counted rows' probabilities in float64, 0 at the label; and the label's."""
    counted = labels != -100
    p = (hidden_states[counted].double() @ weight.double().T).softmax(1)
    rows = torch.arange(len(p), device=DEVICE)
    at_label = p[rows, labels[counted]].clone()
    p[rows, labels[counted]] = 0
    return p.detach(), at_label.detach()


@pytest.mark.parametrize("regime", ["rl", "base", "flat"])
def test_what_is_kept(regime):
    inputs = operands(regime)
    compact, (p, at_label) = compact_of(*inputs, eps=2.0**-10), softmax_of(*inputs)
    kept = dense(compact).double()
    is_kept = torch.zeros_like(p, dtype=torch.bool)
    for rows, columns, _ in compact.blocks():
        is_kept[rows, columns] = True
    assert not is_kept.all()
    assert (p[~is_kept] < 2.0**-10).all()
    torch.testing.assert_close(kept, p.where(is_kept, 0.0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(compact.dropped.double(), p.where(~is_kept, 0.0).sum(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(compact.label_values.double(), at_label - 1, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("regime", ["rl", "tuned", "base"])
@pytest.mark.parametrize("eps", [2.0**-8, 2.0**-12])
def test_the_bound_of_the_docstring(regime, eps):
    """||p - kept||_2 <= sqrt(eps * dropped mass) in every row, before the correction."""
    inputs = operands(regime)
    compact, (p, _) = compact_of(*inputs, eps=eps), softmax_of(*inputs)
    error = (p - dense(compact)).norm(dim=1)
    assert error.max() > 1e-6
    assert (error <= (eps * compact.dropped.double()).sqrt() * (1 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize("regime", ["rl", "base"])
def test_rows_sum_to_zero_with_the_correction(regime):
    compact = compact_of(*operands(regime), eps=2.0**-8)
    tail = compact.tail
    assert abs(tail.sum() - 1) < 1e-5 and (tail >= 0).all() and compact.dropped.max() > 1e-3
    sums = dense(compact).sum(1) + compact.dropped + compact.label_values
    assert sums.abs().max() < 1e-5


def errors(inputs, dlogps, **options) -> tuple[float, ...]:
    """Relative errors of the gradients against float64."""
    logps = linear_logps(*inputs, backend="torch", **options)
    gradients = torch.autograd.grad(logps, inputs[:2], dlogps)
    options.pop("sparse_eps")
    hidden_states, weight, labels = inputs
    bias = options.pop("bias", None)
    wide = (dlogps.double(), hidden_states.detach().double(), weight.detach().double(), labels)
    gold = linear_logps_bwd_ref(*wide, bias=None if bias is None else bias.double(), **options)
    return tuple(relative_error(*pair) for pair in zip(gradients, gold, strict=False))


@pytest.mark.parametrize("regime", ["rl", "tuned", "base"])
def test_errors_at_the_recommended_eps(regime):
    """A vocabulary of 4,096 keeps more than the models' 128 thousand, and so is off by less than 3e-3."""
    assert all(error < 3e-3 for error in errors(operands(regime), torch.randn(T, device=DEVICE), sparse_eps=EPS))


def test_the_correction_helps(monkeypatch):
    inputs, dlogps = operands("base"), torch.rand(T, device=DEVICE)
    corrected = errors(inputs, dlogps, sparse_eps=2.0**-8)
    original = significant_columns._joined
    monkeypatch.setattr(
        significant_columns, "_joined", lambda parts: (c := original(parts))._replace(dropped=0 * c.dropped)
    )
    uncorrected = errors(inputs, dlogps, sparse_eps=2.0**-8)
    assert corrected[0] < 0.6 * uncorrected[0]
    assert corrected[1] < uncorrected[1]


def test_rare_tokens_receive_gradient():
    """No row of dW is zero, though most columns are significant nowhere."""
    inputs = operands("rl")
    compact = compact_of(*inputs, eps=2.0**-6)
    assert compact.columns.unique().numel() < V // 2
    logps = linear_logps(*inputs, backend="torch", sparse_eps=2.0**-6)
    (dweight,) = torch.autograd.grad(logps.sum(), inputs[1])
    assert (dweight.norm(dim=1) > 0).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_keeping_everything_is_exact(dtype):
    """eps so small that nothing is dropped: bias, cap, scale and temperature included."""
    inputs = operands("base", dtype)
    bias = torch.randn(V, device=DEVICE).to(dtype).requires_grad_()
    options = dict(bias=bias, logit_scale=0.8, softcap=9.0, temperature=1.25, backend="torch")
    sparse, exact = linear_logps(*inputs, sparse_eps=1e-12, **options), linear_logps(*inputs, **options)
    assert torch.equal(sparse, exact) and sparse.sparsity.density > 0.9
    dlogps = torch.randn(T, device=DEVICE)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(
        torch.autograd.grad(sparse, (*inputs[:2], bias), dlogps),
        torch.autograd.grad(exact, (*inputs[:2], bias), dlogps),
        strict=True,
    ):
        assert a.dtype == dtype and relative_error(a, b) < tolerance


@pytest.mark.parametrize("options", [dict(softcap=9.0), dict(temperature=0.7), dict(logit_scale=0.5), dict(bias=True)])
def test_head_options(options):
    inputs = operands("base")
    if "bias" in options:
        options = dict(bias=torch.randn(V, device=DEVICE))
    assert max(errors(inputs, torch.randn(T, device=DEVICE), sparse_eps=EPS, **options)) < 3e-3


def test_the_cap_is_in_what_is_dropped():
    """With a cap the entries times its derivative are compact; their dropped mass is again all that is missing."""
    inputs = operands("base")
    compact = compact_of(*inputs, eps=2.0**-9, softcap=9.0)
    counted = inputs[2] != -100
    logits = inputs[0].detach()[counted].double() @ inputs[1].detach().double().T
    capped = 9.0 * torch.tanh(logits / 9.0)
    p = capped.softmax(1) * (1 - (capped / 9.0) ** 2)
    rows = torch.arange(len(p), device=DEVICE)
    p[rows, inputs[2][counted]] = 0
    missing = p.sum(1) - dense(compact).double().sum(1)
    assert missing.max() > 1e-3
    torch.testing.assert_close(compact.dropped.double(), missing, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("most_kept", [0.0, 0.7], ids=["all rows", "some rows"])
def test_overflow_is_exact(most_kept, monkeypatch):
    """Confident tokens first, flat ones behind: blocks of the latter keep too much."""
    hidden_states, weight, labels = operands("rl")
    with torch.no_grad():
        hidden_states[150:] *= 0.1
    monkeypatch.setattr(significant_columns, "MOST_KEPT", most_kept)
    sparse, exact = (linear_logps(hidden_states, weight, labels, backend="torch", sparse_eps=e) for e in (EPS, None))
    share = sparse.sparsity.overflow.item()
    assert share == 1.0 if most_kept == 0.0 else 0.2 < share < 0.8
    dlogps = torch.randn(T, device=DEVICE)
    dlogps[150:] *= 30  # what is exact weighs most
    pairs = zip(
        *(torch.autograd.grad(logps, (hidden_states, weight), dlogps) for logps in (sparse, exact)), strict=True
    )
    assert all(relative_error(*pair) < (1e-5 if most_kept == 0.0 else 1e-3) for pair in pairs)


def test_hopeless_blocks_are_given_up_early(monkeypatch):
    """Of a flat softmax everything is significant: an eighth of the vocabulary in, no more columns are collected."""
    monkeypatch.setattr(significant_columns, "_HOPELESS", 0.98)
    inputs = operands("flat")
    collected = []
    original = significant_columns._significant

    def counting(*args):
        result = original(*args)
        collected.append(sum(columns.numel() for columns in result[1]))
        return result

    monkeypatch.setattr(significant_columns, "_significant", counting)
    logps = linear_logps(*inputs, backend="torch", sparse_eps=2.0**-20)
    assert logps.sparsity.overflow == 1 and collected[0] > 0 and collected[1:] == [0, 0, 0]
    compact = linear_logps(*operands("rl"), backend="torch", sparse_eps=2.0**-8)
    assert compact.sparsity.overflow == 0


def batch_of(inputs, lengths) -> dict:
    hidden_states, weight, labels = inputs
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    numbers = torch.randn(2, len(lengths), device=DEVICE)
    batch = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels, cu_seqlens=cu_seqlens)
    return batch | dict(ref_logps=numbers[0], rewards=numbers[1])


@pytest.mark.parametrize("average_logps", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("groups", [dict(group_size=2), dict(cu_groups=[0, 2, 6])], ids=["equal", "ragged"])
def test_fused_losses(groups, average_logps):
    """Ragged completions that share blocks of 128 rows, in groups of any size."""
    batch = batch_of(operands("rl"), [10, 90, 33, 57, 70, 40])
    if "cu_groups" in groups:
        groups = dict(cu_groups=torch.tensor(groups["cu_groups"], dtype=torch.int32, device=DEVICE))
    options = dict(beta=0.1, average_logps=average_logps, **groups)
    output = linear_copg_loss(**batch, sparse_eps=EPS, backend="torch", **options)
    other = linear_sequence_loss(**batch, loss=copg_loss, sparse_eps=EPS, backend="torch", **options)
    exact = linear_copg_loss(**batch, backend="torch", **options)
    assert torch.equal(output.logps, exact.logps) and torch.equal(output.loss, exact.loss)
    assert output.gemm_units == other.gemm_units == 1 and exact.sparsity is None
    assert 0 < output.sparsity.density < 1 and output.sparsity.overflow == 0 and 0 < output.sparsity.dropped < 0.1
    inputs = (batch["hidden_states"], batch["lm_head_weight"])
    wide = upcast(batch, torch.float64)
    gold = torch.autograd.grad(linear_copg_loss_ref(**wide, **options), (wide["hidden_states"], wide["lm_head_weight"]))
    for loss in (output.loss, other.loss):
        gradients = torch.autograd.grad(loss, inputs)
        assert all(relative_error(*pair) < 3e-3 for pair in zip(gradients, gold, strict=True))


def test_nothing_compact_takes_the_exact_schedule(monkeypatch):
    monkeypatch.setattr(significant_columns, "MOST_KEPT", 0.3)
    batch = batch_of(operands("flat"), [75] * 4)
    sparse, exact = (
        linear_copg_loss(**batch, beta=0.1, group_size=2, backend="torch", sparse_eps=e) for e in (EPS, None)
    )
    assert sparse.gemm_units == exact.gemm_units == 3 and sparse.sparsity.overflow == 1
    inputs = (batch["hidden_states"], batch["lm_head_weight"])
    pairs = zip(*(torch.autograd.grad(output.loss, inputs) for output in (sparse, exact)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_late_overflow_costs_an_eighth_of_the_logits(monkeypatch):
    """Blocks that keep a little too much show it only at the end of the vocabulary: one in eight is let run there."""
    inputs = make_inputs(Shape("", V, H, 1024, 128), "rl", torch.float32, DEVICE)
    inputs.hidden_states.detach().mul_(0.3)
    batch = dict(zip(("hidden_states", "lm_head_weight", "labels", "ref_logps", "rewards"), inputs[:5], strict=True))
    options = dict(beta=0.1, group_size=2, cu_seqlens=inputs.cu_seqlens, backend="torch")
    density = linear_copg_loss(**batch, **options, sparse_eps=EPS).sparsity.density.item()
    monkeypatch.setattr(significant_columns, "MOST_KEPT", 0.9 * density)
    computed = []
    original = significant_columns.exp_tile_torch

    def counting(hidden_states, head, labels, start, stop, out):
        computed.append(out.numel())
        return original(hidden_states, head, labels, start, stop, out)

    monkeypatch.setattr(significant_columns, "exp_tile_torch", counting)
    output = linear_copg_loss(**batch, **options, sparse_eps=EPS)
    assert output.sparsity.overflow == 1 and output.gemm_units == 3
    assert sum(computed) == 1024 // 8 * V


def test_padded_and_packed_agree():
    hidden_states, weight, labels = operands("rl")
    packed = batch_of((hidden_states, weight, labels), [75] * 4)
    padded = dict(packed, cu_seqlens=None, labels=labels.view(4, 75))
    padded["hidden_states"] = hidden_states.detach().view(4, 75, H).requires_grad_()
    grads = [
        torch.autograd.grad(
            linear_copg_loss(**batch, beta=0.1, group_size=2, sparse_eps=EPS, backend="torch").loss,
            batch["hidden_states"],
        )[0]
        for batch in (packed, padded)
    ]
    assert torch.equal(grads[0], grads[1].flatten(0, 1))
    module = CoPGLoss(beta=0.1, group_size=2, sparse_eps=EPS, backend="torch")
    args = (weight, padded["hidden_states"], padded["labels"], padded["ref_logps"], padded["rewards"])
    assert torch.equal(torch.autograd.grad(module(*args).loss, padded["hidden_states"])[0], grads[1])


def test_determinism_and_backward_twice():
    inputs, dlogps = operands("base"), torch.randn(T, device=DEVICE)
    logps = linear_logps(*inputs, backend="torch", sparse_eps=EPS)
    first = torch.autograd.grad(logps, inputs[:2], dlogps, retain_graph=True)
    second = torch.autograd.grad(logps, inputs[:2], dlogps)
    third = torch.autograd.grad(linear_logps(*inputs, backend="torch", sparse_eps=EPS), inputs[:2], dlogps)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_only_the_gradient_that_is_wanted():
    hidden_states, weight, labels = operands()
    for x in (hidden_states, weight):
        for y in (hidden_states, weight):
            y.requires_grad_(y is x)
        linear_logps(hidden_states, weight, labels, backend="torch", sparse_eps=EPS).sum().backward()
        assert [y.grad is not None for y in (hidden_states, weight)] == [y is x for y in (hidden_states, weight)]
        x.grad = None
    with torch.no_grad():
        assert not hasattr(linear_logps(hidden_states, weight, labels, backend="torch", sparse_eps=EPS), "sparsity")


def test_nothing_counted():
    hidden_states, weight, labels = operands()
    logps = linear_logps(hidden_states, weight, torch.full_like(labels, -100), backend="torch", sparse_eps=EPS)
    gradients = torch.autograd.grad(logps.sum(), (hidden_states, weight))
    assert (logps == 0).all() and all((gradient == 0).all() for gradient in gradients)


def test_units_of_work():
    """Confident tokens of a larger vocabulary: forward and backward take little more than one GEMM."""
    inputs = make_inputs(Shape("", 32768, H, 256, 128), "rl", torch.float32, DEVICE)
    hidden_states, weight = inputs.hidden_states.detach(), inputs.lm_head_weight.detach()
    head, needs = Head(weight, None, 1.0, None, 1.0), Needs(True, True, False)
    options = dict(ignore_index=-100, workspace_bytes=2**24, backend="torch")
    operands = (hidden_states, head, inputs.labels)
    with MatmulFlops() as forward:
        logps, lse, compact = sparse_softmax.token_logps(*operands, needs, sparse_eps=EPS, **options)
    with MatmulFlops() as backward:
        sparse_softmax.token_logps_bwd(inputs.dlogps, *operands, logps, lse, compact, needs, **options)
    unit = 2 * 256 * 32768 * H
    density = sparse_softmax.statistics(compact, 32768, "torch")[0].item()
    assert unit <= forward.flops <= 1.01 * unit and density < 0.25
    assert 2 * density * unit <= backward.flops <= 2 * density * unit + 0.01 * unit


def test_log_probs_against_float64():
    inputs = operands("base")
    logps = linear_logps(*inputs, backend="torch", sparse_eps=EPS)
    gold = linear_logps_ref(*(x.detach().double() for x in inputs[:2]), inputs[2])
    assert (logps.double() - gold).abs().max() < 1e-4


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the compiler's own tests")
def test_under_torch_compile():
    batch = batch_of(operands("rl"), [75] * 4)

    def loss(hidden_states):
        return linear_copg_loss(
            **batch | dict(hidden_states=hidden_states), beta=0.1, group_size=2, sparse_eps=EPS
        ).loss

    eager = torch.autograd.grad(loss(batch["hidden_states"]), batch["hidden_states"])[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(batch["hidden_states"])
    assert torch.equal(torch.autograd.grad(compiled, batch["hidden_states"])[0], eager)
