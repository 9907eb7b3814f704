"""The contrastive loss: its identities, its gradients through the head, packing and grouping."""

from functools import partial

import pytest
import torch

from copg_kernels import (
    CoPGLoss,
    copg_loss,
    linear_copg_loss,
    linear_logps,
    linear_sequence_loss,
    losses,
    sequence_logps,
)
from copg_kernels.reference import (
    copg_coefficients_ref,
    copg_loss_ref,
    linear_copg_loss_ref,
    sequence_logps_ref,
)
from tests.conftest import DEVICE, KERNEL_DTYPES
from tests.numerics import FLOAT32_FACTOR, assert_close, relative_error, upcast

LENGTHS = [5, 7, 1, 9, 12, 3, 30, 2]
EQUAL = dict(group_size=4)
RAGGED = dict(cu_groups=[0, 2, 5, 8])


def grouping(groups: dict) -> dict:
    if "cu_groups" in groups:
        return dict(cu_groups=torch.tensor(groups["cu_groups"], dtype=torch.int32, device=DEVICE))
    return groups


def make_batch(dtype=torch.float32, V=131, H=40, lengths=LENGTHS) -> dict:
    """Packed completions with some ignored tokens, and rewards whose contrast is of the order of the log-ratios'."""
    T, N = sum(lengths), len(lengths)
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[2::7] = -100
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    hidden_states = torch.randn(T, H, device=DEVICE).to(dtype).requires_grad_()
    lm_head_weight = (torch.randn(V, H, device=DEVICE) * 0.3).to(dtype).requires_grad_()
    with torch.no_grad():
        ref_logps = sequence_logps(linear_logps(hidden_states, lm_head_weight, labels), labels, cu_seqlens=cu_seqlens)
    return dict(
        hidden_states=hidden_states,
        lm_head_weight=lm_head_weight,
        labels=labels,
        ref_logps=ref_logps + torch.randn(N, device=DEVICE),
        rewards=torch.randn(N, device=DEVICE),
        cu_seqlens=cu_seqlens,
    )


def loss_and_gradients(function, batch: dict, **options):
    loss = function(**batch, **options)
    loss = loss if isinstance(loss, torch.Tensor) else loss.loss
    return loss.detach(), torch.autograd.grad(loss, (batch["hidden_states"], batch["lm_head_weight"]))


# 16 bits with every group and every sum, but not with every pair of them.
LOSS_CASES = {
    f"{dtype}-{'equal' if groups is EQUAL else 'ragged'}-{'average' if average else 'sum'}": (dtype, groups, average)
    for dtype in KERNEL_DTYPES
    for groups in (EQUAL, RAGGED)
    for average in (False, True)
    if dtype == torch.float32 or average == (groups is EQUAL)
}


@pytest.mark.parametrize(("dtype", "groups", "average_logps"), LOSS_CASES.values(), ids=LOSS_CASES)
def test_linear_copg_loss(dtype, groups, average_logps, backend):
    batch, options = make_batch(dtype), dict(beta=0.3, average_logps=average_logps, **grouping(groups))
    if average_logps:
        batch["ref_logps"] /= torch.tensor(LENGTHS, device=DEVICE)
    loss, gradients = loss_and_gradients(linear_copg_loss, batch, backend=backend, **options)
    base, base_gradients = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float32), **options)
    gold, gold_gradients = loss_and_gradients(linear_copg_loss_ref, upcast(batch, torch.float64), **options)
    # The loss is a difference of sums: what float32 log-probs of size 100 allow, from the reference itself.
    allowed = FLOAT32_FACTOR * (abs(base - gold) + 1e-6 * gold)
    assert loss.dtype == torch.float32 and loss.shape == () and abs(loss - gold) <= allowed
    for name, *gradient in zip(
        ("hidden_states", "lm_head_weight"), gradients, base_gradients, gold_gradients, strict=True
    ):
        assert_close(f"gradient of {name}", *gradient)


def test_outputs(backend):
    batch = make_batch()
    output = linear_copg_loss(**batch, beta=0.3, group_size=4, backend=backend)
    token_logps = linear_logps(batch["hidden_states"], batch["lm_head_weight"], batch["labels"], backend=backend)
    logps = sequence_logps(token_logps, batch["labels"], cu_seqlens=batch["cu_seqlens"])
    assert torch.equal(output.logps, logps)
    assert torch.equal(output.log_ratios, logps - batch["ref_logps"])
    torch.testing.assert_close(output.regularized_rewards, batch["rewards"] - 0.3 * output.log_ratios)
    torch.testing.assert_close(
        output.loss, copg_loss(logps, batch["ref_logps"], batch["rewards"], beta=0.3, group_size=4)
    )
    assert output.loss.requires_grad and not any(value.requires_grad for value in output[1:5])
    names = ("loss", "logps", "regularized_rewards", "log_ratios", "gemm_units", "sparsity", "entropy", "mean_entropy")
    assert output._fields == names and len(output) == 8 and type(output).__bases__ == (tuple,)
    assert output.gemm_units == 3 and output.gemm_units.dtype == torch.int64
    assert output.gemm_units.device == output.loss.device
    assert output.sparsity is None and output.entropy is None and output.mean_entropy is None


def test_at_the_reference_the_log_ratio_is_exactly_0(backend):
    """The stored reference log-probs come from the same path, so they cancel to the last bit."""
    batch = make_batch()
    for average in (False, True):
        with torch.no_grad():
            tokens = linear_logps(batch["hidden_states"], batch["lm_head_weight"], batch["labels"], backend=backend)
            batch["ref_logps"] = sequence_logps(
                tokens, batch["labels"], cu_seqlens=batch["cu_seqlens"], average=average
            )
        output = linear_copg_loss(**batch, beta=0.3, group_size=2, average_logps=average, backend=backend)
        assert (output.log_ratios == 0).all()
        assert torch.equal(output.regularized_rewards, batch["rewards"])


def test_padded_equals_packed(backend):
    batch = make_batch(lengths=[6, 6, 6, 6, 6, 6, 6, 6])
    padded = dict(batch, cu_seqlens=None, labels=batch["labels"].view(8, 6))
    padded["hidden_states"] = batch["hidden_states"].view(8, 6, -1)
    packed_loss, packed_gradients = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend)
    loss = linear_copg_loss(**padded, beta=0.3, group_size=2, backend=backend).loss
    gradients = torch.autograd.grad(loss, (batch["hidden_states"], batch["lm_head_weight"]))
    assert torch.equal(loss, packed_loss)
    assert all(torch.equal(*pair) for pair in zip(gradients, packed_gradients, strict=True))


def test_padding_changes_nothing(backend):
    """Ragged completions padded with ignored tokens against the same ones packed: equal bits of what kernels compute,
    and gradients up to the order in which a library sums the products of 17 rows and of 28."""
    lengths = [5, 3, 7, 2]
    batch = make_batch(lengths=lengths, H=24)
    batch["labels"].clamp_(min=0)
    padded_hidden = torch.full((4, 7, 24), float("nan"), device=DEVICE)
    padded_labels = torch.full((4, 7), -100, device=DEVICE)
    for row, (start, length) in enumerate(zip(batch["cu_seqlens"].tolist(), lengths, strict=False)):
        padded_hidden[row, :length] = batch["hidden_states"].detach()[start : start + length]
        padded_labels[row, :length] = batch["labels"][start : start + length]
    padded = dict(batch, hidden_states=padded_hidden.requires_grad_(), labels=padded_labels, cu_seqlens=None)
    packed_loss, (dpacked, dweight) = loss_and_gradients(
        linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend
    )
    loss, (dpadded, padded_dweight) = loss_and_gradients(
        linear_copg_loss, padded, beta=0.3, group_size=2, backend=backend
    )
    assert torch.equal(loss, packed_loss) and relative_error(padded_dweight, dweight) < 1e-6
    assert relative_error(dpadded[padded_labels != -100], dpacked) < 1e-6
    assert (dpadded[padded_labels == -100] == 0).all()


def test_sequences_do_not_disturb_each_other(backend):
    batch = make_batch()
    before = linear_copg_loss(**batch, beta=0.3, group_size=4, backend=backend)
    start, end = batch["cu_seqlens"][3:5].tolist()
    with torch.no_grad():
        batch["hidden_states"][start:end] = torch.randn_like(batch["hidden_states"][start:end]) * 100
    after = linear_copg_loss(**batch, beta=0.3, group_size=4, backend=backend)
    others = torch.arange(len(LENGTHS)) != 3
    assert torch.equal(after.logps[others], before.logps[others]) and after.logps[3] != before.logps[3]
    with torch.no_grad():
        batch["hidden_states"][start:end] = float("nan")
    poisoned = linear_copg_loss(**batch, beta=0.3, group_size=4, backend=backend)
    assert torch.equal(poisoned.logps[others], before.logps[others]) and poisoned.loss.isnan()


def test_same_bits_every_time(backend):
    batch = make_batch(torch.float16)
    first = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend)
    second = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend)
    assert torch.equal(first[0], second[0]) and all(
        torch.equal(*pair) for pair in zip(first[1], second[1], strict=True)
    )


def test_every_head_option_reaches_the_loss(backend):
    batch = make_batch()
    head = dict(bias=torch.randn(131, device=DEVICE), logit_scale=0.8, softcap=6.0, temperature=1.25)
    loss, gradients = loss_and_gradients(linear_copg_loss, batch, beta=0.3, group_size=2, backend=backend, **head)
    double = upcast(batch, torch.float64)
    head["bias"] = head["bias"].double()
    gold, gold_gradients = loss_and_gradients(linear_copg_loss_ref, double, beta=0.3, group_size=2, **head)
    torch.testing.assert_close(loss.double(), gold, rtol=1e-4, atol=0.0)
    assert all(relative_error(*pair) < 1e-4 for pair in zip(gradients, gold_gradients, strict=True))


def test_module_face(backend):
    batch = make_batch()
    module = CoPGLoss(beta=0.3, group_size=4, temperature=1.25, backend=backend)
    output = module(
        batch["lm_head_weight"],
        batch["hidden_states"],
        batch["labels"],
        batch["ref_logps"],
        batch["rewards"],
        cu_seqlens=batch["cu_seqlens"],
    )
    expected = linear_copg_loss(**batch, beta=0.3, group_size=4, temperature=1.25, backend=backend)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(output, expected, strict=True))
    assert "beta=0.3" in repr(module)


@pytest.mark.parametrize("groups", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_linear_sequence_loss_with_copg_is_linear_copg_loss(groups, backend):
    batch, options = make_batch(), dict(beta=0.3, backend=backend, **grouping(groups))
    fused, fused_gradients = loss_and_gradients(linear_copg_loss, batch, **options)
    loss, gradients = loss_and_gradients(linear_sequence_loss, batch, loss=copg_loss, **options)
    torch.testing.assert_close(loss, fused, rtol=1e-5, atol=0.0)
    assert all(relative_error(*pair) < 1e-5 for pair in zip(gradients, fused_gradients, strict=True))


def test_linear_sequence_loss_with_any_loss(backend):
    """A user's own loss, against autograd through full logits in float64."""

    def own_loss(logps, ref_logps, rewards, *, beta, group_size):
        return ((logps - ref_logps - rewards / beta) ** 4).mean() ** 0.25

    for loss in (own_loss, losses.dpo_loss, losses.rloo_loss):
        batch = make_batch()
        value, gradients = loss_and_gradients(
            linear_sequence_loss, batch, loss=loss, beta=0.3, group_size=2, backend=backend
        )
        wide = upcast(batch, torch.float64)
        logps = sequence_logps_ref(
            (wide["hidden_states"] @ wide["lm_head_weight"].T)
            .log_softmax(-1)
            .gather(1, wide["labels"].clamp(min=0)[:, None])[:, 0],
            wide["labels"],
            cu_seqlens=wide["cu_seqlens"],
        )
        gold = loss(logps, wide["ref_logps"], wide["rewards"], beta=0.3, group_size=2)
        gold_gradients = torch.autograd.grad(gold, (wide["hidden_states"], wide["lm_head_weight"]))
        torch.testing.assert_close(value.double(), gold.detach(), rtol=1e-4, atol=1e-5)
        assert all(relative_error(*pair) < 1e-4 for pair in zip(gradients, gold_gradients, strict=True))


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
def test_sequence_logps(average):
    token_logps = -torch.rand(12, device=DEVICE)
    labels = torch.tensor([1, 2, -100, 3, 4, 5, 6, -100, 7, 8, 9, 10], device=DEVICE)
    cu_seqlens = torch.tensor([0, 3, 5, 12], dtype=torch.int32, device=DEVICE)
    packed = sequence_logps(token_logps, labels, cu_seqlens=cu_seqlens, average=average)
    torch.testing.assert_close(packed, sequence_logps_ref(token_logps, labels, cu_seqlens=cu_seqlens, average=average))
    padded = sequence_logps(token_logps.view(3, 4), labels.view(3, 4), average=average)
    torch.testing.assert_close(padded, sequence_logps_ref(token_logps.view(3, 4), labels.view(3, 4), average=average))
    double = token_logps.double().requires_grad_()
    arguments = dict(cu_seqlens=cu_seqlens, average=average)
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, labels, **arguments), double)


def test_empty_completion_sums_to_0(backend):
    """Where log-probs are wanted; in a fused loss that 0 would stand in its group's contrast, and is refused."""
    batch = make_batch(lengths=[4, 0, 3, 5])
    batch["labels"].clamp_(min=0)
    token_logps = linear_logps(batch["hidden_states"], batch["lm_head_weight"], batch["labels"], backend=backend)
    logps = sequence_logps(token_logps, batch["labels"], cu_seqlens=batch["cu_seqlens"])
    assert logps[1] == 0 and logps.isfinite().all()
    assert_refused_as_empty(batch, 1, backend)


def test_no_tokens_at_all(backend):
    """Log-probs of 0 and nothing to differentiate, but no fused loss."""
    hidden_states = torch.randn(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(11, 8, device=DEVICE, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    numbers = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=DEVICE)
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    logps = sequence_logps(linear_logps(hidden_states, weight, labels, backend=backend), labels, cu_seqlens=cu_seqlens)
    loss = copg_loss(logps, *numbers, beta=0.5, group_size=2)
    assert loss == 0.5  # (1 - 0)^2 / (4 beta)
    loss.backward()
    assert (weight.grad == 0).all() and hidden_states.grad.shape == (0, 8)
    batch = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels, cu_seqlens=cu_seqlens)
    assert_refused_as_empty(batch | dict(ref_logps=numbers[0], rewards=numbers[1]), 0, backend)


def assert_refused_as_empty(batch: dict, completion: int, backend: str):
    """By both fused losses, with and without gradients; on a GPU it would be a device assertion."""
    if DEVICE.type == "cuda":
        return
    message = f"labels must leave every completion a counted token, completion {completion} has none"
    for function in (linear_copg_loss, partial(linear_sequence_loss, loss=copg_loss)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
                function(**batch, beta=0.5, group_size=2, backend=backend)


def test_upstream_gradient_scales(backend):
    batch = make_batch()
    inputs = (batch["hidden_states"], batch["lm_head_weight"])
    once = torch.autograd.grad(linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend).loss, inputs)
    scaled = torch.autograd.grad(-4 * linear_copg_loss(**batch, beta=0.3, group_size=2, backend=backend).loss, inputs)
    assert all(torch.equal(-4 * a, b) for a, b in zip(once, scaled, strict=True))


# The loss on log-probabilities.


def random_numbers(N=12, dtype=torch.float64) -> tuple:
    logps, ref_logps, rewards = torch.randn(3, N, dtype=dtype, device=DEVICE)
    return logps.requires_grad_(), ref_logps, rewards


@pytest.mark.parametrize("groups", [dict(group_size=2), dict(group_size=3), dict(cu_groups=[0, 2, 7, 12])], ids=str)
def test_variance_form_is_the_pairwise_loop(groups):
    numbers, groups = random_numbers(), grouping(groups)
    loss, pairwise = (f(*numbers, beta=0.4, **groups) for f in (copg_loss, copg_loss_ref))
    torch.testing.assert_close(loss, pairwise)
    (gradient,) = torch.autograd.grad(loss, numbers[0])
    torch.testing.assert_close(gradient, copg_coefficients_ref(*numbers, beta=0.4, **groups))


def test_pair_by_hand():
    logps = torch.tensor([-3.0, -7.0], requires_grad=True)
    loss = copg_loss(logps, torch.tensor([-4.0, -5.0]), torch.tensor([1.0, 0.0]), beta=0.5, group_size=2)
    loss.backward()
    # A = (0.5, 1): loss = 0.25 / (4 * 0.5), gradient = -(A - A') / 2
    assert loss == 0.125 and logps.grad.tolist() == [0.25, -0.25]


def test_gradient_is_minus_rloo():
    logps, ref_logps, rewards = random_numbers()
    (gradient,) = torch.autograd.grad(copg_loss(logps, ref_logps, rewards, beta=0.4, group_size=4), logps)
    A = (rewards - 0.4 * (logps - ref_logps)).detach().view(3, 4)
    leave_one_out = A - (A.sum(1, keepdim=True) - A) / 3
    torch.testing.assert_close(gradient, -leave_one_out.flatten() / 4 / 3)


def test_gradients_of_a_group_sum_to_0_and_constants_do_not_matter():
    logps, ref_logps, rewards = random_numbers()
    loss = copg_loss(logps, ref_logps, rewards, beta=0.4, group_size=4)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient.view(3, 4).sum(1).abs().max() < 1e-15
    shift = torch.randn(3, 1, dtype=torch.float64, device=DEVICE).expand(3, 4).flatten()
    torch.testing.assert_close(copg_loss(logps, ref_logps, rewards + shift, beta=0.4, group_size=4), loss)


def test_order_within_a_group_does_not_matter():
    logps, ref_logps, rewards = random_numbers(4)
    order = torch.tensor([2, 0, 3, 1])
    loss = copg_loss(logps, ref_logps, rewards, beta=0.4, group_size=4)
    torch.testing.assert_close(copg_loss(logps[order], ref_logps[order], rewards[order], beta=0.4, group_size=4), loss)


def test_nothing_to_learn_at_the_optimal_policy():
    """pi proportional to pi_ref exp(R / beta): log-ratios of R / beta minus any constant of the prompt."""
    _, ref_logps, rewards = random_numbers()
    beta = 0.4
    logps = (ref_logps + rewards / beta - 1.7).requires_grad_()
    loss = copg_loss(logps, ref_logps, rewards, beta=beta, group_size=3)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss < 1e-25 and gradient.abs().max() < 1e-14


def test_beta_is_not_half_of_it():
    """Differentiating the paper's eq. (7) with beta in its weights gives CoPG at 2 beta: the trap."""
    logps, ref_logps, rewards = random_numbers(2)
    log_ratios = logps - ref_logps
    weights = rewards - 0.4 * log_ratios
    trap = -((weights[0] - weights[1]) * log_ratios[0] + (weights[1] - weights[0]) * log_ratios[1])
    (trapped,) = torch.autograd.grad(trap, logps, retain_graph=True)
    (at_beta,) = torch.autograd.grad(copg_loss(logps, ref_logps, rewards, beta=0.4, group_size=2), logps)
    (at_twice,) = torch.autograd.grad(copg_loss(logps, ref_logps, rewards, beta=0.8, group_size=2), logps)
    torch.testing.assert_close(trapped / 2, at_twice)
    assert (at_beta - at_twice).abs().max() > 1e-3


def test_ipo_is_copg_with_quarter_rewards():
    logps, ref_logps, _ = random_numbers(2)
    rewards = torch.tensor([0.25, -0.25], dtype=torch.float64, device=DEVICE)
    beta = 0.4
    copg = copg_loss(logps, ref_logps, rewards, beta=beta, group_size=2)
    ipo = losses.ipo_loss(logps, ref_logps, rewards, beta=beta)
    torch.testing.assert_close(copg, beta / 4 * ipo)


@pytest.mark.parametrize("name", ["ref_logps", "rewards"])
def test_only_logps_is_differentiable(name):
    """A gradient that is asked for and never comes would not be missed, so that the question is refused."""
    logps, ref_logps, rewards = random_numbers()
    numbers, options = dict(ref_logps=ref_logps, rewards=rewards), dict(beta=0.4, group_size=2)
    loss = copg_loss(logps, **numbers, **options)
    loss.backward()
    assert logps.grad is not None
    numbers[name].requires_grad_()
    message = rf"{name} must not require a gradient, as no loss here has one; pass {name}\.detach\(\)"
    with pytest.raises(ValueError, match=message):
        copg_loss(logps, **numbers, **options)
    with torch.no_grad():
        assert copg_loss(logps, **numbers, **options) == loss
    batch = make_batch()
    batch[name].requires_grad_()
    for function in (linear_copg_loss, partial(linear_sequence_loss, loss=copg_loss)):
        with pytest.raises(ValueError, match=message):
            function(**batch, **options)


def test_gradcheck():
    for groups in (dict(group_size=3), grouping(dict(cu_groups=[0, 2, 7, 12]))):
        logps, ref_logps, rewards = random_numbers()
        assert torch.autograd.gradcheck(lambda x: copg_loss(x, ref_logps, rewards, beta=0.4, **groups), logps)  # noqa: B023
