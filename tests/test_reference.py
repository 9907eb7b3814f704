"""The specification against hand-computed numbers and the paper's identities."""

import math

import pytest
import torch

from copg_kernels.reference import (
    copg_coefficients_ref,
    copg_loss_ref,
    linear_copg_loss_ref,
    linear_logps_bwd_ref,
    linear_logps_ref,
    sequence_logps_ref,
)

OPTIONS = dict(logit_scale=0.7, softcap=3.0, temperature=1.3)


def test_linear_logps_by_hand():
    hidden_states = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    lm_head_weight = torch.tensor([[math.log(2), 0.0], [0.0, math.log(3) / 2], [0.0, 0.0]], dtype=torch.float64)
    logps = linear_logps_ref(hidden_states, lm_head_weight, torch.tensor([0, 1]))
    # Row 0: weights 2, 1, 1; row 1: weights 1, 3, 1.
    torch.testing.assert_close(logps, torch.tensor([math.log(2 / 4), math.log(3 / 5)], dtype=torch.float64))


def test_ignored_tokens_are_zero():
    logps = linear_logps_ref(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, -100, 2]))
    assert logps[1] == 0 and (logps[[0, 2]] < 0).all()


def test_explicit_backward_is_the_derivative():
    hidden_states, weight = (
        torch.randn(6, 4).double().requires_grad_(),
        torch.randn(9, 4).double().requires_grad_(),
    )
    bias, dlogps = torch.randn(9).double().requires_grad_(), torch.randn(6).double()
    labels = torch.tensor([0, 8, -100, 3, 3, 5])
    logps = linear_logps_ref(hidden_states, weight, labels, bias=bias, **OPTIONS)
    automatic = torch.autograd.grad(logps, (hidden_states, weight, bias), dlogps)
    explicit = linear_logps_bwd_ref(dlogps, hidden_states, weight, labels, bias=bias, **OPTIONS)
    torch.testing.assert_close(explicit, automatic)


def test_sequence_logps_by_hand():
    token_logps, labels = torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([1, 1, -100, 1])
    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert sequence_logps_ref(token_logps, labels, cu_seqlens=cu_seqlens).tolist() == [-3, -8]
    assert sequence_logps_ref(token_logps, labels, cu_seqlens=cu_seqlens, average=True).tolist() == [-1.5, -8]
    assert sequence_logps_ref(token_logps.view(2, 2), labels.view(2, 2)).tolist() == [-3, -8]


def test_pair_by_hand():
    # A = (1 - 0.5 * 1, 0 - 0.5 * (-2)) = (0.5, 1); (A - A')^2 / (4 beta) = 0.25 / 2
    logps, ref_logps = torch.tensor([-3.0, -7.0]), torch.tensor([-4.0, -5.0])
    assert copg_loss_ref(logps, ref_logps, torch.tensor([1.0, 0.0]), beta=0.5, group_size=2).item() == 0.125
    # coefficient of the first: -(A - A') / k = 0.25
    coefficients = copg_coefficients_ref(logps, ref_logps, torch.tensor([1.0, 0.0]), beta=0.5, group_size=2)
    assert coefficients.tolist() == [0.25, -0.25]


@pytest.mark.parametrize("cu_groups", [None, [0, 2, 7, 12]])
def test_coefficients_are_the_derivative(cu_groups):
    logps = torch.randn(12).double().requires_grad_()
    ref_logps, rewards = torch.randn(2, 12).double()
    groups = dict(group_size=4) if cu_groups is None else dict(cu_groups=torch.tensor(cu_groups))
    loss = copg_loss_ref(logps, ref_logps, rewards, beta=0.3, **groups)
    (automatic,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(copg_coefficients_ref(logps, ref_logps, rewards, beta=0.3, **groups), automatic)


def test_unit_form_is_half_the_papers_pair():
    """Paper, eqs. (7) and (38): the sample objective has beta / 2 in its weights, and its gradient beta."""
    beta = 0.7
    logps = torch.randn(2).double().requires_grad_()
    ref_logps, rewards = torch.randn(2, 2).double()
    log_ratios = logps - ref_logps
    half = rewards - beta / 2 * log_ratios
    objective = (half[0] - half[1]) * log_ratios[0] + (half[1] - half[0]) * log_ratios[1]
    (of_paper,) = torch.autograd.grad(-objective, logps)
    (of_loss,) = torch.autograd.grad(copg_loss_ref(logps, ref_logps, rewards, beta=beta, group_size=2), logps)
    torch.testing.assert_close(of_loss, of_paper / 2)


def test_gradcheck_of_the_whole_chain():
    hidden_states, weight = (
        torch.randn(8, 3).double().requires_grad_(),
        torch.randn(5, 3).double().requires_grad_(),
    )
    labels, cu_seqlens = torch.randint(5, (8,)), torch.tensor([0, 3, 5, 6, 8])
    ref_logps, rewards = torch.randn(2, 4).double()

    def loss(hidden_states, weight):
        return linear_copg_loss_ref(
            hidden_states, weight, labels, ref_logps, rewards, beta=0.4, group_size=2, cu_seqlens=cu_seqlens, **OPTIONS
        )

    assert torch.autograd.gradcheck(loss, (hidden_states, weight))
