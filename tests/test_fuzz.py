"""Random calls of every operator against float64: `--fuzz-cases 20000` for more of them, `--fuzz-first N` for others.

What a run finds is reduced to a test with a name, in the file of its module.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from copg_kernels import (
    copg_loss,
    linear_copg_loss,
    linear_logps,
    linear_logps_and_entropy,
    linear_sequence_loss,
    losses,
)
from copg_kernels.kernels import significant_columns
from copg_kernels.schedules import compact_tiles
from tests import by_hand
from tests.conftest import BACKENDS, DEVICE
from tests.fuzz import LOSSES, Case, Truth, assert_near, draw, relayout
from tests.numerics import FLOAT32_FACTOR

pytestmark = pytest.mark.usefixtures("one_thread")

# Of --fuzz-cases, the share that each operator gets: kernels that are interpreted take a hundred times as long.
SHARES = {"logps": 0.2, "copg": 0.5, "sequence": 0.3}
DEFAULT_CASES = {"torch": 1000, "triton": 40}


def numbers(config: pytest.Config, kind: str, backend: str) -> range:
    total = config.getoption("--fuzz-cases") or DEFAULT_CASES[backend]
    first = config.getoption("--fuzz-first")
    return range(first, first + max(1, int(total * SHARES.get(kind, 1.0))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHARES)
def test_operators(kind, backend, pytestconfig, monkeypatch):
    for number in numbers(pytestconfig, kind, backend):
        case = draw(number, backend, kind)
        # A vocabulary of a few hundred entries is dense: let it be compact all the same, sometimes.
        monkeypatch.setattr(compact_tiles, "MOST_KEPT", case.most_kept)
        monkeypatch.setattr(significant_columns, "MOST_KEPT", case.most_kept)
        before = {name: x.clone() for name, x in tensors_of(case).items()}
        try:
            {"logps": check_logps, "copg": check_copg, "sequence": check_sequence_loss}[kind](case)
            for name, x in tensors_of(case).items():
                assert torch.equal(x.nan_to_num(7.0), before[name].nan_to_num(7.0)), f"{name} was written to"
        except Exception as error:
            raise AssertionError(f"{case}\n{type(error).__name__}: {error}") from error


def tensors_of(case: Case) -> dict[str, Tensor]:
    return {name: x for name, x in (case.operands | case.completions).items() if isinstance(x, Tensor)}


def leaves_of(case: Case) -> dict[str, Tensor]:
    """The operands as leaves of a graph, in their layouts."""
    return {
        name: x if x is None or name == "labels" else x.detach().requires_grad_(name in case.trains)
        for name, x in case.operands.items()
    }


def assert_gradients(
    case: Case,
    truth: Truth,
    value: Tensor,
    leaves: dict[str, Tensor],
    dlogps: Tensor,
    dentropy: Tensor | None = None,
    slope_error: float = 0.0,
) -> None:
    """Twice through one graph, with the first gradients overwritten in between: as clipping and zero_grad do it."""
    inputs = [leaves[name] for name in case.trains]
    if not inputs:
        assert not value.requires_grad
        return
    upstream = torch.full_like(value, case.upstream)
    first = torch.autograd.grad(value, inputs, upstream, retain_graph=True)
    kept = second = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    if case.backend == "torch" or case.number % 4 == 0:  # it takes an interpreted kernel as long as the first
        second = torch.autograd.grad(value, inputs, upstream)
    scaled = None if dentropy is None else dentropy * case.upstream
    for name, once, again in zip(case.trains, kept, second, strict=True):
        truth.assert_gradient(name, once, dlogps * case.upstream, scaled, slope_error * abs(case.upstream))
        assert torch.equal(once, again), f"gradient of {name} differs in the second backward pass"
        if name == "hidden_states":
            ignored = ~truth.counted.view(once.shape[:-1])
            assert (once[ignored] == 0).all(), "an ignored token got a gradient"


def check_logps(case: Case) -> None:
    truth, leaves, options = Truth(case), leaves_of(case), dict(case.options)
    rng = random.Random(case.number)
    entropy = dentropy = None
    if options["sparse_eps"] is None and rng.random() < 0.4:
        options["expected_gradients"] = random.Random(f"expected {case.number}").choice(["logps", "entropy", "both"])
        del options["sparse_eps"]
        per_token_logps, entropy = linear_logps_and_entropy(**leaves, **options)
        assert_near("entropy", entropy.detach().flatten(), truth.entropy(), 4 * FLOAT32_FACTOR * truth.spacing)
    else:
        per_token_logps = linear_logps(**leaves, **options)
    is_double = leaves["hidden_states"].dtype == torch.float64
    assert per_token_logps.dtype == (torch.float64 if is_double else torch.float32)
    assert_near("logps", per_token_logps.detach().flatten(), truth.token_logps(), FLOAT32_FACTOR * truth.spacing)
    _, dlogps = relayout(rng, torch.randn(per_token_logps.shape).to(per_token_logps), expandable=True)
    slopes = dlogps.reshape(-1)
    if dlogps.dim() and rng.random() < 0.3:
        dlogps = dlogps.clone(memory_format=torch.contiguous_format)
        dlogps.view(-1)[~truth.counted] = float("nan")
    value = (per_token_logps * dlogps).sum() if rng.random() < 0.5 else _Upstream.apply(per_token_logps, dlogps)
    if entropy is not None and rng.random() < 0.7:
        _, weights = relayout(rng, torch.randn(entropy.shape).to(entropy), expandable=True)
        dentropy = weights.reshape(-1)
        value = value + _Upstream.apply(entropy, weights)
    assert_gradients(case, truth, value, leaves, slopes, dentropy)


class _Upstream(torch.autograd.Function):
    """Hands dlogps back just as it is laid out."""

    @staticmethod
    def forward(ctx, per_token_logps, dlogps):
        ctx.dlogps = dlogps
        return per_token_logps.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return ctx.dlogps if upstream == 1.0 else ctx.dlogps * upstream, None


def assert_logps(case: Case, truth: Truth, output) -> None:
    """Log-probabilities against the truth, and what follows from them against float64 of them."""
    is_average, given = case.completions["average_logps"], case.completions
    tokens = truth.token_logps()
    sums = torch.stack([tokens[part].mean() if is_average else tokens[part].sum() for part in truth.segments()])
    counts = torch.tensor([1 if is_average else len(part) for part in truth.segments()], device=DEVICE)
    allowed = FLOAT32_FACTOR * (truth.spacing * counts + truth.epsilon * sums.abs())
    assert_near("logps", output.logps, sums, allowed)
    log_ratios = output.logps.double() - given["ref_logps"].double()
    regularized_rewards = given["rewards"].double() - given["beta"] * log_ratios
    for name, exact in dict(log_ratios=log_ratios, regularized_rewards=regularized_rewards).items():
        assert_near(name, getattr(output, name), exact, 2 * truth.epsilon * exact.abs())
    assert not any(value.requires_grad for value in output[1:5]) and output.loss.shape == ()
    if output.entropy is not None:
        assert_near("entropy", output.entropy.flatten(), truth.entropy(), 4 * FLOAT32_FACTOR * truth.spacing)


def token_slopes(case: Case, truth: Truth, dlogps: Tensor) -> Tensor:
    """(N,) -> (T,)"""
    slopes = truth.x.new_zeros(len(truth.labels))
    for slope, part in zip(dlogps, truth.segments(), strict=True):
        slopes[part] = slope / len(part) if case.completions["average_logps"] else slope
    return slopes


def slopes_of(loss, output, case: Case) -> tuple[Tensor, Tensor]:
    """Value and dloss/dlogps in float64, at the operator's own log-probabilities."""
    logps = output.logps.detach().double().requires_grad_()
    given = {name: x for name, x in case.completions.items() if name not in ("average_logps", "cu_seqlens")}
    value = loss(
        logps, **{k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in given.items()}
    )
    return value.detach(), torch.autograd.grad(value, logps)[0]


def fused_options(case: Case, rng: random.Random) -> dict:
    wants_entropy = case.options["sparse_eps"] is None and rng.random() < 0.3
    coefs = [0.0] if case.options["sparse_eps"] else [0.0, 0.0, 0.02, -0.02, 1.0]
    coef = random.Random(f"coef {case.number}").choice(coefs)
    return case.options | case.completions | dict(return_entropy=wants_entropy, entropy_coef=coef)


def bonus(truth: Truth, output, coef: float) -> tuple[Tensor, Tensor | None, float]:
    """What is subtracted from the loss, the slope of each token's entropy, and what the first may be off by."""
    if not coef:
        return truth.x.new_zeros(()), None, 0.0
    num_counted, allowed = truth.counted.sum().double(), 4 * FLOAT32_FACTOR * truth.spacing
    assert_near("mean entropy", output.mean_entropy, truth.entropy().sum() / num_counted, allowed)
    return coef * output.mean_entropy.double(), torch.full_like(truth.x[:, 0], -coef / num_counted), abs(coef) * allowed


def check_copg(case: Case) -> None:
    truth, leaves = Truth(case), leaves_of(case)
    options = fused_options(case, random.Random(case.number))
    output = linear_copg_loss(**leaves, **options)
    assert_logps(case, truth, output)
    value, dlogps = slopes_of(copg_loss, output, case)
    # A contrast is a difference of float64 numbers.
    beta, rewards = case.completions["beta"], case.completions["rewards"].double()
    lost = 1e-15 * (rewards.abs().max() + beta * output.log_ratios.double().abs().max()).item()
    allowed = 4 * truth.epsilon * value + 4 * lost * (lost + (beta * value) ** 0.5) / beta
    subtracted, dentropy, off = bonus(truth, output, options["entropy_coef"])
    assert_near("loss", output.loss, value - subtracted, allowed + off)
    slopes = token_slopes(case, truth, dlogps)
    assert_gradients(case, truth, output.loss, leaves, slopes, dentropy, slope_error=lost)


def check_sequence_loss(case: Case) -> None:
    """Any loss, and a tensor of its own that trains."""
    rng = random.Random(case.number)
    takes_ragged = "cu_groups" in case.completions
    name = rng.choice([name for name, (_, any_groups) in LOSSES.items() if any_groups or not takes_ragged])
    truth, leaves, loss = Truth(case), leaves_of(case), LOSSES[name][0]
    scale = torch.tensor(1.5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    calls = []

    def with_scale(logps: Tensor, *others: Tensor, **options) -> Tensor:
        calls.append(logps.detach().clone())
        return loss(logps, *others, **options) * scale.to(logps.dtype)

    with_scale.separable = getattr(loss, "separable", False)
    options = fused_options(case, rng)
    output = linear_sequence_loss(**leaves, **options, loss=with_scale)
    assert with_scale.separable or len(calls) == 1, f"{name} was called {len(calls)} times"
    assert torch.equal(calls[-1], output.logps)
    assert_logps(case, truth, output)
    value, dlogps = slopes_of(loss, output, case)
    allowed = 8 * truth.epsilon * value.abs() + torch.finfo(output.loss.dtype).smallest_normal
    subtracted, dentropy, off = bonus(truth, output, options["entropy_coef"])
    assert_near(name, output.loss, 1.5 * value - subtracted, allowed + off)
    (dscale,) = torch.autograd.grad(output.loss, scale, retain_graph=True)
    assert_near(f"{name}'s own gradient", dscale, value, allowed)
    if case.trains:
        assert_gradients(case, truth, output.loss, leaves, 1.5 * token_slopes(case, truth, dlogps), dentropy)


BY_HAND = {
    "copg": (copg_loss, by_hand.copg, {}),
    "rloo": (losses.rloo_loss, by_hand.rloo, {}),
    "reinforce": (losses.reinforce_loss, by_hand.reinforce, dict(baseline=0.5)),
    "raft": (losses.raft_loss, by_hand.raft, {}),
    "ppo": (losses.ppo_loss, by_hand.ppo, dict(clip=0.2)),
    "ipo": (losses.ipo_loss, by_hand.ipo, {}),
    "dpo": (losses.dpo_loss, by_hand.dpo, {}),
    "rebel": (losses.rebel_loss, by_hand.rebel, {}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_losses(name, pytestconfig):
    """On log-probabilities, against Python's own floats: every dtype, layout and scale."""
    for number in numbers(pytestconfig, name, "torch"):
        rng = random.Random(f"{name} {number}")
        torch.manual_seed(number)
        try:
            check_loss(rng, *BY_HAND[name])
        except Exception as error:
            raise AssertionError(f"{name}, case {number}: {type(error).__name__}: {error}") from error


def check_loss(rng: random.Random, loss, equation, extra: dict) -> None:
    k, G = rng.randint(2, 5), rng.randint(1, 4)
    N, beta = k * G, rng.choice([1e-3, 0.1, 1.0, 10.0])

    def numbers_like(scale: float, offset: float = 0.0) -> Tensor:
        dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        if dtype != torch.float64:
            offset = min(offset, 1000.0)
        return relayout(rng, (torch.randn(N) * scale + offset).to(dtype).to(DEVICE), expandable=True)[1]

    # A ratio of e^90 is beyond float32, one of e^710 beyond Python.
    logps, ref_logps = (
        numbers_like(rng.choice([0.1, 3.0, 30.0 if "clip" in extra else 300.0]), -50.0),
        numbers_like(3.0, -50.0),
    )
    rewards = numbers_like(rng.choice([0.01, 1.0, 50.0]), rng.choice([0.0, 1e7, 1e12]))
    arguments, given = dict(beta=beta, group_size=k, **extra), dict(beta=beta, k=k, **extra)
    old_logps = ref_logps
    if "clip" in extra:
        old_logps = arguments["old_logps"] = numbers_like(3.0, -50.0)
        given["old_logps"] = old_logps.tolist()
    if "baseline" in extra:
        given["baseline"] = [0.5] * N
    leaf = logps.detach().requires_grad_()
    value = loss(leaf, ref_logps, rewards, **arguments)
    (slopes,) = torch.autograd.grad(value, leaf)
    exact, exact_slopes = equation(logps.tolist(), ref_logps.tolist(), rewards.tolist(), **given)
    gold, gold_slopes = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (exact, exact_slopes))
    assert value.dtype == (torch.float64 if logps.dtype == torch.float64 else torch.float32)

    # What A loses where large float64 numbers cancel, and what becomes of it: on a ratio, in nats, next to a log-prob.
    log_ratios = logps.double() - old_logps.double()
    largest = torch.cat([rewards.double(), beta * log_ratios, 1 + logps.double()]).abs().max().item()
    lost = 1e-15 * largest * (1 + 1 / beta)
    if "clip" in extra:
        lost *= log_ratios.max().exp().clamp_min(1.0).item()
    allowed = 10 * lost * (gold_slopes.abs().sum() + lost * (1 + beta) + logps.double().abs().max() + beta)
    assert_rounded("value", value.detach(), gold, allowed)
    assert_rounded("slopes", slopes, gold_slopes, 10 * lost)


def assert_rounded(name: str, actual: Tensor, gold: Tensor, allowed: float | Tensor) -> None:
    """Within `allowed` and the rounding to its own dtype, where that can hold it."""
    info = torch.finfo(actual.dtype)
    fits = gold.abs() < info.max / 2
    eps = max(info.eps, torch.finfo(torch.float32).eps)
    assert_near(name, actual[fits], gold[fits], eps * gold[fits].abs() + info.smallest_normal + allowed)
