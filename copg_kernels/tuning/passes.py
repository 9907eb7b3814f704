"""What is timed, on what, and what it has to return."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels.copg import linear_copg_loss
from copg_kernels.kernels.matmul import sums_in_full
from copg_kernels.linear_logps import linear_logps
from copg_kernels.reference import copg_coefficients_ref, linear_logps_bwd_ref, linear_logps_ref

LOG_PROBS, UPSTREAM, TRAINABLE, FROZEN = "log-probs", "any gradient", "loss+gradients", "frozen head"
PASSES = (LOG_PROBS, UPSTREAM, TRAINABLE, FROZEN)
COMPLETIONS, GROUP_SIZE, BETA = 8, 2, 0.1
# It leaves entries out by design, and 3e-3 of the gradients with them.
SPARSE_EPS, SPARSE_ERROR = 2.0**-14, 1e-2
# Standard deviation of the logits: of a model after reinforcement learning, whose next token is nearly certain, and of
# no model at all, where every token is about as likely as another.
REGIMES = {"peaked": 5.76, "flat": 1.0}
# Beyond these it is another computation: nats of a token's log-prob, relative L2 of a gradient. Rounding stays below a
# third of them.
BOUNDS = {torch.float32: (2e-3, 2e-3), torch.bfloat16: (1e-2, 2e-2), torch.float16: (1e-2, 2e-2)}
_CHUNK_BYTES = 2**26
_ROWS_AT_ONCE = 8192

Run = Callable[[], tuple[Tensor, ...]]
_RETURNED = {
    LOG_PROBS: ("log-probs",),
    UPSTREAM: ("hidden gradients", "head gradients"),
    TRAINABLE: ("hidden gradients", "head gradients", "log-probs"),
    FROZEN: ("hidden gradients", "log-probs"),
}


class Head(NamedTuple):
    """Of a model."""

    dtype: torch.dtype
    vocab_size: int
    hidden_size: int


class Case(NamedTuple):
    """Completions of one head, in groups, and what the reference makes of them."""

    hidden_states: Tensor  # (N, L, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N, L)
    ref_logps: Tensor  # (N,)
    rewards: Tensor  # (N,)
    dlogps: Tensor  # (N, L) some gradient of the log-probs
    truth: dict[str, tuple[Tensor, ...]]  # by pass

    def runs(self, sparse_eps: float | None = None) -> dict[str, Run]:
        """The passes, as calls that return what their caller gets."""
        operands = (self.hidden_states, self.weight)

        def loss(weight: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
            inputs = (self.hidden_states, weight, self.labels, self.ref_logps, self.rewards)
            options: dict[str, Any] = dict(beta=BETA, group_size=GROUP_SIZE, sparse_eps=sparse_eps, backend="triton")
            output = linear_copg_loss(*inputs, **options)
            return *torch.autograd.grad(output.loss, trained), output.logps

        def logps() -> Tensor:
            return linear_logps(*operands, self.labels, sparse_eps=sparse_eps, backend="triton")

        def without_gradients() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (logps(),)

        return {
            LOG_PROBS: without_gradients,
            UPSTREAM: lambda: torch.autograd.grad(logps(), operands, self.dlogps),
            TRAINABLE: lambda: loss(self.weight, *operands),
            FROZEN: lambda: loss(self.weight.detach(), self.hidden_states),
        }

    def wrong(self, name: str, returned: tuple[Tensor, ...], by_design: float = 0.0) -> str | None:
        """How far a pass is from the reference, where that is too far; gradients may be off `by_design`."""
        bound_logps, bound_gradient = BOUNDS[self.weight.dtype]
        for what, value, truth in zip(_RETURNED[name], returned, self.truth[name], strict=True):
            if what.endswith("gradients"):
                error, bound = _relative_l2(value, truth), max(bound_gradient, by_design)
            else:
                # Of independent errors, the sum over a completion has the root of its length.
                error = (value.double() - truth).abs().max().item()
                bound = bound_logps * math.sqrt(self.labels.numel() / truth.numel())
            if not error <= bound:  # NaN neither
                return f"{what} of {name} are off by {error:.1e}"
        return None


def make_case(head: Head, num_tokens: int, device: torch.device, regime: str = "peaked") -> Case:
    """Random hidden states and a random head; of each row's logits, one stands out with the row's label on it."""
    generator = torch.Generator(device).manual_seed(0)
    randn = partial(torch.randn, generator=generator, device=device)
    V, H, deviation = head.vocab_size, head.hidden_size, REGIMES[regime]
    weight = randn((V, H)) / math.sqrt(H)
    hidden_states = deviation * randn((num_tokens, H))
    labels = torch.randint(V, (num_tokens,), generator=generator, device=device)
    if regime == "peaked":
        peaks = deviation * (3 + randn((num_tokens, 1)))
        direction = weight[labels]
        hidden_states += peaks * direction / direction.square().sum(1, keepdim=True)
    shape = (COMPLETIONS, num_tokens // COMPLETIONS)
    case = Case(
        hidden_states.to(head.dtype).view(*shape, H).requires_grad_(),
        weight.to(head.dtype).requires_grad_(),
        labels.view(shape),
        randn((COMPLETIONS,)),  # beside the policy, whose log-probs come below
        randn((COMPLETIONS,)),
        randn(shape),
        {},
    )
    del weight, hidden_states
    return _with_truth(case)


@torch.no_grad()
def _with_truth(case: Case) -> Case:
    """In float64 on a CPU; in float32 on a GPU, many of which have next to no float64."""
    dtype = torch.float32 if case.weight.is_cuda else torch.float64
    weight, labels = case.weight.to(dtype), case.labels.view(-1)
    hidden_states = case.hidden_states.view(labels.numel(), -1)
    size = max(1, _CHUNK_BYTES // (dtype.itemsize * len(weight)))
    chunks = list(zip(hidden_states.split(size), labels.split(size), strict=True))
    with sums_in_full(), _no_tf32():
        logps = torch.cat([linear_logps_ref(rows.to(dtype), weight, y) for rows, y in chunks])
        case = case._replace(ref_logps=case.ref_logps + logps.view_as(case.labels).sum(1).float())
        sequences = (logps.double().view_as(case.labels).sum(1), case.ref_logps.double(), case.rewards.double())
        coefficients = copg_coefficients_ref(*sequences, beta=BETA, group_size=GROUP_SIZE)
        of_loss = coefficients.repeat_interleave(case.labels.shape[1])
        gradients = []
        for upstream in (case.dlogps.view(-1), of_loss):
            dhidden, dweight = [], torch.zeros_like(weight)
            for (rows, y), dlogps in zip(chunks, upstream.to(dtype).split(size), strict=True):
                dx, dw, _ = linear_logps_bwd_ref(dlogps, rows.to(dtype), weight, y)
                dhidden.append(dx)
                dweight += dw
            gradients.append((torch.cat(dhidden).view_as(case.hidden_states), dweight))
    upstream_gradients, loss_gradients = gradients
    by_token, by_completion = logps.view_as(case.labels), sequences[0]
    truth = (
        (by_token,),
        upstream_gradients,
        (*loss_gradients, by_completion),
        (loss_gradients[0], by_completion),
    )
    return case._replace(truth=dict(zip(PASSES, truth, strict=True)))


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Whatever the process allows its float32 products, the reference's are whole."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _relative_l2(value: Tensor, truth: Tensor) -> float:
    # A few rows at a time, so that a copy of a (V, H) gradient in float64 is never whole.
    difference = norm = 0.0
    rows = zip(value.flatten(0, -2).split(_ROWS_AT_ONCE), truth.flatten(0, -2).split(_ROWS_AT_ONCE), strict=True)
    for actual, exact in rows:
        difference += (actual.double() - exact.double()).square().sum().item()
        norm += exact.double().square().sum().item()
    return math.sqrt(difference / norm) if norm else math.inf
