"""What the benchmark runs on: head shapes, and hidden states whose softmax looks like a language model's.

Logits of randn operands are degenerate: every token is nearly as likely as every other, so nothing but the
tail of the softmax is exercised. Three regimes follow the statistics measured on a 0.5B model instead,

    logits = (-2.14 ln(rank + 1816) + 2.88 N(0, 1) + peak on one token of max(0, 1.38 + 3.59 N(0, 1))) / s

with s = 1 for a base model, 0.75 after instruction tuning and 0.5 after reinforcement learning. The share of
entries with p >= 2^-12 is then about 0.2 %, 0.1 % and 0.03 % of a vocabulary of 130-150 thousand. "flat" is
randn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from copg_kernels.tuning.heads import HEADS

REGIMES = {"base": 1.0, "tuned": 0.75, "rl": 0.5}  # name: the divisor s
SIGNIFICANT = 2.0**-12
BETA = 0.1
IGNORED = -100


class Shape(NamedTuple):
    name: str
    vocab_size: int
    hidden_size: int
    num_tokens: int
    completion_length: int
    group_size: int = 2
    ignored: float = 0.0  # share of every completion's tokens, at its start, that count for nothing: the prompt


class BenchInputs(NamedTuple):
    hidden_states: Tensor
    lm_head_weight: Tensor
    labels: Tensor
    ref_logps: Tensor
    rewards: Tensor
    cu_seqlens: Tensor
    dlogps: Tensor  # (T,) a random upstream gradient of the token log-probs
    counted: Tensor | None  # positions of the tokens that count; None: all
    group_size: int
    beta: float


MODEL_SHAPES = tuple(Shape(name, *sizes, 8192, 1024) for name, sizes in HEADS.items())
CPU_SHAPES = (
    Shape("cpu-32k", 32000, 512, 2048, 256),
    Shape("cpu-gpt2", 50257, 256, 512, 128),
    Shape("cpu-16k", 16000, 512, 1024, 128),
)
SHAPES = {shape.name: shape for shape in (*MODEL_SHAPES, *CPU_SHAPES)}


def make_inputs(
    shape: Shape, regime: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> BenchInputs:
    """Operands in `dtype` on `device`; the reference policy is about one nat per completion away."""
    if shape.num_tokens % (shape.completion_length * shape.group_size):
        raise ValueError(
            f"num_tokens of {shape.name} must be a multiple of {shape.completion_length} tokens x "
            f"{shape.group_size} completions, got {shape.num_tokens}"
        )
    generator = torch.Generator(device).manual_seed(seed)
    make_head = _flat_head if regime == "flat" else _ranked_head
    hidden_states, lm_head_weight, labels = make_head(shape, regime, generator)
    token_logps = torch.cat(
        [_label_logps(rows, lm_head_weight, y) for rows, y in _row_chunks(hidden_states, labels, shape=shape)]
    )
    num_ignored = int(shape.ignored * shape.completion_length)
    labels.view(-1, shape.completion_length)[:, :num_ignored] = IGNORED
    logps = token_logps.view(-1, shape.completion_length)[:, num_ignored:].sum(1)
    edges = torch.arange(len(logps) + 1, device=device, dtype=torch.int32) * shape.completion_length
    return BenchInputs(
        hidden_states=hidden_states.to(dtype).requires_grad_(),
        lm_head_weight=lm_head_weight.to(dtype).requires_grad_(),
        labels=labels,
        ref_logps=logps + _randn(logps.shape, generator),
        rewards=_randn(logps.shape, generator),
        cu_seqlens=edges,
        dlogps=_randn(labels.shape, generator),
        counted=(labels != IGNORED).nonzero().squeeze(1) if num_ignored else None,
        group_size=shape.group_size,
        beta=BETA,
    )


def density(inputs: BenchInputs, num_rows: int = 128) -> float:
    """Share of softmax entries with p >= 2^-12, over `num_rows` evenly spaced tokens."""
    step = max(1, len(inputs.hidden_states) // num_rows)
    rows = inputs.hidden_states.detach()[::step].float()
    significant = total = 0
    lm_head_weight = inputs.lm_head_weight.detach().float()
    for chunk in rows.split(32):
        probabilities = (chunk @ lm_head_weight.T).softmax(-1)
        significant += int((probabilities >= SIGNIFICANT).sum())
        total += probabilities.numel()
    return significant / total


def _ranked_head(shape: Shape, regime: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Factor the logits of a regime into W x, token ids in the order of their rank.

        W_v = n_v + (pop_v / s0) u + 0.4 w0        n_v ~ N(0, I / H), orthogonal to the unit vector u
        x   = sigma sqrt(H) g + s0 u + d n_c / |n_c|^2        g a random unit vector, orthogonal to u
        W_v x = sigma N(0, 1) + pop_v + d [v = c] + a constant of the row

    The peak d sits on a token c drawn from the softmax without it. Even rows have c as their label, a text
    the model is sure of; odd rows draw their label from the softmax with the peak, as sampling would.
    """
    divisor, hidden_size, device = REGIMES[regime], shape.hidden_size, generator.device
    sigma = 2.88 / divisor
    s0 = sigma * math.sqrt(hidden_size) / 2
    u = torch.nn.functional.normalize(_randn((hidden_size,), generator), dim=0)
    w0 = torch.nn.functional.normalize(_without(_randn((1, hidden_size), generator), u)[0], dim=0)
    g = torch.nn.functional.normalize(_without(_randn((shape.num_tokens, hidden_size), generator), u), dim=1)
    n = _without(_randn((shape.vocab_size, hidden_size), generator) / math.sqrt(hidden_size), u)
    ranks = torch.arange(shape.vocab_size, device=device, dtype=torch.float32)
    popularity = -2.14 * torch.log1p(ranks / 1816) / divisor

    hidden_states = sigma * math.sqrt(hidden_size) * g + s0 * u
    lm_head_weight = n + torch.outer(popularity / s0, u) + 0.4 * w0
    peaked = _sample_labels(hidden_states, lm_head_weight, shape, generator)
    peaks = (1.38 + 3.59 * _randn((shape.num_tokens,), generator)).clamp_min(0) / divisor
    direction = n[peaked]
    hidden_states += (peaks / direction.square().sum(1)).unsqueeze(1) * direction
    labels = peaked.clone()
    labels[1::2] = _sample_labels(hidden_states[1::2], lm_head_weight, shape, generator)
    return hidden_states, lm_head_weight, labels


def _flat_head(shape: Shape, regime: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal logits and uniform labels."""
    hidden_states = _randn((shape.num_tokens, shape.hidden_size), generator)
    lm_head_weight = _randn((shape.vocab_size, shape.hidden_size), generator) / math.sqrt(shape.hidden_size)
    labels = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator, device=generator.device)
    return hidden_states, lm_head_weight, labels


def _sample_labels(hidden_states: Tensor, lm_head_weight: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    drawn = [
        torch.multinomial((rows @ lm_head_weight.T).softmax(-1), 1, generator=generator).squeeze(1)
        for (rows,) in _row_chunks(hidden_states, shape=shape)
    ]
    return torch.cat(drawn)


def _label_logps(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden_states @ lm_head_weight.T
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def _row_chunks(*tensors: Tensor, shape: Shape) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows whose fp32 logits take at most 128 MiB."""
    num_rows = max(1, 2**27 // (4 * shape.vocab_size))
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)


def _without(vectors: Tensor, unit: Tensor) -> Tensor:
    return vectors - torch.outer(vectors @ unit, unit)


def _randn(size: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device)
