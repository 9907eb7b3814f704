"""The loss family against hand-written values and each other; tests/by_hand.py has the equations in plain Python."""

import math
from functools import partial

import pytest
import torch

from copg_kernels import copg_loss, linear_copg_loss, linear_sequence_loss, losses, sequence_logps
from copg_kernels.reference import linear_logps_bwd_ref, linear_logps_ref, sequence_logps_ref
from tests import by_hand
from tests.conftest import DEVICE
from tests.numerics import assert_close, upcast

LOGPS = [-3.0, -5.0, -2.0, -2.5]
REF_LOGPS = [-4.0, -4.0, -2.5, -3.0]
REWARDS = [1.0, 0.0, 0.2, 0.9]
# Log-ratios 1, -1, 0.5, 0.5: gaps winner - loser are 2 for the first pair and 0 for the second.
BETA = 0.5
A = [0.5, 0.5, -0.05, 0.65]  # rewards - beta * log-ratios


def numbers() -> tuple:
    logps, ref_logps, rewards = (torch.tensor(x, dtype=torch.float64) for x in (LOGPS, REF_LOGPS, REWARDS))
    return logps.requires_grad_(), ref_logps, rewards


def gradient(loss, group_size=2, **options) -> list:
    logps, ref_logps, rewards = numbers()
    value = loss(logps, ref_logps, rewards, beta=BETA, group_size=group_size, **options)
    (result,) = torch.autograd.grad(value, logps)
    return result


def test_copg():
    # Var(0.5, 0.5) = 0 and Var(-0.05, 0.65) = 0.7^2 / 2
    assert copg_loss(*numbers(), beta=BETA, group_size=2).item() == pytest.approx(0.7**2 / 2 / 2 / (2 * BETA))
    assert gradient(copg_loss).tolist() == pytest.approx([0, 0, 0.7 / 4, -0.7 / 4])


def test_ipo():
    assert losses.ipo_loss(*numbers(), beta=BETA).item() == pytest.approx(((2 - 1) ** 2 + (0 - 1) ** 2) / 2)


def test_dpo():
    expected = (math.log(1 + math.exp(-BETA * 2)) + math.log(2)) / 2
    assert losses.dpo_loss(*numbers(), beta=BETA).item() == pytest.approx(expected)


def test_rloo():
    value = losses.rloo_loss(*numbers(), beta=BETA, group_size=2).item()
    # Leave-one-out advantages: 0, 0, -0.7, 0.7.
    assert value == pytest.approx(-(-0.7 * -2.0 + 0.7 * -2.5) / 2 / 2)
    torch.testing.assert_close(gradient(losses.rloo_loss), gradient(copg_loss))
    assert gradient(losses.rloo_loss).tolist() == pytest.approx([0, 0, 0.7 / 4, -0.7 / 4])


def test_rloo_of_a_group_of_four():
    torch.testing.assert_close(gradient(losses.rloo_loss, group_size=4), gradient(copg_loss, group_size=4))


def test_reinforce():
    assert gradient(losses.reinforce_loss).tolist() == pytest.approx([-a / 4 for a in A])
    assert gradient(losses.reinforce_loss, baseline=0.3).tolist() == pytest.approx([-(a - 0.3) / 4 for a in A])
    each = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert gradient(losses.reinforce_loss, baseline=each).tolist() == pytest.approx(
        [-(a - b) / 4 for a, b in zip(A, each.tolist(), strict=True)]
    )


def test_raft():
    assert losses.raft_loss(*numbers(), beta=BETA, group_size=2).item() == pytest.approx((3.0 + 2.5) / 2)
    assert losses.raft_loss(*numbers(), beta=BETA, group_size=4).item() == pytest.approx(3.0)
    assert gradient(losses.raft_loss).tolist() == [-0.5, 0, 0, -0.5]


def test_ppo_at_the_sampling_policy_is_rloo():
    old_logps = torch.tensor(LOGPS, dtype=torch.float64)
    torch.testing.assert_close(gradient(losses.ppo_loss, old_logps=old_logps), gradient(losses.rloo_loss))


def test_ppo_clips():
    """Ratios e^0.5 past 1.2 with a positive advantage, and with a negative one; the second is not clipped."""
    logps, ref_logps, _ = numbers()
    old_logps, rewards = logps.detach() - 0.5, torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    loss = losses.ppo_loss(logps, ref_logps, rewards, beta=1e-9, group_size=2, old_logps=old_logps, clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - math.exp(0.5)) / 2)
    (slope,) = torch.autograd.grad(loss, logps)
    assert slope.tolist() == pytest.approx([0, math.exp(0.5) / 4] * 2)


def test_rebel():
    # d - eta dR with eta = 2: 2 - 2 * 1 = 0 and 0 - 2 * (-0.7) = 1.4
    assert losses.rebel_loss(*numbers(), beta=BETA, group_size=2).item() == pytest.approx(1.4**2 / 2)
    for k in (2, 4):
        expected = 4 / BETA * gradient(copg_loss, group_size=k)
        torch.testing.assert_close(gradient(losses.rebel_loss, group_size=k), expected)


def test_pair_losses_take_every_pair_of_a_group():
    logps, ref_logps, rewards = numbers()
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for loss in (losses.ipo_loss, losses.dpo_loss, losses.rebel_loss):
        each = [loss(*(x[list(pair)] for x in (logps, ref_logps, rewards)), beta=BETA, group_size=2) for pair in pairs]
        torch.testing.assert_close(loss(logps, ref_logps, rewards, beta=BETA, group_size=4), sum(each) / 6)


def test_pairs_of_equal_rewards_have_no_winner():
    logps, ref_logps, rewards = numbers()
    rewards[1] = rewards[0]
    for loss in (losses.ipo_loss, losses.dpo_loss):
        tied = loss(logps, ref_logps, rewards, beta=BETA)
        torch.testing.assert_close(tied, loss(logps[2:], ref_logps[2:], rewards[2:], beta=BETA))
        assert loss(logps[:2], ref_logps[:2], rewards[:2], beta=BETA) == 0


# Against the equations in plain Python

OLD_LOGPS = [-3.1, -4.2, -2.9, -2.6, -6.3, -1.2]
BASELINE = [0.4, -0.1, 0.3, 0.2, 0.0, 0.7]
FAMILY = {
    "copg": (copg_loss, by_hand.copg, {}),
    "ipo": (losses.ipo_loss, by_hand.ipo, {}),
    "dpo": (losses.dpo_loss, by_hand.dpo, {}),
    "rloo": (losses.rloo_loss, by_hand.rloo, {}),
    "reinforce": (losses.reinforce_loss, by_hand.reinforce, {"baseline": BASELINE}),
    "raft": (losses.raft_loss, by_hand.raft, {}),
    "ppo": (losses.ppo_loss, by_hand.ppo, {"old_logps": OLD_LOGPS, "clip": 0.2}),
    "rebel": (losses.rebel_loss, by_hand.rebel, {}),
}
each_loss = pytest.mark.parametrize(("loss", "equation", "extra"), FAMILY.values(), ids=FAMILY.keys())


def as_tensors(extra: dict, dtype: torch.dtype = torch.float64) -> dict:
    return {k: torch.tensor(v, dtype=dtype, device=DEVICE) if isinstance(v, list) else v for k, v in extra.items()}


@pytest.mark.parametrize("group_size", [2, 3])
@each_loss
def test_by_hand(loss, equation, extra, group_size):
    logps, ref_logps = [-3.0, -4.5, -2.4, -2.5, -6.0, -1.3], [-3.3, -4.0, -2.6, -3.1, -5.5, -1.7]
    rewards = [0.9, 0.1, 0.9, -0.4, 0.3, 0.5]
    value, slopes = equation(logps, ref_logps, rewards, beta=0.7, k=group_size, **extra)
    leaf, *others = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (logps, ref_logps, rewards))
    result = loss(leaf.requires_grad_(), *others, beta=0.7, group_size=group_size, **as_tensors(extra))
    assert result.dtype == torch.float64 and result.item() == pytest.approx(value, rel=1e-12)
    (gradient,) = torch.autograd.grad(result, leaf)
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-14)


@each_loss
def test_sixteen_bit_inputs_are_widened(loss, equation, extra):
    """The operands are rounded to bfloat16, the arithmetic on them is not."""
    logps, ref_logps, rewards = torch.tensor([[-1031.0, -994.0], [-1024.0, -1000.0], [0.3, 0.9]], dtype=torch.bfloat16)
    extra = {name: value[:2] if isinstance(value, list) else value for name, value in extra.items()}
    if "old_logps" in extra:
        extra["old_logps"] = [-1024.0, -1000.0]
    lists = (x.tolist() for x in (logps, ref_logps, rewards))
    value, _ = equation(*lists, beta=0.7, k=2, **extra)
    result = loss(*(x.to(DEVICE) for x in (logps, ref_logps, rewards)), beta=0.7, group_size=2, **as_tensors(extra))
    assert result.dtype == torch.float32 and result.item() == pytest.approx(value, rel=1e-6)


# Averaged log-likelihoods

LENGTHS = [3, 1, 7, 2, 5, 4]


def averaged_batch(dtype: torch.dtype) -> dict:
    """Packed completions of LENGTHS tokens, with one ignored token in the longest, near a reference policy."""
    T, V, H = sum(LENGTHS), 37, 16
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[6] = -100
    batch = dict(
        hidden_states=torch.randn(T, H, device=DEVICE, dtype=torch.float64),
        lm_head_weight=torch.randn(V, H, device=DEVICE, dtype=torch.float64) * 0.3,
        labels=labels,
        cu_seqlens=torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int(),
        rewards=torch.randn(len(LENGTHS), device=DEVICE, dtype=torch.float64),
    )
    token_logps = linear_logps_ref(batch["hidden_states"], batch["lm_head_weight"], labels)
    noise = torch.randn(T, device=DEVICE, dtype=torch.float64)
    batch["ref_logps"] = sequence_logps(token_logps + noise, labels, cu_seqlens=batch["cu_seqlens"], average=True)
    batch = upcast(batch, dtype)
    for name in ("hidden_states", "lm_head_weight"):
        batch[name].requires_grad_()
    return batch


def averages_by_hand(batch: dict, equation, **options) -> tuple[float, tuple]:
    """Python averages and slopes; a token's share of its completion's slope is 1/|y|; the head's own algebra."""
    hidden_states, lm_head_weight, labels = (batch[x].detach() for x in ("hidden_states", "lm_head_weight", "labels"))
    token_logps = linear_logps_ref(hidden_states, lm_head_weight, labels).tolist()
    counted = [t for t, label in enumerate(labels.tolist()) if label != -100]
    edges = batch["cu_seqlens"].tolist()
    members = [[t for t in counted if a <= t < b] for a, b in zip(edges, edges[1:], strict=False)]
    logps = [sum(token_logps[t] for t in tokens) / len(tokens) for tokens in members]
    value, slopes = equation(logps, batch["ref_logps"].tolist(), batch["rewards"].tolist(), **options)
    dlogps = [0.0] * len(labels)
    for slope, tokens in zip(slopes, members, strict=True):
        for t in tokens:
            dlogps[t] = slope / len(tokens)
    upstream = torch.tensor(dlogps, dtype=torch.float64, device=DEVICE)
    return value, linear_logps_bwd_ref(upstream, hidden_states, lm_head_weight, labels)[:2]


@pytest.mark.parametrize("group_size", [2, 3])
@each_loss
def test_averages_in_float64(loss, equation, extra, group_size):
    """Which kernels do not take."""
    batch, options = averaged_batch(torch.float64), dict(beta=2.0, group_size=group_size)
    value, expected = averages_by_hand(batch, equation, beta=2.0, k=group_size, **extra)
    loss = partial(loss, **as_tensors(extra))
    output = linear_sequence_loss(**batch, loss=loss, average_logps=True, backend="torch", **options)
    assert output.loss.item() == pytest.approx(value, rel=1e-10)
    gradients = torch.autograd.grad(output.loss, (batch["hidden_states"], batch["lm_head_weight"]))
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


@each_loss
def test_averages_fused(loss, equation, extra, backend):
    """Log-probs and gradients in float32 against the reference; the value against the equation on these log-probs."""
    narrow = averaged_batch(torch.float32)

    def reference(dtype):
        batch = upcast(narrow, dtype)
        token_logps = linear_logps_ref(batch["hidden_states"], batch["lm_head_weight"], batch["labels"])
        logps = sequence_logps_ref(token_logps, batch["labels"], cu_seqlens=batch["cu_seqlens"], average=True)
        value = loss(logps, batch["ref_logps"], batch["rewards"], beta=2.0, group_size=2, **as_tensors(extra, dtype))
        return logps.detach(), *torch.autograd.grad(value, (batch["hidden_states"], batch["lm_head_weight"]))

    base, gold = reference(torch.float32), reference(torch.float64)
    rounded = as_tensors(extra, torch.float32)
    if loss is copg_loss:
        output = linear_copg_loss(**narrow, beta=2.0, group_size=2, average_logps=True, backend=backend)
    else:
        bound = partial(loss, **rounded)
        output = linear_sequence_loss(**narrow, loss=bound, beta=2.0, group_size=2, average_logps=True, backend=backend)
    lists = (x.tolist() for x in (output.logps, narrow["ref_logps"], narrow["rewards"]))
    numbers = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in rounded.items()}
    value, _ = equation(*lists, beta=2.0, k=2, **numbers)
    # Computed in float64 and rounded once: half of float32's spacing.
    assert output.loss.dtype == torch.float32 and output.loss.item() == pytest.approx(value, rel=6e-8, abs=0.0)
    gradients = torch.autograd.grad(output.loss, (narrow["hidden_states"], narrow["lm_head_weight"]))
    for name, *triple in zip(("log-probs", "dX", "dW"), (output.logps, *gradients), base, gold, strict=True):
        assert_close(name, *triple)


@pytest.mark.parametrize(("name", "power"), dict(copg=1, rloo=1, reinforce=1, raft=1, ipo=2, rebel=2, dpo=0).items())
def test_averaging_equal_lengths_is_beta_times_the_length(name, power):
    """Averages at beta * L are the sums at beta, over L to the power of logps' degree in the loss."""
    loss, _, extra = FAMILY[name]
    loss = partial(loss, group_size=2, **as_tensors(extra))
    length, beta = 5, 0.3
    logps, ref_logps, rewards = torch.randn(3, 6, dtype=torch.float64)
    sums = loss(logps, ref_logps, rewards, beta=beta)
    averages = loss(logps / length, ref_logps / length, rewards, beta=beta * length)
    torch.testing.assert_close(averages * length**power, sums)


def test_what_averages_converge_to():
    """pi = pi_ref exp(|y| (R - c) / beta) makes every averaged A equal to c, so that CoPG has no gradient there."""
    lengths, rewards = torch.tensor([1.0, 4.0, 2.0]).double(), torch.tensor([2.5, 2.0, 1.0]).double()
    ref_logps, beta = torch.tensor([0.5, 0.3, 0.2]).double().log(), 1.5

    def policy(c):
        return ref_logps + lengths * (rewards - c) / beta

    low, high = rewards.min(), rewards.max()
    for _ in range(80):
        c = (low + high) / 2
        low, high = (c, high) if policy(c).exp().sum() > 1 else (low, c)
    leaf = policy(c).requires_grad_()
    loss = copg_loss(leaf / lengths, ref_logps / lengths, rewards, beta=beta, group_size=3)
    assert leaf.exp().sum().item() == pytest.approx(1) and loss.item() == pytest.approx(0, abs=1e-20)
    assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-12
    summed = copg_loss(leaf, ref_logps, rewards, beta=beta, group_size=3)
    assert summed > 0.01  # the optimum of sums is another one


# Bad input


@pytest.mark.parametrize(
    "loss",
    [
        losses.ipo_loss,
        losses.dpo_loss,
        losses.rloo_loss,
        losses.reinforce_loss,
        losses.raft_loss,
        partial(losses.ppo_loss, old_logps=torch.zeros(4, dtype=torch.float64)),
        losses.rebel_loss,
    ],
)
def test_refusals(loss):
    logps, ref_logps, rewards = numbers()
    with pytest.raises(ValueError, match="beta must be positive"):
        loss(logps, ref_logps, rewards, beta=0.0, group_size=2)
    with pytest.raises(ValueError, match="group_size must divide"):
        loss(logps, ref_logps, rewards, beta=1.0, group_size=3)
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan at index 2"):
        loss(logps, ref_logps, rewards.index_fill(0, torch.tensor(2), float("nan")), beta=1.0, group_size=2)
    with pytest.raises(ValueError, match=r"ref_logps must have shape"):
        loss(logps, ref_logps[:2], rewards, beta=1.0, group_size=2)
    with pytest.raises(ValueError, match=r"ref_logps must not require a gradient.*pass ref_logps\.detach\(\)"):
        loss(logps, ref_logps.clone().requires_grad_(), rewards, beta=1.0, group_size=2)
    with pytest.raises(ValueError, match=r"rewards must not require a gradient.*pass rewards\.detach\(\)"):
        loss(logps, ref_logps, rewards.clone().requires_grad_(), beta=1.0, group_size=2)


def test_refusals_of_extra_arguments():
    with pytest.raises(ValueError, match="baseline must be"):
        losses.reinforce_loss(*numbers(), beta=1.0, group_size=2, baseline=torch.zeros(3))
    with pytest.raises(ValueError, match="clip must be positive"):
        losses.ppo_loss(*numbers(), beta=1.0, group_size=2, old_logps=torch.zeros(4), clip=0.0)
    with pytest.raises(ValueError, match="old_logps must have shape"):
        losses.ppo_loss(*numbers(), beta=1.0, group_size=2, old_logps=torch.zeros(3))
    each = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"baseline must not require a gradient.*pass baseline\.detach\(\)"):
        losses.reinforce_loss(*numbers(), beta=1.0, group_size=2, baseline=each)
    with pytest.raises(ValueError, match=r"old_logps must not require a gradient.*pass old_logps\.detach\(\)"):
        losses.ppo_loss(*numbers(), beta=1.0, group_size=2, old_logps=each)
