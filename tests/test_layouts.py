"""Every layout that a tensor can have gives the numbers of a contiguous one, on both backends."""

import random

import pytest
import torch

from copg_kernels import copg_loss, linear_copg_loss, linear_logps, linear_sequence_loss, losses, sequence_logps
from tests.conftest import DEVICE
from tests.fuzz import relayout

N, L, H, V = 4, 3, 16, 67
LAYOUTS = ["slice", "columns", "transposed", "misaligned"]


class Always(random.Random):
    """Chooses what it is told to."""

    def __init__(self, choice: str) -> None:
        self.chosen = choice

    def choice(self, _):
        return self.chosen


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    requires_grad = tensor.requires_grad
    return relayout(Always(layout), tensor.detach(), expandable=False)[1].requires_grad_(requires_grad)


def batch() -> dict:
    edges = torch.arange(N + 1, dtype=torch.int32, device=DEVICE)
    return dict(
        hidden_states=torch.randn(N * L, H, device=DEVICE, requires_grad=True),
        lm_head_weight=torch.randn(V, H, device=DEVICE, requires_grad=True),
        labels=torch.randint(V, (N * L,), device=DEVICE),
        bias=torch.randn(V, device=DEVICE, requires_grad=True),
        ref_logps=torch.randn(N, device=DEVICE),
        rewards=torch.randn(N, device=DEVICE),
        cu_seqlens=edges * L,
        cu_groups=edges[::2].contiguous() * 1,
    )


def logps(batch: dict, **options):
    head = {name: batch[name] for name in ("hidden_states", "lm_head_weight", "labels", "bias")}
    return linear_logps(**head, **options).square().sum()


def copg(batch: dict, **options):
    return linear_copg_loss(**batch, beta=0.3, **options).loss


def any_loss(batch: dict, **options):
    return linear_sequence_loss(**batch, loss=copg_loss, beta=0.3, **options).loss


def copg_without_gradients(batch: dict, **options):
    with torch.no_grad():
        return copg(batch, **options)


OPERATORS = [logps, copg, any_loss, copg_without_gradients]
# Changed together: each operand of the head alone among those, and a tensor of the completions with it.
TOGETHER = [
    ("hidden_states", "ref_logps"),
    ("lm_head_weight", "rewards"),
    ("labels", "cu_seqlens"),
    ("bias", "cu_groups"),
]


def outcome(operator, batch: dict, **options) -> list[torch.Tensor]:
    value = operator(batch, **options)
    leaves = [x for x in batch.values() if x.requires_grad]
    return [value, *(torch.autograd.grad(value, leaves) if value.requires_grad else [])]


@pytest.mark.parametrize("layout, sparse_eps", [*((layout, None) for layout in LAYOUTS), ("slice", 1e-9)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_argument_in_each_layout(operator, layout, sparse_eps, backend):
    given, options = batch(), dict(backend=backend, sparse_eps=sparse_eps)
    assert sorted(name for names in TOGETHER for name in names) == sorted(given)
    expected = outcome(operator, given, **options)
    for names in TOGETHER:
        changed = given | {name: laid_out(given[name], layout) for name in names}
        for actual, exact in zip(outcome(operator, changed, **options), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6, msg=lambda m, n=names: f"{n}: {m}")


@pytest.mark.parametrize("name", ["bias", "lm_head_weight", "hidden_states", "ref_logps", "rewards"])
def test_one_number_expanded_over_an_argument(name, backend):
    given = batch()
    expanded = given[name].detach()[:1].expand_as(given[name])
    pair = [given | {name: values.requires_grad_(given[name].requires_grad)} for values in (expanded, expanded.clone())]
    results = [outcome(copg, one, backend=backend) for one in pair]
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_on_log_probs(layout):
    numbers, edges = torch.randn(3, N, device=DEVICE), torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    changed = [laid_out(row, layout) for row in numbers]
    torch.testing.assert_close(
        copg_loss(*changed, beta=0.3, cu_groups=laid_out(edges, layout)), copg_loss(*numbers, beta=0.3, cu_groups=edges)
    )
    for loss in (losses.dpo_loss, losses.rloo_loss, losses.rebel_loss):
        torch.testing.assert_close(loss(*changed, beta=0.3, group_size=2), loss(*numbers, beta=0.3, group_size=2))
    tokens, labels = torch.randn(6, device=DEVICE), torch.randint(V, (6,), device=DEVICE)
    bounds = torch.tensor([0, 1, 6], dtype=torch.int32, device=DEVICE)
    torch.testing.assert_close(
        sequence_logps(*(laid_out(x, layout) for x in (tokens, labels)), cu_seqlens=laid_out(bounds, layout)),
        sequence_logps(tokens, labels, cu_seqlens=bounds),
    )


@pytest.mark.parametrize("sparse_eps", [None, 1e-3], ids=["exact", "sparse"])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)], ids=str)
def test_no_tokens_at_all(trains, sparse_eps, backend):
    hidden_states = torch.randn(N, 0, H, device=DEVICE, requires_grad=trains[0])
    weight = torch.randn(V, H, device=DEVICE, requires_grad=trains[1])
    labels = torch.zeros(N, 0, dtype=torch.int64, device=DEVICE)
    per_token_logps = linear_logps(hidden_states, weight, labels, backend=backend, sparse_eps=sparse_eps)
    assert per_token_logps.shape == (N, 0)
    per_token_logps.sum().backward()
    for x, trained in zip((hidden_states, weight), trains, strict=True):
        assert x.grad is None if not trained else (x.grad.shape == x.shape and not x.grad.any())


@pytest.mark.parametrize("sparse_eps", [None, 1e-3], ids=["exact", "sparse"])
def test_no_token_that_counts(sparse_eps, backend):
    hidden_states = torch.full((N, L, H), float("nan"), device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    labels = torch.full((N, L), -100, device=DEVICE)
    per_token_logps = linear_logps(hidden_states, weight, labels, backend=backend, sparse_eps=sparse_eps)
    assert not per_token_logps.any()
    per_token_logps.sum().backward()
    assert not hidden_states.grad.any() and not weight.grad.any()
