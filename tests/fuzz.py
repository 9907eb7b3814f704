"""Random calls of the operators and what they must give: float64 of the same operands, one step at a time.

A case is drawn from its number alone, so that a failure can be run again: shapes of one, of a block and beside it; each
tensor as a slice, a transpose, an expanded or a misaligned view, with NaN or nonsense in between; every option.

The log-probabilities are compared with those of full float64 logits. The loss and the slopes are then computed in
float64 from the operator's own log-probabilities, and the gradients from these slopes: so each step is held to what its
own arithmetic costs, and an edge such as PPO's cannot fall on either side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from copg_kernels import copg_loss, losses
from copg_kernels.schedules.workspace import least_workspace_bytes
from tests.conftest import DEVICE
from tests.numerics import FLOAT32_FACTOR, ROUNDING_FACTOR

DTYPES = {
    "torch": [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
}
# Around the interpreter's blocks of 32 and the 64 reference logits.
HIDDEN_SIZES = [1, 2, 3, 8, 16, 17, 31, 32, 33]
VOCABULARIES = {
    "triton": [1, 2, 5, 31, 32, 33, 33, 64, 65, 65, 97],
    # Several chunks need more than the 256 entries of the twins' smallest slice.
    "torch": [1, 2, 5, 31, 64, 65, 131, 256, 257, 600, 1500],
}


@dataclass
class Case:
    """One call."""

    number: int
    backend: str
    operands: dict[str, Tensor]  # hidden_states, lm_head_weight, labels, bias
    options: dict[str, Any]  # of linear_logps
    completions: dict[str, Any]  # ref_logps, rewards and how completions and groups are bounded
    trains: list[str]  # which operands require a gradient
    upstream: float  # derivative of what is differentiated by the operator's loss
    most_kept: float  # sparse gradients: the share of the vocabulary above which a block overflows
    layouts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = {name: (tuple(x.shape), str(x.dtype)[6:]) for name, x in self.operands.items() if x is not None}
        return (
            f"case {self.number} ({self.backend}): {shapes}, {self.options}, {self.completions}, layouts "
            f"{self.layouts}, trains {self.trains}, upstream {self.upstream}, most_kept {self.most_kept}"
        )


def draw(number: int, backend: str, kind: str) -> Case:
    """The case of this number; kind is the operator it is for."""
    rng = random.Random(f"{kind} {backend} {number}")
    torch.manual_seed(rng.getrandbits(32))
    dtype = rng.choice(DTYPES[backend])
    H, V = rng.choice(HIDDEN_SIZES), rng.choice(VOCABULARIES[backend])
    if rng.random() < 0.02:
        V = {"torch": 3300, "triton": 200}[backend]  # several splits
    sizes, lengths, is_packed = _sizes(rng, most_groups=3 if backend == "torch" else 2)
    labels, ignore_index = _labels(rng, lengths, is_packed, V)
    layouts: dict[str, str] = {}

    def laid_out(name: str, values: Tensor, *, expandable: bool = True) -> Tensor:
        layouts[name], tensor = relayout(rng, values.to(DEVICE), expandable)
        return tensor

    size = rng.choice([0.01, 1.0, 1.0, 4.0, 20.0]) / H**0.5
    hidden_states = torch.randn(*labels.shape, H).to(dtype)
    has_bias = rng.random() < 0.4
    operands = dict(
        hidden_states=laid_out("hidden_states", hidden_states),
        lm_head_weight=laid_out("lm_head_weight", (torch.randn(V, H) * size).to(dtype)),
        labels=laid_out("labels", labels, expandable=False),
        bias=laid_out("bias", torch.randn(V).to(dtype)) if has_bias else None,
    )
    if rng.random() < 0.3 and layouts["hidden_states"] != "expanded":
        operands["hidden_states"][(labels == ignore_index).to(DEVICE)] = float("nan")
    options = _options(rng, backend, dtype, labels.numel(), H) | dict(ignore_index=ignore_index)
    completions = _completions(rng, laid_out, sizes, lengths, is_packed)
    upstream = rng.choice([1.0, 1.0, -4.0, 0.0, 1024.0])
    if rng.random() < 0.15:  # a loss scale, and slopes that need it
        completions |= {name: completions[name] * 2.0**-30 for name in ("rewards", "beta")}
        upstream = 2.0**30
    trainable = [name for name in ("hidden_states", "lm_head_weight", "bias") if operands[name] is not None]
    trains = [name for name in trainable if rng.random() < 0.7]
    return Case(number, backend, operands, options, completions, trains, upstream, rng.choice([0.3, 1.0]), layouts)


def _sizes(rng: random.Random, most_groups: int) -> tuple[list[int], list[int], bool]:
    """Completions of each group, tokens of each completion, and whether they are packed."""
    if rng.random() < 0.6:
        sizes = [rng.randint(2, 4)] * rng.randint(1, most_groups)
    else:
        sizes = [rng.randint(2, 4) for _ in range(rng.randint(1, most_groups))]
    is_packed = rng.random() < 0.5
    longest = rng.choice([1, 2, 3, 4, 12])
    length = rng.randint(1, longest)
    return sizes, [rng.randint(1, longest) if is_packed else length for _ in range(sum(sizes))], is_packed


def _labels(rng: random.Random, lengths: list[int], is_packed: bool, V: int) -> tuple[Tensor, int]:
    """Labels with at least one that counts in each completion."""
    ignore_index = rng.choice([-100, -100, -1, V + 3, 0 if V > 1 else -100])
    lowest = 1 if ignore_index == 0 else 0
    completions = [torch.randint(lowest, V, (length,)) for length in lengths]
    ignored = rng.choice([0.0, 0.2, 0.8])
    for labels in completions:
        drop = torch.rand(len(labels)) < ignored
        drop[rng.randrange(len(labels))] = False
        labels[drop] = ignore_index
    return torch.cat(completions) if is_packed else torch.stack(completions), ignore_index


def _options(rng: random.Random, backend: str, dtype: torch.dtype, num_tokens: int, H: int) -> dict[str, Any]:
    least = least_workspace_bytes(num_tokens, H, dtype, DEVICE, backend)
    can_be_sparse = backend == "torch" or dtype != torch.float16
    return dict(
        backend=backend,
        logit_scale=rng.choice([1.0, 1.0, 0.3, -1.5]),
        softcap=rng.choice([None, None, 3.0, 30.0]),
        temperature=rng.choice([1.0, 1.0, 0.5, 3.0]),
        workspace_bytes=rng.choice([None, least, least * rng.randint(1, 8)]),
        sparse_eps=2.0**-60 if can_be_sparse and rng.random() < 0.25 else None,
    )


def _completions(
    rng: random.Random, laid_out: Callable[..., Tensor], sizes: list[int], lengths: list[int], is_packed: bool
) -> dict[str, Any]:
    N, is_equal = len(lengths), len(set(sizes)) == 1 and rng.random() < 0.7
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    offset = rng.choice([0.0, 0.0, 1e7]) if dtype == torch.float64 else 0.0
    values = dict(
        ref_logps=laid_out("ref_logps", torch.randn(N).mul(5).to(rng.choice([torch.float32, torch.float64]))),
        rewards=laid_out("rewards", torch.randn(N).mul(rng.choice([0.01, 1.0, 100.0])).to(dtype) + offset),
        beta=rng.choice([0.05, 0.3, 2.0]),
        average_logps=rng.random() < 0.3,
    )
    if is_equal:
        values["group_size"] = sizes[0]
    else:
        edges = torch.tensor([0, *sizes]).cumsum(0).int()
        values["cu_groups"] = laid_out("cu_groups", edges, expandable=False)
    if is_packed:
        values["cu_seqlens"] = laid_out("cu_seqlens", torch.tensor([0, *lengths]).cumsum(0).int(), expandable=False)
    return values


def relayout(rng: random.Random, values: Tensor, expandable: bool) -> tuple[str, Tensor]:
    """The same numbers in another layout (an expanded one repeats its first), beside NaN or labels out of range."""
    layout = rng.choice(["contiguous", "contiguous", "slice", "columns", "transposed", "misaligned", "expanded"])
    filler = float("nan") if values.is_floating_point() else 9999
    shape, last = values.shape, values.shape[-1]
    if layout == "slice":
        wide = values.new_full((*shape[:-1], 2 * last), filler)
        wide[..., ::2] = values
        return layout, wide[..., ::2]
    if layout == "columns":
        wide = values.new_full((*shape[:-1], last + 3), filler)
        wide[..., 1 : last + 1] = values
        return layout, wide[..., 1 : last + 1]
    if layout == "transposed" and values.dim() > 1:
        return layout, values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "misaligned":
        flat = values.new_full((values.numel() + 1,), filler)
        flat[1:] = values.flatten()
        return layout, flat[1:].view(shape)
    if layout == "expanded" and expandable:
        return layout, values[:1].expand(shape)
    return "contiguous", values.clone()


# The truth.


class Truth:
    """The head's logits in float64, and what they allow a float32 computation to be off by."""

    def __init__(self, case: Case) -> None:
        self.case, options = case, case.options
        labels = case.operands["labels"].reshape(-1)
        self.labels, self.counted = labels, labels != options["ignore_index"]
        x = case.operands["hidden_states"].detach().double().reshape(len(labels), -1)
        self.x = x.masked_fill(~self.counted[:, None], 0.0)
        self.w = case.operands["lm_head_weight"].detach().double()
        bias = case.operands["bias"]
        bias = self.w.new_zeros(len(self.w)) if bias is None else bias.detach().double()
        product = options["logit_scale"] * (self.x @ self.w.T + bias)
        cap, self.slope = options["softcap"], options["logit_scale"] / options["temperature"]
        capped = product if cap is None else cap * torch.tanh(product / cap)
        self.cap_slope = torch.ones_like(product) if cap is None else (product / cap).cosh() ** -2
        z = capped / options["temperature"]
        self.index = labels.where(self.counted, 0).unsqueeze(1)
        self.is_label = torch.zeros_like(z, dtype=torch.bool).scatter_(1, self.index, True)
        # Of a label that is certain to 1e-20, too: 1 - p is what the others have.
        distance = z.masked_fill(self.is_label, -math.inf).logsumexp(1) - z.gather(1, self.index).squeeze(1)
        self.label_logps = -(distance.clamp_min(0.0) + torch.log1p(torch.exp(-distance.abs())))
        self.log_softmax = z.log_softmax(1)
        # A logit is a sum of H terms: its rounding is that of their magnitudes.
        magnitude = abs(self.slope) * (self.x.abs() @ self.w.abs().T + bias.abs()).max().item()
        magnitude += 0.0 if cap is None else cap / options["temperature"]
        self.spacing = self.epsilon * (1.0 + math.log(len(self.w)) + magnitude)

    @property
    def epsilon(self) -> float:
        """Of the accumulators."""
        is_double = self.case.operands["hidden_states"].dtype == torch.float64
        return torch.finfo(torch.float64 if is_double else torch.float32).eps

    def token_logps(self) -> Tensor:
        return self.label_logps.where(self.counted, 0.0)

    def entropy(self) -> Tensor:
        return -(self.log_softmax.exp() * self.log_softmax).nan_to_num(0.0).sum(1).where(self.counted, 0.0)

    def segments(self) -> list[Tensor]:
        """The counted tokens of each completion."""
        labels, cu_seqlens = self.case.operands["labels"], self.case.completions.get("cu_seqlens")
        tokens = torch.arange(len(self.labels), device=self.labels.device)
        parts = tokens.view(labels.shape).unbind(0) if cu_seqlens is None else tokens.split(cu_seqlens.diff().tolist())
        return [part[self.counted[part]] for part in parts]

    def gradients(self, dlogps: Tensor, dentropy: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """(T,) slopes of the tokens -> each operand's gradient, and the sum of the magnitudes it is made of."""
        dlogps = dlogps.double().where(self.counted, 0.0).unsqueeze(1)
        slopes = torch.where(self.is_label, -torch.expm1(self.label_logps).unsqueeze(1), -self.log_softmax.exp())
        dlogits, size = dlogps * slopes, (dlogps * slopes).abs()
        if dentropy is not None:
            h, entropy, p = dentropy.double().where(self.counted, 0.0), self.entropy(), self.log_softmax.exp()
            logs = self.log_softmax.clamp_min(-1e4)
            dlogits = dlogits - h.unsqueeze(1) * p * (logs + entropy.unsqueeze(1))
            size = size + h.abs().unsqueeze(1) * p * (1 + logs.abs() + entropy.unsqueeze(1))
        dz = dlogits * self.cap_slope * self.slope
        # 1 - tanh^2 is off by the rounding of 1, also where it is far less than that.
        lost = (1 - self.cap_slope) * self.epsilon / self.spacing
        size = size * abs(self.slope) * (self.cap_slope + lost)
        return dict(
            hidden_states=(dz @ self.w, size @ self.w.abs()),
            lm_head_weight=(dz.T @ self.x, size.T @ self.x.abs()),
            bias=(dz.sum(0), size.sum(0)),
        )

    def assert_gradient(
        self, name: str, actual: Tensor, dlogps: Tensor, dentropy: Tensor | None, slope_error: float
    ) -> None:
        """Within what rounding costs, of logits, 16-bit operands and the result; the slopes may be off as well."""
        operand = self.case.operands[name]
        assert actual is not None and actual.shape == operand.shape and actual.dtype == operand.dtype, name
        gold, magnitude = self.gradients(dlogps, dentropy)[name]
        info = torch.finfo(operand.dtype)
        terms = len(self.w) if name == "hidden_states" else len(self.x)
        rounding = ROUNDING_FACTOR * ((info.eps if operand.dtype.itemsize == 2 else 0.0) + self.epsilon * terms**0.5)
        bound = (FLOAT32_FACTOR * self.spacing + rounding) * magnitude.norm().item()
        bound += slope_error * self.gradients(torch.ones_like(dlogps), None)[name][1].norm().item()
        # Below the smallest number of 16 bits, in the result and in the operands of its product.
        bound += info.smallest_normal * gold.numel() ** 0.5
        if operand.dtype == torch.float16:
            largest = dlogps.abs() if dentropy is None else dlogps.abs() + 4 * dentropy.abs()
            bound += 2.0**-24 * largest.max().item() * abs(self.slope) * self.scale_of(name)
        fits = gold.abs() + bound < info.max / 2
        assert actual.reshape(gold.shape)[fits].isfinite().all(), f"gradient of {name} is not finite"
        error = (actual.detach().double().reshape(gold.shape) - gold)[fits].norm().item()
        assert error <= bound, f"gradient of {name}: off by {error:.3e} > {bound:.3e}, norm {gold.norm().item():.3e}"

    def scale_of(self, name: str) -> float:
        """What an entry of the softmax is multiplied by."""
        return (
            dict(hidden_states=self.w, lm_head_weight=self.x, bias=self.x.new_ones(len(self.x), 1))[name].norm().item()
        )


def assert_near(name: str, actual: Tensor, gold: Tensor, allowed: float | Tensor) -> None:
    assert actual.shape == gold.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(gold.shape)}"
    error = (actual.double() - gold.double()).abs()
    assert (error <= allowed).all(), (
        f"{name}: {actual.tolist()} is off by {error.max().item():.3e}, from {gold.tolist()}"
    )


# Losses for linear_sequence_loss, each with whether it takes any size of group.


@losses.separable
def own_mean(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, **groups: Any) -> Tensor:
    return ((logps.double() - ref_logps.double() - rewards.double() / beta) ** 4).mean()


@losses.separable
def own_root_declared(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, **groups: Any) -> Tensor:
    """What it is not."""
    return own_root(logps, ref_logps, rewards, beta=beta)


def own_root(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, **groups: Any) -> Tensor:
    """No mean over groups."""
    return (logps.double() - ref_logps.double() - rewards.double() / beta).square().mean().add(1.0).sqrt()


LOSSES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "copg": (copg_loss, True),
    "own mean": (own_mean, True),
    "own root": (own_root, True),
    "own root, declared": (own_root_declared, True),
    "ipo": (losses.ipo_loss, False),
    "dpo": (losses.dpo_loss, False),
    "rloo": (losses.rloo_loss, False),
    "raft": (losses.raft_loss, False),
    "rebel": (losses.rebel_loss, False),
}
