"""The gradient that waited, times the loss's own: in place, or not at all."""

import pytest
import torch

from copg_kernels import linear_copg_loss
from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.kernels.scale_gradient import BLOCK, MOST_PROGRAMS, scale_gradient_
from tests.conftest import BACKENDS, DEVICE

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (BLOCK + 1,), (3, 257)], ids=str)
def test_it_is_the_product_rounded_once(shape, dtype):
    gradient = torch.randn(shape, device=DEVICE).to(dtype)
    factor = torch.tensor(-3.7, device=DEVICE)
    expected = (gradient.double() * factor.double()).float().to(dtype)
    scale_gradient_(gradient, factor)
    torch.testing.assert_close(gradient, expected, rtol=0.0 if dtype != torch.float32 else 1e-7, atol=0.0)


@needs_triton
def test_a_program_takes_more_than_one_block(monkeypatch):
    monkeypatch.setattr("copg_kernels.kernels.scale_gradient.MOST_PROGRAMS", 2)
    assert MOST_PROGRAMS > 2
    gradient = torch.ones(5 * BLOCK + 7, device=DEVICE)
    scale_gradient_(gradient, torch.tensor(2.0, device=DEVICE, dtype=torch.float64))
    assert (gradient == 2.0).all()


@pytest.mark.skipif(not INTERPRETING, reason="counts interpreted stores")
@pytest.mark.parametrize("factor, stores", [(1.0, 0), (1.5, 2)])
def test_where_the_factor_is_one_nothing_is_written(factor, stores, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    store, masks = InterpreterBuilder.create_masked_store, []

    def counted(self, *arguments):
        masks.append(arguments[2])
        return store(self, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted)
    scale_gradient_(torch.randn(BLOCK + 1, device=DEVICE), torch.tensor(factor, device=DEVICE))
    assert len(masks) == stores


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(backend, slope):
    hidden_states = torch.randn(4, 3, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    labels = torch.randint(40, (4, 3), device=DEVICE)
    numbers = torch.randn(2, 4, device=DEVICE)
    loss = (
        slope * linear_copg_loss(hidden_states, weight, labels, *numbers, beta=0.3, group_size=2, backend=backend).loss
    )
    kept = torch.autograd.grad(loss, (hidden_states, weight), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (hidden_states, weight), retain_graph=True)
    for gradient in kept:
        gradient.zero_()  # the caller's own
    last = torch.autograd.grad(loss, (hidden_states, weight))
    for twice, once in zip(again, last, strict=True):
        assert twice.any() and torch.equal(twice, 2 * once)
