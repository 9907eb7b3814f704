"""Numbers far from one: rewards of 1e7, ratios of e^100, logits of 4e4, temperatures of 0.005, slopes of 1e-12."""

import pytest
import torch

from copg_kernels import copg_loss, linear_copg_loss, linear_logps, losses
from copg_kernels.kernels.contrast import Completions, segment_sum
from copg_kernels.kernels.pack_rows import pack_rows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.reference import linear_copg_loss_ref, linear_logps_ref
from copg_kernels.schedules.tile_ops import tile_ops
from copg_kernels.schedules.workspace import least_workspace_bytes
from tests.conftest import BACKENDS, DEVICE
from tests.numerics import ROUNDING_FACTOR, relative_error, upcast

N, L, H, V = 8, 3, 16, 97


def batch(dtype=torch.float32, V=V) -> dict:
    return dict(
        hidden_states=torch.randn(N, L, H, device=DEVICE).to(dtype).requires_grad_(),
        lm_head_weight=torch.randn(V, H, device=DEVICE).to(dtype).requires_grad_(),
        labels=torch.randint(V, (N, L), device=DEVICE),
        ref_logps=torch.randn(N, device=DEVICE),
        rewards=torch.randn(N, device=DEVICE),
    )


def gradients(batch: dict, function=linear_copg_loss, **options) -> tuple[torch.Tensor, ...]:
    loss = function(**batch, **options)
    loss = loss if isinstance(loss, torch.Tensor) else loss.loss
    return torch.autograd.grad(loss, (batch["hidden_states"], batch["lm_head_weight"]))


# Rewards.


@pytest.mark.parametrize("offset", [1e7, 1e12])
@pytest.mark.parametrize("groups", ["equal", "ragged"])
def test_a_constant_of_the_group_changes_nothing(groups, offset, backend):
    """The contrast is computed in float64: in float32, rewards of 1e7 are one apart."""
    edges = dict(
        equal=dict(group_size=4), ragged=dict(cu_groups=torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE))
    )
    given, options = batch(), dict(beta=0.01, backend=backend, **edges[groups])
    expected = gradients(given, **options)
    moved = given | dict(rewards=given["rewards"].double() + offset)
    assert all(
        relative_error(*pair) < 1e-15 * offset + 1e-6
        for pair in zip(gradients(moved, **options), expected, strict=True)
    )
    logps = torch.randn(N, device=DEVICE, requires_grad=True)
    for loss in (copg_loss, losses.rloo_loss) if groups == "equal" else (copg_loss,):
        arguments = dict(beta=0.01, **edges[groups])
        slopes = [
            torch.autograd.grad(loss(logps, given["ref_logps"], rewards, **arguments), logps)[0]
            for rewards in (moved["rewards"], given["rewards"])
        ]
        assert relative_error(*slopes) < 1e-15 * offset + 1e-6


def test_whole_float32_rewards_of_1e7(backend):
    """What float32 can still hold is not lost on the way."""
    given = batch()
    given["rewards"] = 1e7 + torch.arange(float(N), device=DEVICE)
    (dhidden, dweight), options = (
        gradients(given, beta=0.01, group_size=4, backend=backend),
        dict(beta=0.01, group_size=4),
    )
    gold = gradients(upcast(given, torch.float64), linear_copg_loss_ref, **options)
    assert relative_error(dhidden, gold[0]) < 1e-5 and relative_error(dweight, gold[1]) < 1e-5


@pytest.mark.parametrize("loss", [copg_loss, losses.rloo_loss])
def test_rewards_beyond_float32(loss):
    """Infinite where float32 has no number for it, never NaN; nothing where the rewards agree."""
    logps = torch.randn(2, device=DEVICE, requires_grad=True)
    rewards = torch.tensor([1e300, 0.0], dtype=torch.float64, device=DEVICE)
    value = loss(logps, torch.zeros_like(logps), rewards, beta=0.1, group_size=2)
    slopes = torch.autograd.grad(value, logps)[0]
    assert value.isinf() and slopes.tolist() == [float("-inf"), float("inf")]
    agree = loss(logps, logps.detach(), rewards[:1].expand(2), beta=0.1, group_size=2)
    assert not torch.autograd.grad(agree, logps)[0].any()


def test_token_sums_in_float64(backend):
    """256 tokens of -2^24 nats, then 2,048 of about -1: sums of float32 would not notice the later ones."""
    T = 9 * 256
    label_logits = torch.full((T,), -0.55, device=DEVICE)
    label_logits[:256] = -(2.0**24)
    rows = pack_rows(torch.zeros(2 * T, dtype=torch.int64, device=DEVICE), -100, exact=backend == "torch")
    dtype = torch.float64 if backend == "torch" else torch.float32
    statistics = torch.stack([torch.zeros(2 * T), torch.ones(2 * T)]).to(DEVICE, dtype).unsqueeze(1)
    partials = Partials(*statistics, label_logits.repeat(2))
    edges = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, T, 2 * T], [0, 2])]
    completions = Completions(*edges, *torch.zeros(2, 2, device=DEVICE), 0.3, False, 1)
    contrast = tile_ops(backend).contrast_fwd(partials, rows, completions)
    exact = segment_sum(contrast.per_token_logps, edges[0])
    assert abs(exact[0] + 2.0**32) > 1500
    assert torch.equal(contrast.logps, exact.float())


# Ratios.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ppo_far_outside_its_region(dtype):
    """Past the edge the slope is 0, whatever exp makes of the log-ratio; so it is where the advantage is 0."""
    log_ratios = torch.tensor([100.0, 0.0, 800.0, -800.0], dtype=dtype, device=DEVICE, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=dtype, device=DEVICE)
    zeros = torch.zeros_like(rewards)
    loss = losses.ppo_loss(log_ratios, zeros, rewards, beta=1e-9, group_size=2, old_logps=zeros)
    slopes = torch.autograd.grad(loss, log_ratios)[0]
    # Advantages 1, -1, 0, 0: clipped at 1.2, inside, none, none.
    assert loss.item() == pytest.approx(-(1.2 - 1.0) / 4) and slopes.tolist() == [0.0, pytest.approx(0.25), 0.0, 0.0]


# Logits.


@pytest.mark.skipif("triton" not in BACKENDS, reason="the references of exp_tile are the kernels' own")
@pytest.mark.parametrize("temperature", [0.02, 0.005, 0.002])
def test_a_low_temperature_in_bfloat16(temperature):
    """The reference is rounded to bfloat16: at logits of 1e5 it may be 200 nats above all of them, or below.

    Blocks of two tokens, as one token that is below has its whole block computed again.
    """
    options = dict(beta=0.3, group_size=2, temperature=temperature)
    for _ in range(6):
        given = {
            name: x.detach()[:2] if name != "lm_head_weight" else x for name, x in batch(torch.bfloat16, V=50).items()
        }
        given["hidden_states"] = (40 * given["hidden_states"][:, :1]).requires_grad_()
        given["labels"] = given["labels"][:, :1]
        found = gradients(given, **options, backend="triton")
        gold = gradients(upcast(given, torch.float64), linear_copg_loss_ref, **options)
        # Of two tokens nothing averages out: tile, operand and result are rounded.
        rounding = ROUNDING_FACTOR * torch.finfo(torch.bfloat16).eps
        assert all(relative_error(*pair) <= rounding for pair in zip(found, gold, strict=True))


@pytest.mark.parametrize("sparse_eps", [None, 1e-3], ids=["recomputed", "overflow"])
@pytest.mark.parametrize("T, H, V", [(30, 33, 2000), (12, 130, 4000), (7, 64, 515), (3, 33, 515), (64, 16, 3500)])
def test_a_softmax_sums_to_one_at_logits_of_4e4(T, H, V, sparse_eps):
    """A logit that is computed again has the bits of the first one: another rounding is 4e-3 of a probability there."""
    hidden_states = torch.randn(T, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE)
    weight[V // 2 :] = weight[: V - V // 2] * (1 + 1e-7 * torch.randn(V - V // 2, 1, device=DEVICE))  # ties
    bias = torch.zeros(V, device=DEVICE, requires_grad=True)
    labels = torch.randint(V, (T,), device=DEVICE)
    for workspace in (None, least_workspace_bytes(T, H, torch.float32, DEVICE, "torch")):
        logps = linear_logps(
            hidden_states, weight, labels, bias=bias, logit_scale=1e4 / H**0.5, workspace_bytes=workspace,
            sparse_eps=sparse_eps, backend="torch",
        )  # fmt: skip
        for token in range(0, T, 5):
            (dbias,) = torch.autograd.grad(logps[token], bias, retain_graph=True)
            assert abs(dbias.double().sum()) <= 1e-5 * dbias.abs().max()


@pytest.mark.parametrize("T, H, V", [(129, 96, 600), (131, 64, 700), (140, 64, 500)])
def test_so_it_does_where_a_few_rows_overflow(T, H, V):
    """Their logits are computed again in a GEMM of fewer rows, which may sum in another order."""
    hidden_states = torch.randn(T, H, device=DEVICE)
    hidden_states[:128] *= 3e6  # certain of one token each
    hidden_states[128:] = 0.1 * hidden_states[128:] + 4e4 / H  # flat, and large
    hidden_states.requires_grad_()
    weight = 1.0 + torch.randn(V, H, device=DEVICE) * H**0.5 / 4e4
    bias = torch.zeros(V, device=DEVICE, requires_grad=True)
    labels = torch.randint(V, (T,), device=DEVICE)
    logps = linear_logps(hidden_states, weight, labels, bias=bias, sparse_eps=1e-3, backend="torch")
    assert logps.sparsity.overflow.item() == pytest.approx(1 - 128 / T)
    for token in range(128, T, 3):
        (dbias,) = torch.autograd.grad(logps[token], bias, retain_graph=True)
        assert abs(dbias.double().sum()) <= 1e-5 * dbias.abs().max()


@pytest.mark.parametrize("workspace", [None, 2**15], ids=["default", "small"])
def test_a_large_bias_where_rows_are_ignored(workspace, backend):
    """exp(bias) alone overflows: what is computed for an ignored row must not reach the products."""
    given = batch()
    given["labels"][:3, 1] = -100  # 21 rows count: their last block has others, too
    bias = torch.full((V,), 300.0, device=DEVICE)
    options = dict(bias=bias, workspace_bytes=workspace, backend=backend)
    found = torch.autograd.grad(
        linear_logps(given["hidden_states"], given["lm_head_weight"], given["labels"], **options).sum(),
        (given["hidden_states"], given["lm_head_weight"]),
    )
    wide = upcast(given | dict(bias=bias), torch.float64)
    gold = torch.autograd.grad(
        linear_logps_ref(wide["hidden_states"], wide["lm_head_weight"], wide["labels"], bias=wide["bias"]).sum(),
        (wide["hidden_states"], wide["lm_head_weight"]),
    )
    # At logits of 300 a float32 is 3e-5 from the next.
    assert all(relative_error(*pair) < 1e-4 for pair in zip(found, gold, strict=True))
