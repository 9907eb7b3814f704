"""The loss family against hand-written values and each other."""

import math
from functools import partial

import pytest
import torch

from copg_kernels import copg_loss, losses

LOGPS = [-3.0, -5.0, -2.0, -2.5]
REF_LOGPS = [-4.0, -4.0, -2.5, -3.0]
REWARDS = [1.0, 0.0, 0.2, 0.9]
# Log-ratios 1, -1, 0.5, 0.5: gaps winner - loser are 2 for the first pair and 0 for the second.
BETA = 0.5
A = [0.5, 0.5, -0.05, 0.65]  # rewards - beta * log-ratios


def numbers() -> tuple:
    logps, ref_logps, rewards = (torch.tensor(x, dtype=torch.float64) for x in (LOGPS, REF_LOGPS, REWARDS))
    return logps.requires_grad_(), ref_logps, rewards


def gradient(loss, **options) -> list:
    logps, ref_logps, rewards = numbers()
    (result,) = torch.autograd.grad(loss(logps, ref_logps, rewards, beta=BETA, **options), logps)
    return result


def test_ipo():
    assert losses.ipo_loss(*numbers(), beta=BETA).item() == pytest.approx(((2 - 1) ** 2 + (0 - 1) ** 2) / 2)


def test_dpo():
    expected = (math.log(1 + math.exp(-BETA * 2)) + math.log(2)) / 2
    assert losses.dpo_loss(*numbers(), beta=BETA).item() == pytest.approx(expected)


def test_rloo():
    value = losses.rloo_loss(*numbers(), beta=BETA).item()
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
    assert losses.raft_loss(*numbers(), beta=BETA).item() == pytest.approx((3.0 + 2.5) / 2)
    assert losses.raft_loss(*numbers(), beta=BETA, group_size=4).item() == pytest.approx(3.0)
    assert gradient(losses.raft_loss).tolist() == [-0.5, 0, 0, -0.5]


def test_ppo_at_the_sampling_policy_is_rloo():
    old_logps = torch.tensor(LOGPS, dtype=torch.float64)
    torch.testing.assert_close(gradient(losses.ppo_loss, old_logps=old_logps), gradient(losses.rloo_loss))


def test_ppo_clips():
    """Ratios e^0.5 past 1.2 with a positive advantage, and with a negative one; the second is not clipped."""
    logps, ref_logps, _ = numbers()
    old_logps, rewards = logps.detach() - 0.5, torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    loss = losses.ppo_loss(logps, ref_logps, rewards, beta=1e-9, old_logps=old_logps, clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - math.exp(0.5)) / 2)
    (slope,) = torch.autograd.grad(loss, logps)
    assert slope.tolist() == pytest.approx([0, math.exp(0.5) / 4] * 2)


def test_rebel():
    # d - eta dR with eta = 2: 2 - 2 * 1 = 0 and 0 - 2 * (-0.7) = 1.4
    assert losses.rebel_loss(*numbers(), beta=BETA).item() == pytest.approx(1.4**2 / 2)
    torch.testing.assert_close(gradient(losses.rebel_loss), 4 / BETA * gradient(copg_loss))


def test_pair_losses_take_every_pair_of_a_group():
    logps, ref_logps, rewards = numbers()
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for loss in (losses.ipo_loss, losses.dpo_loss, losses.rebel_loss):
        each = [loss(*(x[list(pair)] for x in (logps, ref_logps, rewards)), beta=BETA) for pair in pairs]
        torch.testing.assert_close(loss(logps, ref_logps, rewards, beta=BETA, group_size=4), sum(each) / 6)


def test_pairs_of_equal_rewards_have_no_winner():
    logps, ref_logps, rewards = numbers()
    rewards[1] = rewards[0]
    for loss in (losses.ipo_loss, losses.dpo_loss):
        tied = loss(logps, ref_logps, rewards, beta=BETA)
        torch.testing.assert_close(tied, loss(logps[2:], ref_logps[2:], rewards[2:], beta=BETA))
        assert loss(logps[:2], ref_logps[:2], rewards[:2], beta=BETA) == 0


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
        loss(logps, ref_logps, rewards, beta=0.0)
    with pytest.raises(ValueError, match="group_size must divide"):
        loss(logps, ref_logps, rewards, beta=1.0, group_size=3)
    with pytest.raises(ValueError, match=r"rewards must be finite, got nan at index 2"):
        loss(logps, ref_logps, rewards.index_fill(0, torch.tensor(2), float("nan")), beta=1.0)
    with pytest.raises(ValueError, match=r"ref_logps must have shape"):
        loss(logps, ref_logps[:2], rewards, beta=1.0)


def test_refusals_of_extra_arguments():
    with pytest.raises(ValueError, match="baseline must be"):
        losses.reinforce_loss(*numbers(), beta=1.0, baseline=torch.zeros(3))
    with pytest.raises(ValueError, match="clip must be positive"):
        losses.ppo_loss(*numbers(), beta=1.0, old_logps=torch.zeros(4), clip=0.0)
    with pytest.raises(ValueError, match="old_logps must have shape"):
        losses.ppo_loss(*numbers(), beta=1.0, old_logps=torch.zeros(3))
