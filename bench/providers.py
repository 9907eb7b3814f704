"""The contestants. Each gives two callables on the same inputs, and the benchmark makes its passes of them.

    log_probs(inputs) -> (T,) token log-probabilities, 0 where a label is ignored
    loss(inputs) -> scalar, to be differentiated in hidden_states and lm_head_weight

A third, the loss minus an entropy bonus, is for those whose entropy has a gradient. A provider that only offers
quantities of each token gets its losses from `composed`, the same for all.
`LOADERS` maps a name to a function that makes the provider, or raises ImportError with the reason it cannot; the
libraries a user might pick instead of this one are in peers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.composition import bonus, copg_loss, counted_rows, entropy_coef, of_all_tokens
from bench.inputs import BenchInputs

LOG_PROBS = "log-probs"
TRAINABLE = "loss+gradients"
FROZEN = "frozen head"
UPSTREAM = "any gradient"
BONUS = "entropy bonus"
MEAN_CE = "mean CE, no CoPG"
# Each pass with the GEMMs that nobody can avoid. An upstream gradient that is known only after the log-probs needs the
# logits twice; the loss of a whole group can be had while they are still there, and so can its entropies.
PASSES = {LOG_PROBS: 1, TRAINABLE: 3, FROZEN: 2, UPSTREAM: 4, BONUS: 3, MEAN_CE: 3}
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_states, lm_head_weight, labels -> (T,)
LogpsAndEntropy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of the same, two of (T,)
Run = Callable[[], tuple[Tensor, ...]]
# Of "copg-kernels sparse": the softmax entries below it are left out of the gradients one by one.
SPARSE_EPS = 2.0**-14


class Provider(NamedTuple):
    log_probs: Callable[[BenchInputs], Tensor] | None  # None: `loss` is a token-mean cross entropy, a ceiling for CoPG
    loss: Callable[[BenchInputs], Tensor]
    compiles_per_shape: bool = False
    gradient_error: float = 0.0  # relative L2 by which dX and dW may be off by design, whatever the dtype's bound
    bonus_loss: Callable[[BenchInputs], Tensor] | None = None  # None: its entropy has no gradient, or it has none


def composed(token_logps: TokenLogps, logps_and_entropy: LogpsAndEntropy | None = None) -> Provider:
    """Sequence sums, CoPG and the bonus in plain PyTorch on top of differentiable quantities of each token."""

    def log_probs(inputs: BenchInputs) -> Tensor:
        return of_all_tokens(token_logps(*counted_rows(inputs)), inputs)

    def loss(inputs: BenchInputs) -> Tensor:
        return copg_loss(log_probs(inputs), inputs)

    if logps_and_entropy is None:
        return Provider(log_probs, loss)

    def bonus_loss(inputs: BenchInputs) -> Tensor:
        logps, entropy = logps_and_entropy(*counted_rows(inputs))
        return copg_loss(of_all_tokens(logps, inputs), inputs) - bonus(entropy, inputs)

    return Provider(log_probs, loss, bonus_loss=bonus_loss)


def bind(provider: Provider, inputs: BenchInputs) -> dict[str, Run]:
    """The passes as calls without arguments, each returning all that it hands to its caller."""
    operands = (inputs.hidden_states, inputs.lm_head_weight)
    frozen = inputs._replace(lm_head_weight=inputs.lm_head_weight.detach())
    log_probs, bonus_loss = provider.log_probs, provider.bonus_loss
    if log_probs is None:
        return {MEAN_CE: lambda: torch.autograd.grad(provider.loss(inputs), operands)}

    def without_gradients() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (log_probs(inputs),)

    runs: dict[str, Run] = {
        LOG_PROBS: without_gradients,
        TRAINABLE: lambda: torch.autograd.grad(provider.loss(inputs), operands),
        FROZEN: lambda: torch.autograd.grad(provider.loss(frozen), operands[:1]),
        UPSTREAM: lambda: torch.autograd.grad(log_probs(inputs), operands, inputs.dlogps),
    }
    if bonus_loss is not None:
        runs[BONUS] = lambda: torch.autograd.grad(bonus_loss(inputs), operands)
    return runs


def eager_token_logps(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
    """What trainers do: logits in the dtype of the model, softmax in fp32."""
    logits = F.linear(hidden_states, lm_head_weight)
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_logps_and_entropy(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same softmax in fp32 for both."""
    log_softmax = F.linear(hidden_states, lm_head_weight).float().log_softmax(-1)
    logps = log_softmax.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logps, -(log_softmax.exp() * log_softmax).sum(-1)


def load_eager(device: torch.device) -> Provider:
    return composed(eager_token_logps, eager_logps_and_entropy)


def load_compiled_eager(device: torch.device) -> Provider:
    eager = load_eager(device)
    assert eager.log_probs is not None and eager.bonus_loss is not None
    # Every shape is compiled for itself: sizes known to the compiler are the stronger baseline.
    torch.compiler.reset()
    return Provider(
        torch.compile(eager.log_probs, dynamic=False),
        torch.compile(eager.loss, dynamic=False),
        compiles_per_shape=True,
        bonus_loss=torch.compile(eager.bonus_loss, dynamic=False),
    )


def load_torch_linear_cross_entropy(device: torch.device) -> Provider:
    """PyTorch's own chunked head, in chunks of 64 MiB (CPU) or 256 MiB (GPU) of fp32 logits.

    The chunks it picks by itself hold 2 to 16 rows at our CPU shapes, which costs it a factor of 3 to 20.
    """
    options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options_class is None:
        raise ImportError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")

    def token_logps(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
        num_logits = 2**26 if hidden_states.is_cuda else 2**24
        options = options_class(batch_chunk_size=max(1, num_logits // len(lm_head_weight)))
        losses = F.linear_cross_entropy(hidden_states, lm_head_weight, labels, reduction="none", options=options)
        return -losses.float()

    return composed(token_logps)


def load_ours(device: torch.device) -> Provider:
    return _ours(None)


def load_ours_sparse(device: torch.device) -> Provider:
    """Off by up to 3e-3 with a base model's softmax; a mistake costs more than the bound of three times that."""
    from copg_kernels import linear_logps

    operand, labels = torch.zeros(64, 64, device=device), torch.zeros(64, dtype=torch.int64, device=device)
    try:
        linear_logps(operand, operand, labels, sparse_eps=SPARSE_EPS)
    except ValueError as refusal:
        raise ImportError(f"not available: {refusal}") from refusal
    return _ours(SPARSE_EPS)._replace(gradient_error=1e-2)


def _ours(sparse_eps: float | None) -> Provider:
    from copg_kernels import linear_copg_loss, linear_logps

    def log_probs(inputs: BenchInputs) -> Tensor:
        return linear_logps(inputs.hidden_states, inputs.lm_head_weight, inputs.labels, sparse_eps=sparse_eps)

    def loss(inputs: BenchInputs, coefficient: float = 0.0) -> Tensor:
        return linear_copg_loss(
            inputs.hidden_states,
            inputs.lm_head_weight,
            inputs.labels,
            inputs.ref_logps,
            inputs.rewards,
            beta=inputs.beta,
            group_size=inputs.group_size,
            cu_seqlens=inputs.cu_seqlens,
            entropy_coef=coefficient,
            sparse_eps=sparse_eps,
        ).loss

    def bonus_loss(inputs: BenchInputs) -> Tensor:
        return loss(inputs, entropy_coef(inputs))

    # A compact softmax has lost the entropy.
    return Provider(log_probs, loss, bonus_loss=bonus_loss if sparse_eps is None else None)
