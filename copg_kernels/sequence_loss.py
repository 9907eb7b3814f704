"""Any loss on sequence log-probabilities, fused with the head: the caller's function, the closed groups' schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from copg_kernels import checks
from copg_kernels.copg import CoPGOutput, sequence_logps
from copg_kernels.kernels.contrast import Completions, Contrast
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.linear_logps import linear_logps, linear_logps_and_entropy
from copg_kernels.ops import on_device, refuse_second_derivative, row_major
from copg_kernels.schedules import closed_groups, recompute
from copg_kernels.schedules.chunks import Batch, Chunk, capturing, chunks_of
from copg_kernels.schedules.sparse_softmax import Sparsity
from copg_kernels.schedules.tile_ops import can_keep_tiles, tile_ops

# Coefficients of chunks and of the whole batch are the same sums in another order; a loss that is no mean over groups
# is off by the share of a chunk.
_SEPARABLE = 1e-3


def linear_sequence_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    loss: Callable[..., Tensor],
    beta: float,
    group_size: int = 2,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    average_logps: bool = False,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    sparse_eps: float | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> CoPGOutput:
    """Any sequence-level loss straight from hidden states and the language-model head, without the logits.

        loss(sequence_logps(linear_logps(hidden_states, lm_head_weight, labels)), ref_logps, rewards, beta=...)

    Its derivatives by the log-probabilities come from autograd. As in `linear_copg_loss` it takes three head GEMMs, if
    the loss is a mean over groups of a function of each group; one that turns out not to be is right all the same, but
    its logits are computed twice. gemm_units tells. Where there are several chunks, a GPU is waited for once to find
    out; in a CUDA graph, and under torch.compile, the backward pass is that of `linear_logps` instead.

    Args:
        loss: one of `copg_kernels.losses`, or the caller's own with the signature
            (logps, ref_logps, rewards, *, beta, group_size) -> scalar. It is given cu_groups instead of group_size
            where that is set; further arguments are bound with functools.partial.
        The others: as in `linear_copg_loss`.

    Returns:
        CoPGOutput(loss, logps, regularized_rewards, log_ratios) with the attributes gemm_units, sparsity and entropy;
        all but loss detached.

    Raises:
        TypeError, ValueError: as `linear_copg_loss`, and what `loss` raises.
    """
    checks.check_head(hidden_states, lm_head_weight, labels, bias)
    checks.check_logit_options(logit_scale, softcap, temperature)
    boundaries = checks.completion_boundaries(hidden_states, labels, cu_seqlens)
    num_sequences = boundaries.numel() - 1
    checks.check_completions(ref_logps, rewards, num_sequences, hidden_states.device)
    checks.check_beta(beta)
    group_edges = checks.group_boundaries(num_sequences, group_size, cu_groups, hidden_states.device)
    backend = checks.resolve_backend(backend, hidden_states)
    checks.check_sparse_eps(sparse_eps, hidden_states.dtype, backend)
    checks.check_return_entropy(return_entropy, sparse_eps)
    workspace = checks.check_workspace(workspace_bytes, hidden_states, labels.numel(), backend)
    ref_logps, rewards = ref_logps.detach(), rewards.detach()

    groups = {"group_size": group_size} if cu_groups is None else {"cu_groups": cu_groups}

    def value_of(logps: Tensor) -> Tensor:
        return loss(logps, ref_logps, rewards, beta=beta, **groups)

    inputs = (hidden_states, lm_head_weight, bias)
    trains = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    if any(trains) and sparse_eps is None and not torch.compiler.is_compiling():
        dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        completions = Completions(
            boundaries,
            group_edges,
            ref_logps.to(dtype).contiguous(),
            rewards.to(dtype).contiguous(),
            float(beta),
            average_logps,
            num_groups=group_edges.numel() - 1,
            equal_sizes=(labels.shape[1], group_size) if cu_seqlens is None and cu_groups is None else None,
        )
        head = Head(lm_head_weight.detach(), None if bias is None else bias.detach(), logit_scale, softcap, temperature)
        tokens = (hidden_states.detach().reshape(-1, hidden_states.shape[-1]), labels.reshape(-1))
        batch = Batch(tokens[0], head, tokens[1], completions, ignore_index)
        entropy_shape = labels.shape if return_entropy else None
        output = _in_closed_groups(batch, inputs, recompute.Needs(*trains), value_of, workspace, backend, entropy_shape)
        if output is not None:
            return output
    options: dict[str, Any] = dict(
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        workspace_bytes=workspace,
        backend=backend,
    )
    entropy = None
    if return_entropy:
        per_token_logps, entropy = linear_logps_and_entropy(hidden_states, lm_head_weight, labels, **options)
    else:
        per_token_logps = linear_logps(hidden_states, lm_head_weight, labels, sparse_eps=sparse_eps, **options)
    logps = sequence_logps(
        per_token_logps, labels, cu_seqlens=cu_seqlens, average=average_logps, ignore_index=ignore_index
    )
    frozen_head = can_keep_tiles(hidden_states.dtype, backend) and trains == [True, False, False]
    units = 2 if frozen_head else 2 + sum(trains[:2]) if any(trains) else 1
    sparsity = getattr(per_token_logps, "sparsity", None)
    if sparsity is not None:
        units = 1
    return _output(value_of(logps), logps.detach(), ref_logps, rewards, beta, units, sparsity, entropy)


def _in_closed_groups(
    batch: Batch,
    inputs: Sequence[Tensor | None],
    needs: recompute.Needs,
    value_of: Callable[[Tensor], Tensor],
    workspace_bytes: int,
    backend: str,
    entropy_shape: torch.Size | None,
) -> CoPGOutput | None:
    """Loss and gradients from one computation of the logits; None where a group's do not fit the workspace.

    entropy_shape is that of the labels, or None where no entropy is wanted.
    """
    completions = batch.completions
    checks.require_batch(batch.labels, batch.head.weight.shape[0], batch.ignore_index, completions)
    options: dict[str, Any] = dict(workspace_bytes=workspace_bytes, backend=backend)
    with on_device(batch.hidden_states, workspace_bytes):
        batch = batch._replace(
            hidden_states=row_major(batch.hidden_states),
            head=batch.head._replace(weight=row_major(batch.head.weight)),
        )
        chunks = chunks_of(batch, needs, **options)
        if chunks is None or (len(chunks) > 1 and capturing(batch.labels)):  # _agree reads
            return None
        # A chunk's coefficients are taken from the loss of all completions, those to come still at the reference.
        logps = completions.ref_logps.clone()
        contrast = _contrast(batch, logps, chunks, value_of, tile_ops(backend).contrast_fwd)
        entropy = entropy_shape is not None
        contrasted, gradients, _ = closed_groups.in_chunks(batch, chunks, needs, contrast, backend, entropy=entropy)
        value, dlogps = _derivative(value_of, logps)
        units = 1 + needs.hidden_states + needs.weight
        if len(chunks) > 1 and not _agree(contrasted.coefficients, dlogps, batch):
            exact = contrasted._replace(coefficients=_per_token(dlogps, batch))
            gradients = closed_groups.recomputed(batch, exact, needs, **options)
            units *= 2
    wanted = [(x, gradient) for x, gradient, need in zip(inputs, gradients, needs, strict=True) if need]
    value = _KnownGradients.apply(value, [gradient for _, gradient in wanted], *(x for x, _ in wanted))
    token_entropy = None if entropy_shape is None else contrasted.entropy.view(entropy_shape)
    numbers = (completions.ref_logps, completions.rewards, completions.beta)
    return _output(value, logps, *numbers, units, entropy=token_entropy)


def _contrast(
    batch: Batch,
    logps: Tensor,
    chunks: list[Chunk],
    value_of: Callable[[Tensor], Tensor],
    contrast_fwd: Callable[[Partials, PackedRows, Completions], Contrast],
) -> Callable[[Partials, PackedRows, Completions], Contrast]:
    """The contrast of one chunk after the other; leaves their log-probabilities in logps (N,).

    Log-probabilities are those of `contrast_fwd`, coefficients those of the caller's loss.
    """
    remaining = iter(chunks)

    def contrast(partials: Partials, rows: PackedRows, completions: Completions) -> Contrast:
        mine = next(remaining).completions
        contrasted = contrast_fwd(partials, rows, completions)
        logps[mine] = contrasted.logps
        value, dlogps = _derivative(value_of, logps)
        return contrasted._replace(loss=value, coefficients=_per_token(dlogps, batch)[mine])

    return contrast


def _derivative(value_of: Callable[[Tensor], Tensor], logps: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        value = value_of(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]


def _per_token(dlogps: Tensor, batch: Batch) -> Tensor:
    """(N,) dloss/dlogps -> what each counted token of a completion gets of it."""
    if not batch.completions.average:
        return dlogps
    counted = (batch.labels != batch.ignore_index).double()
    return dlogps / torch.segment_reduce(counted, "sum", offsets=batch.completions.cu_seqlens.long()).to(dlogps)


def _agree(coefficients: Tensor, dlogps: Tensor, batch: Batch) -> bool:
    exact = _per_token(dlogps, batch)
    return bool((coefficients - exact).abs().max() <= _SEPARABLE * exact.abs().max())


class _KnownGradients(torch.autograd.Function):
    """value, with gradients that are there already: the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.like = [(x.shape, x.dtype) for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple:
        refuse_second_derivative()
        pairs = zip(ctx.saved_tensors, ctx.like, strict=True)
        return None, None, *((g * dvalue).to(dtype).view(shape) for g, (shape, dtype) in pairs)


def _output(
    value: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    beta: float,
    units: int,
    sparsity: Sparsity | None = None,
    entropy: Tensor | None = None,
) -> CoPGOutput:
    log_ratios = logps - ref_logps.to(logps.dtype)
    regularized_rewards = rewards.to(logps.dtype) - beta * log_ratios
    fields = (value, logps, regularized_rewards, log_ratios)
    return CoPGOutput.of(*fields, gemm_units=torch.tensor(units), sparsity=sparsity, entropy=entropy)
