"""Per-token log-probabilities of the language-model head without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from copg_kernels import checks
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.row_statistics import NOTHING, Wanted
from copg_kernels.ops import linear_logps_op
from copg_kernels.schedules.tile_ops import can_keep_tiles
from copg_kernels.sparse_logps import sparse_logps, with_sparsity


def linear_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    sparse_eps: float | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each label under the softmax of the language-model head.

        logits[t] = cap(logit_scale * (lm_head_weight hidden_states[t] + bias)) / temperature
        cap(z)    = softcap * tanh(z / softcap)                                 (identity without softcap)
        logp[t]   = logits[t, labels[t]] - log sum_v exp(logits[t, v])          (0 where labels[t] = ignore_index)

    The [tokens, vocabulary] logits never exist: a GPU keeps them in registers, one tile at a time, and a CPU in a
    bounded workspace. Products are summed in float32 and not rounded in between, so the log-probability of a whole
    completion is right to about 1e-4 nat where bfloat16 logits are off by 0.1 to 1. The result is differentiable in
    hidden_states, lm_head_weight and bias for any upstream gradient g: with P = softmax(logits),

        dhidden_states[t]  = sum_v g[t] (1[v = labels[t]] - P[t, v]) dlogits[t, v]/dz * lm_head_weight[v]
        dlm_head_weight[v] = sum_t g[t] (1[v = labels[t]] - P[t, v]) dlogits[t, v]/dz * hidden_states[t]

    computed from recomputed logits in slices of the vocabulary (four head GEMMs in all, one without gradients). With a
    frozen head dlogp/dhidden_states is formed along with logp, from as many tokens' logits as fit workspace_bytes, and
    kept in the dtype of hidden_states (float32 for float16; two GEMMs, float16 on a GPU: three).
    Ignored rows take no part in the forward pass and get zero gradient. Equal calls give equal bits.

    Args:
        hidden_states: (..., H) float32, bfloat16 or float16 (float64 with backend="torch").
        lm_head_weight: (V, H), same dtype.
        labels: (...,) int64, already aligned: labels[t] is the token that hidden_states[t] predicts.
        bias: (V,), same dtype, or None.
        logit_scale: factor of the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        softcap: Gemma's final_logit_softcapping, or None.
        temperature: divisor of the logits, where the completions were sampled with one.
        ignore_index: label of rows that do not count.
        sparse_eps: None for exact gradients. A probability, 2**-14 say, makes the backward pass read a compact softmax
            that the forward pass leaves behind, instead of computing the logits again: of each 128 tokens the entries
            in whose column any has p >= sparse_eps; the label's exactly; the mass of the others as one rank-1 term. A
            few percent of two GEMMs, for gradients that are off by 5e-4 (confident tokens) to 3e-3 (base model) at
            2**-14. Before that term a token's error in dlogits is at most sqrt(sparse_eps * dropped mass). Where a
            block would keep more than 30 % of the vocabulary its gradients are exact. Log-probs are exact, always.
            The result then has the attribute `sparsity` (density, dropped, overflow). Not for float16 on a GPU.
        workspace_bytes: budget for the tile of logits of a pass that forms gradients (and the twin's forward tile); by
            default 128 MiB on a CPU; on a GPU 1 GiB, or what 4,096 tokens need where that is more (vocabularies above
            130,000 in 16 bits). Above it such a pass needs the gradients themselves, a scaled
            copy of hidden_states and, for 16-bit operands, their gradient in float32.
        backend: "triton", "torch", or "auto": triton for CUDA tensors, torch elsewhere. A request is never replaced.

    Returns:
        (...,) float32, in nats (float64 for float64 operands).

    Raises:
        TypeError: an argument has another dtype than the ones above, or is a DTensor.
        ValueError: shapes or devices disagree, a label lies outside [0, V) and is not ignore_index (on a GPU a device
            assertion, so that nothing synchronises), a scalar is out of range, workspace_bytes does not hold one tile,
            or the backend does not exist here.
        NotImplementedError: under torch.func.grad and in forward-mode differentiation.
    """
    head = Head(lm_head_weight, bias, logit_scale, softcap, temperature)
    checks.check_ignore_index(ignore_index)
    backend, workspace = _checked(hidden_states, head, labels, sparse_eps, workspace_bytes, backend)
    if sparse_eps is None or not any(_trains(hidden_states, head)) or not labels.numel():
        return _exact(hidden_states, head, labels, ignore_index, workspace, backend, "logps", NOTHING)[0]
    if checks.is_transformed(hidden_states):
        raise NotImplementedError("sparse_eps must be None under torch.func.vmap")
    tokens = (hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1))
    head = Head(lm_head_weight, bias, float(logit_scale), softcap, float(temperature))
    per_token_logps, sparsity = sparse_logps(*tokens, head, ignore_index, float(sparse_eps), workspace, backend)
    return with_sparsity(per_token_logps.view(labels.shape), sparsity)


def linear_logps_and_entropy(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    expected_gradients: str = "both",
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`linear_logps`, and the entropy of each row's softmax from the same logits; both differentiable.

        entropy[t] = -sum_v P[t, v] log P[t, v],    P = softmax(logits)        (0 where labels[t] = ignore_index)

    The log-probabilities have the bits of `linear_logps`. With upstream gradients g of the log-probabilities and h of
    the entropy, the gradient of the logits is

        dlogits[t, v] = g[t] (1[v = labels[t]] - P[t, v]) - h[t] P[t, v] (log P[t, v] + entropy[t])

    and goes on as in `linear_logps`, from one recomputed tile for both. So a trainable head takes four head GEMMs in
    all, whatever arrives. A frozen head takes three, or two where the forward pass knows what will arrive.

    Args:
        expected_gradients: which gradients will arrive, so that a frozen head can prepare for them: "logps" (where the
            entropy is only logged), "entropy" or "both". With "both" it takes three head GEMMs, whatever arrives. With
            one of the others two, and four where the guess was wrong, which is no error. A trainable head takes no
            notice.
        The others: as in `linear_logps`, but for sparse_eps: a compact softmax has lost the entropy.

    Returns:
        per_token_logps, entropy: (...,) float32, in nats (float64 for float64 operands).

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_logps`; expected_gradients is none of the three.
    """
    per_token_logps, entropy, *_ = linear_token_statistics(
        hidden_states,
        lm_head_weight,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        expected_gradients=expected_gradients,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    assert entropy is not None
    return per_token_logps, entropy


class LinearTokenStatistics(NamedTuple):
    """What `linear_token_statistics` returns: (...,) each, None where not asked for."""

    per_token_logps: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def linear_token_statistics(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    outputs: Sequence[str] = ("entropy",),
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    expected_gradients: str = "both",
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> LinearTokenStatistics:
    """`linear_logps`, and further numbers of each row's softmax from the same pass over the logits, at no extra GEMM.

        entropy[t]          = -sum_v P[t, v] log P[t, v],    P = softmax(logits)
        log_sum_sq_probs[t] = log sum_v P[t, v]^2
        mean_logits[t]      = sum_v logits[t, v] / V
        is_top1[t]          = whether labels[t] = argmax_v logits[t, v], the first index where several are largest

    All are 0, or False, where labels[t] = ignore_index. The log-probabilities have the bits of `linear_logps`. They and
    the entropy are differentiable, as in `linear_logps_and_entropy`; the others carry no gradient.

    Args:
        outputs: names of those that are wanted, of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
        The others: as in `linear_logps_and_entropy`.

    Returns:
        per_token_logps, entropy, log_sum_sq_probs, mean_logits: (...,) float32 (float64 for float64 operands); is_top1:
        (...,) bool. None where not asked for.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_logps_and_entropy`; outputs has another name than these.
    """
    head = Head(lm_head_weight, bias, logit_scale, softcap, temperature)
    checks.check_ignore_index(ignore_index)
    checks.check_outputs(outputs, Wanted._fields)
    checks.check_expected_gradients(expected_gradients)
    backend, workspace = _checked(hidden_states, head, labels, None, workspace_bytes, backend)
    wanted = Wanted(*(name in outputs for name in Wanted._fields))
    # Without an entropy no gradient of it arrives.
    expected = expected_gradients if wanted.entropy else "logps"
    slopes = "none" if expected == "both" else expected
    return _exact(hidden_states, head, labels, ignore_index, workspace, backend, slopes, wanted)


def _checked(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    sparse_eps: float | None,
    workspace_bytes: int | None,
    backend: str,
) -> tuple[str, int]:
    """The backend and the workspace, once every argument is known to be what it should."""
    checks.check_head(hidden_states, head.weight, labels, head.bias)
    checks.check_transforms(hidden_states, head.weight, head.bias)
    checks.check_logit_options(head.logit_scale, head.softcap, head.temperature)
    backend = checks.resolve_backend(backend, hidden_states)
    checks.check_sparse_eps(sparse_eps, hidden_states.dtype, backend)
    return backend, checks.check_workspace(workspace_bytes, hidden_states, labels.numel(), backend, head.weight)


def _trains(hidden_states: Tensor, head: Head) -> list[bool]:
    return [checks.needs_gradient(x) for x in (hidden_states, head.weight, head.bias)]


def _exact(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    slopes: str,
    wanted: Wanted,
) -> LinearTokenStatistics:
    """slopes: whose derivative is formed along with the log-probabilities where the head is frozen; "none"."""
    frozen_head = _trains(hidden_states, head) == [True, False, False]
    per_token_logps, _, _, *statistics = linear_logps_op(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        head.weight,
        labels.reshape(-1),
        head.bias,
        slopes if frozen_head and can_keep_tiles(hidden_states.dtype, backend) else "none",
        list(wanted),
        float(head.logit_scale),
        None if head.softcap is None else float(head.softcap),
        float(head.temperature),
        ignore_index,
        workspace_bytes,
        backend,
    )
    shaped = (x.view(labels.shape) if want else None for x, want in zip(statistics, wanted, strict=True))
    return LinearTokenStatistics(per_token_logps.view(labels.shape), *shaped)
