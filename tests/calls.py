"""Calls of the operators that between them launch every kernel in every form.

The same calls are executed in the interpreter against float64 (test_launches.py) and recorded for the compile gate
(compile_report.py), which knows no other list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from copg_kernels import linear_copg_loss, linear_logps, linear_logps_and_entropy, linear_token_statistics
from copg_kernels.kernels import product_slices
from copg_kernels.kernels.head import Head, finish_torch
from copg_kernels.reference import copg_loss_ref, linear_entropy_ref, linear_logps_ref, sequence_logps_ref
from copg_kernels.schedules import compact_tiles
from copg_kernels.schedules.workspace import kept_bytes_per_token, least_workspace_bytes
from copg_kernels.tuned import Settings, trying

OPERATORS = ("logps", "frozen", "entropy", "statistics", "frozen statistics", "copg", "average", "bonus")
OPERATORS += ("sparse logps", "sparse copg", "overflow", "chunks")
ENTROPY_COEF = 0.7
STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")
PLAIN_HEAD: dict[str, Any] = dict(logit_scale=1.0, softcap=None, temperature=1.0)
# Tokens, vocabulary, hidden size: primes, one, multiples of the interpreter's blocks of 16, 32 and 32, one more, and a
# hidden size that is only a multiple of 16.
PRIME, ONE, MULTIPLE, ONE_MORE, ALIGNED = (19, 67, 31), (2, 1, 1), (16, 64, 32), (17, 65, 33), (17, 33, 48)
EVEN = (640, 256, 128)  # multiples of every GPU's blocks
NARROW = (19, 67, 1)  # whose gradient of the weight is small enough that two chunks are worth it
PLAIN: dict[str, Any] = {}
FULL: dict[str, Any] = dict(bias=True, softcap=6.0, logit_scale=0.8, temperature=1.25)


class Call(NamedTuple):
    """One operator on random operands."""

    operator: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    options: dict[str, Any]
    way: str = "fused"

    def __str__(self) -> str:
        form = "+".join(self.options) if self.options else "plain"
        way = "" if self.way == "fused" else f" {self.way}"
        return f"{self.operator} {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]} {form}{way}"


class Outcome(NamedTuple):
    """What a call returned; gradients of hidden states, weight and bias, where they are trained."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def calls(
    shapes: list, dtypes: list[torch.dtype], options: list[dict], operators=OPERATORS, way: str = "fused"
) -> Iterator[Call]:
    """Every combination that the operators take."""
    for operator, shape, dtype, chosen in product(operators, shapes, dtypes, options):
        call = Call(operator, shape, dtype, chosen, way)
        one_group = operator == "chunks" and shape[0] < 15
        if not (one_group or dtype == torch.float16 and sparse(call)):
            yield call


def operands(call: Call, device: torch.device) -> dict[str, Tensor]:
    """Hidden states, weight, labels (every fifth ignored) and bias; the same for equal calls."""
    T, V, H = call.shape
    torch.manual_seed(T + V + H)
    weight = torch.randn(V, H) * (3.0 / H**0.5)
    labels = torch.randint(V, (T,))
    hidden_states = torch.randn(T, H)
    hidden_states[::4] += 2 * weight[labels[::4]]  # confident tokens
    labels[2::5] = -100
    tensors = dict(hidden_states=hidden_states, lm_head_weight=weight)
    if call.options.get("bias"):
        tensors["bias"] = torch.randn(V)
    floats = {name: value.to(device, call.dtype) for name, value in tensors.items()}
    return dict(floats, labels=labels.to(device))


def completions(call: Call, device: torch.device) -> dict[str, Any]:
    """Two completions that make one group, or five of other lengths in two groups."""
    T = call.shape[0]
    lengths = [0, T // 5, 2 * T // 5, T // 2, 7 * T // 10, T]
    edges, groups = ([0, 1, T], [0, 2]) if T < 15 else (lengths, [0, 2, 5])
    count = len(edges) - 1
    integers = dict(dtype=torch.int32, device=device)
    return dict(
        ref_logps=torch.linspace(-9.0, -5.0, count, device=device),
        rewards=torch.linspace(1.0, -1.0, count, device=device) ** 3,
        cu_seqlens=torch.tensor(edges, **integers),
        cu_groups=torch.tensor(groups, **integers),
        beta=0.3,
    )


def run(call: Call, inputs: dict[str, Tensor], batch: dict[str, Any], backend: str) -> Outcome:
    """Forward and backward pass of the call."""
    options = {name: value for name, value in call.options.items() if name != "bias"} | dict(backend=backend)
    trained = ["hidden_states"] if _is_frozen(call) else [name for name in inputs if name != "labels"]
    leaves = {name: inputs[name].detach().requires_grad_() for name in trained}
    operands = inputs | leaves
    if "loss" in _values_of(call):
        options |= dict(average_logps=call.operator == "average", return_entropy=call.operator == "average")
        if call.operator == "bonus":
            options |= dict(entropy_coef=ENTROPY_COEF, return_entropy=True)
        if call.operator == "chunks":
            options |= dict(workspace_bytes=workspace_of_a_group(inputs["lm_head_weight"], batch))
        out = linear_copg_loss(**operands, **batch, **options | sparse(call))
        values = dict(logps=out.logps, loss=out.loss) | ({} if out.entropy is None else dict(entropy=out.entropy))
        scalar = out.loss
    elif call.operator == "entropy":
        values = dict(zip(("logps", "entropy"), linear_logps_and_entropy(**operands, **options), strict=True))
        scalar = upstream(values["logps"]) + upstream(values["entropy"].flip(0))
    elif call.operator.endswith("statistics"):
        names = dict(outputs=STATISTICS, expected_gradients="logps")
        logps, _, *statistics = linear_token_statistics(**operands, **options, **names)
        values = dict(zip(("logps", *STATISTICS), (logps, *(x.to(logps.dtype) for x in statistics)), strict=True))
        scalar = upstream(logps)
    else:
        values = dict(logps=linear_logps(**operands, **options | sparse(call)))
        scalar = upstream(values["logps"])
    gradients = torch.autograd.grad(scalar, list(leaves.values()))
    return Outcome({name: value.detach() for name, value in values.items()}, dict(zip(leaves, gradients, strict=True)))


def upstream(logps: Tensor) -> Tensor:
    """A scalar with another derivative for every token."""
    return (logps * torch.linspace(-1.0, 1.0, logps.numel(), dtype=logps.dtype, device=logps.device)).sum()


def sparse(call: Call) -> dict[str, float]:
    """Every entry of at least 1e-12 is kept, so that the compact softmax is the whole one."""
    return dict(sparse_eps=1e-12) if call.operator.startswith(("sparse", "overflow", "chunks")) else {}


def workspace_of_a_group(weight: Tensor, batch: dict[str, Any]) -> int:
    """Bytes for the kept tile of the largest group and not of both, where the least workspace is no more."""
    edges, (V, H) = batch["cu_seqlens"][batch["cu_groups"].long()], weight.shape
    least = least_workspace_bytes(int(edges[-1]), H, weight.dtype, weight.device, "triton")
    return max(least, int(edges.diff().max()) * kept_bytes_per_token(V, weight.dtype, weight.device, "triton"))


@contextmanager
def room(call: Call) -> Iterator[None]:
    """Slots for all entries; for hardly any, where the call is about an overflow. Slices of one split each."""
    share = 0.01 if call.operator == "overflow" else 1.0
    with (
        mock.patch.multiple(compact_tiles, MOST_KEPT=share, MOST_OF_BOTH=2.0),
        mock.patch.object(product_slices, "SLICE_BYTES", 1),
        trying(Settings(logps=call.way, loss=call.way)),
    ):
        yield


def reference(call: Call, inputs: dict[str, Tensor], batch: dict[str, Any], dtype: torch.dtype) -> Outcome:
    """The same in plain PyTorch, in `dtype`."""
    leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in inputs.items() if n != "labels"}
    options = {name: value for name, value in call.options.items() if name != "bias"}
    logps = linear_logps_ref(**leaves, labels=inputs["labels"], **options)
    if "loss" in _values_of(call):
        others = {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch.items()}
        average = dict(average=call.operator == "average")
        sequences = sequence_logps_ref(logps, inputs["labels"], cu_seqlens=batch["cu_seqlens"], **average)
        groups = {name: others[name] for name in ("ref_logps", "rewards", "cu_groups", "beta")}
        scalar = copg_loss_ref(sequences, **groups)
        values = dict(logps=sequences, loss=scalar)
    else:
        values, scalar = dict(logps=logps), upstream(logps)
    if "entropy" in _values_of(call):
        values["entropy"] = linear_entropy_ref(**leaves, labels=inputs["labels"], **options)
    if call.operator.endswith("statistics"):
        values |= _statistics(leaves, inputs["labels"], **options)
    if call.operator == "entropy":
        scalar = scalar + upstream(values["entropy"].flip(0))
    if call.operator == "bonus":
        scalar = scalar - ENTROPY_COEF * values["entropy"].sum() / (inputs["labels"] != -100).sum()
        values["loss"] = scalar
    trained = ["hidden_states"] if _is_frozen(call) else list(leaves)
    gradients = torch.autograd.grad(scalar, [leaves[name] for name in trained])
    return Outcome({n: x.detach() for n, x in values.items()}, dict(zip(trained, gradients, strict=True)))


def _statistics(leaves: dict[str, Tensor], labels: Tensor, **options: Any) -> dict[str, Tensor]:
    """From all logits: log-probabilities of every entry as if it were the label, and the mean logit of the head."""
    V = leaves["lm_head_weight"].shape[0]
    rows = leaves | dict(hidden_states=leaves["hidden_states"].unsqueeze(1).expand(-1, V, -1))
    log_p = linear_logps_ref(**rows, labels=torch.arange(V, device=labels.device).expand(len(labels), V), **options)
    head = Head(leaves["lm_head_weight"], None, *(options.get(name, value) for name, value in PLAIN_HEAD.items()))
    logits = finish_torch(torch.nn.functional.linear(leaves["hidden_states"], head.weight, leaves.get("bias")), head)
    values = dict(
        log_sum_sq_probs=(2 * log_p).logsumexp(1),
        mean_logits=logits.mean(1),
        is_top1=(log_p.argmax(1) == labels).to(log_p.dtype),
    )
    return {name: value.where(labels != -100, 0.0) for name, value in values.items()}


def _is_frozen(call: Call) -> bool:
    return call.operator.startswith("frozen")


def _values_of(call: Call) -> tuple[str, ...]:
    losses = dict.fromkeys(("copg", "sparse copg", "overflow", "chunks"), ("logps", "loss"))
    losses |= dict.fromkeys(("average", "bonus"), ("logps", "loss", "entropy"))
    return (losses | dict(entropy=("logps", "entropy"))).get(call.operator, ("logps",))
