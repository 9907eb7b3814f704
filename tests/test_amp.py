"""Mixed precision as trainers do it: autocast around the model, a gradient scaler around the loss."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

from copg_kernels import linear_copg_loss, linear_logps, linear_sequence_loss, losses
from copg_kernels.kernels.matmul import sums_in_full
from tests.conftest import DEVICE
from tests.numerics import assert_close

B, L, V, H = 4, 6, 67, 16


def logps_loss(*head, completions, slope, **options):
    return slope * linear_logps(*head, **options).sum(1).square().mean()


def copg(*head, completions, slope, **options):
    """Rewards and beta in another unit are the loss in that unit."""
    ref_logps, rewards = completions
    return linear_copg_loss(*head, ref_logps, slope * rewards, beta=slope * 0.3, group_size=2, **options).loss


def any_loss(*head, completions, slope, **options):
    def loss(*numbers, **given):
        return slope * losses.ipo_loss(*numbers, **given)

    return linear_sequence_loss(*head, *completions, loss=loss, beta=0.3, group_size=2, **options).loss


@pytest.fixture(params=[logps_loss, copg, any_loss])
def loss_of(request, backend):
    """(hidden_states, lm_head_weight) -> scalar; slope is a factor of it that the operator meets inside."""
    labels, completions = torch.randint(V, (B, L), device=DEVICE), torch.randn(2, B, device=DEVICE)
    labels[1, 3:] = -100
    return lambda x, w, backend=backend, slope=1.0, **options: request.param(
        x, w, labels, completions=completions, slope=slope, backend=backend, **options
    )


def operands(dtype=torch.float32, frozen_head: bool = False) -> list[torch.Tensor]:
    hidden_states, weight = torch.randn(B, L, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    return [hidden_states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen_head)]


def autocast(dtype=torch.bfloat16):
    return torch.autocast(DEVICE.type, dtype)


# Autocast


@pytest.mark.parametrize("sparse_eps", [None, 1e-3], ids=["exact", "sparse"])
@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen head"])
def test_autocast_rounds_nothing_within(loss_of, frozen_head, sparse_eps):
    """Whoever wants 16 bits casts the operands: the products inside are of what was passed."""
    inputs = operands(frozen_head=frozen_head)
    leaves = [x for x in inputs if x.requires_grad]
    found = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            loss = loss_of(*inputs, sparse_eps=sparse_eps)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
    assert found[0][0].dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_in_the_dtype_of_autocast(loss_of, backend, dtype):
    """Hidden states come out of the model in it; the head, float32 as its optimiser wants it, is cast."""
    body, weight = nn.Linear(H, H, device=DEVICE), operands()[1]
    with autocast(dtype):
        hidden_states = body(torch.randn(B, L, H, device=DEVICE))
        with pytest.raises(TypeError, match=f"lm_head_weight must be {str(dtype).removeprefix('torch.')}, got float32"):
            loss_of(hidden_states, weight)
        loss = loss_of(hidden_states, weight.to(dtype))
    rounded = [x.detach().to(dtype).requires_grad_() for x in (hidden_states, weight)]
    expected = loss_of(*rounded)
    expected.backward()
    loss.backward()
    assert torch.equal(loss, expected)
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, rounded[1].grad.float())
    assert body.weight.grad.dtype == torch.float32 and body.weight.grad.abs().max() > 0


# Gradient scaling


def stepped(loss_of, inputs: list[torch.Tensor], scale: float | None) -> tuple[list[torch.Tensor], float | None]:
    """The parameters after one step, and the scale after it."""
    parameters = [x.detach().clone().requires_grad_() for x in inputs]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    if scale is None:
        loss_of(*parameters).backward()
        optimizer.step()
        return parameters, None
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
    scaler.scale(loss_of(*parameters)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return parameters, scaler.get_scale()


def test_a_scaled_loss_takes_the_same_step(loss_of):
    """To the bit: a power of two only moves exponents."""
    inputs = operands()
    expected, _ = stepped(loss_of, inputs, None)
    parameters, scale = stepped(loss_of, inputs, 2.0**16)
    assert scale == 2.0**16 and not torch.equal(parameters[0], inputs[0])
    assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=True))


def test_infinite_gradients_skip_the_step(loss_of):
    inputs = operands()
    parameters, scale = stepped(loss_of, inputs, 2.0**127)
    assert scale == 2.0**126
    assert all(torch.equal(*pair) for pair in zip(parameters, inputs, strict=True))


@pytest.mark.parametrize("frozen_head", [False, True], ids=["trainable", "frozen head"])
def test_scaling_saves_small_float16_gradients(loss_of, frozen_head):
    """1e-12 of a gradient is nothing in float16; scaled, it arrives with the digits that float16 has.

    The loss is small inside the operator, and the scale comes after it, as from a gradient scaler.
    """
    inputs = operands(torch.float16, frozen_head)

    def gradients(scale: float, dtype: torch.dtype, **options) -> tuple[torch.Tensor, ...]:
        values = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
        loss = scale * loss_of(*values, slope=2.0**-40, **options)
        return torch.autograd.grad(loss, [x for x in values if x.requires_grad])

    assert not any(gradient.any() for gradient in gradients(1.0, torch.float16))
    scaled = gradients(2.0**40, torch.float16)
    # The truth takes float64, which kernels do not.
    base, gold = (gradients(2.0**40, dtype, backend="torch") for dtype in (torch.float32, torch.float64))
    for gradient, in_float32, exact in zip(scaled, base, gold, strict=True):
        assert gradient.dtype == torch.float16
        assert_close(f"gradient of shape {tuple(exact.shape)}", gradient, in_float32, exact)


REDUCTIONS = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
SPLITS = [f"{name}_split_k" for name in REDUCTIONS]


def shortcuts(*names: str) -> list[bool]:
    return [getattr(torch.backends.cuda.matmul, name) for name in names]


@pytest.fixture
def allowed():
    """cuBLAS may add up in 16 bits: the reductions by torch's default, the accumulation because it is set here."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield [*REDUCTIONS, "allow_fp16_accumulation"]
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_no_sum_of_a_product_is_cut_short(allowed, monkeypatch, backend):
    seen, multiply, splits = [], torch.mm, shortcuts(*SPLITS)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.append(shortcuts(*allowed)), multiply(*a, **k))[1])
    x, w = (torch.randn(n, 16, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for n in (8, 40))
    operands = (x.view(4, 2, 16), w, torch.randint(40, (4, 2), device=DEVICE), *torch.randn(2, 4, device=DEVICE))
    linear_copg_loss(*operands, beta=0.1, group_size=2, backend=backend).loss.backward()
    assert seen and not any(any(settings) for settings in seen)
    assert all(shortcuts(*allowed)) and shortcuts(*SPLITS) == splits


def test_settings_come_back_with_the_last_thread(allowed):
    """The second thread enters while the first is within, and stays longer."""
    entered, first_left = Event(), Event()

    def longer() -> None:
        with sums_in_full():
            entered.set()
            first_left.wait(10)
            assert not any(shortcuts(*allowed))

    with ThreadPoolExecutor(1) as pool:
        with sums_in_full():
            future = pool.submit(longer)
            assert entered.wait(10)
        first_left.set()
        future.result()
    assert all(shortcuts(*allowed))
