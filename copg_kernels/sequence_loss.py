"""Any loss on sequence log-probabilities, fused with the head: the caller's function, the closed groups' schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from copg_kernels import checks
from copg_kernels.copg import CoPGOutput, mean_of_counted, sequence_logps
from copg_kernels.kernels.contrast import Completions, Contrast, segment_sum
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.known_gradients import with_gradients
from copg_kernels.linear_logps import linear_logps, linear_logps_and_entropy
from copg_kernels.ops import gemm_units, on_device, plain_head, row_major
from copg_kernels.schedules import closed_groups, recompute
from copg_kernels.schedules.chunks import Batch, Chunk, capturing, chunks_of
from copg_kernels.schedules.tile_ops import accumulation_dtype, can_keep_tiles, tile_ops

# A separable loss gives a group the same slopes whatever the others' log-probabilities are, but for rounding.
_SEPARABLE = 1e-5


def linear_sequence_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    loss: Callable[..., Tensor],
    beta: float,
    group_size: int | None = None,
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
    entropy_coef: float = 0.0,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> CoPGOutput:
    """Any sequence-level loss straight from hidden states and the language-model head, without the logits.

        loss(sequence_logps(linear_logps(hidden_states, lm_head_weight, labels)), ref_logps, rewards, beta=...)

    Its derivatives by the log-probabilities come from autograd, and so do those by tensors of its own, such as a learnt
    baseline. Where the logits of the whole batch fit workspace_bytes it takes three head GEMMs, as `linear_copg_loss`.
    Where they do not, it takes three if every group fits and the loss is declared to be a mean over groups of a
    function of each group (`copg_kernels.losses.separable`; all losses of this package are). Any other loss takes the
    backward pass of `linear_logps`, with four. gemm_units tells.

    A loss is called once, with the log-probabilities of all completions. One that is declared separable, and meets
    several chunks, is called for each of them before, with completions to come still at the reference. In the end its
    slopes are compared with those of the last call, for which a GPU waits once: where they differ, the batch is
    computed again. In a CUDA graph and under torch.compile the backward pass is always that of `linear_logps`.

    Args:
        loss: one of `copg_kernels.losses`, or the caller's own with the signature
            (logps, ref_logps, rewards, *, beta, group_size) -> scalar. It is given cu_groups instead of group_size
            where that is set; further arguments are bound with functools.partial.
        The others: as in `linear_copg_loss`.

    Returns:
        CoPGOutput, as `linear_copg_loss`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `linear_copg_loss`; loss is no function or returns no scalar
            tensor; and what it raises itself.
    """
    checks.check_loss(loss)
    checks.check_head(hidden_states, lm_head_weight, labels, bias)
    checks.check_transforms(hidden_states, lm_head_weight, bias)
    checks.check_logit_options(logit_scale, softcap, temperature)
    checks.check_ignore_index(ignore_index)
    boundaries = checks.completion_boundaries(hidden_states, labels, cu_seqlens)
    num_sequences = boundaries.numel() - 1
    checks.check_completions(ref_logps, rewards, num_sequences, hidden_states.device)
    checks.check_beta(beta)
    group_edges = checks.group_boundaries(num_sequences, group_size, cu_groups, hidden_states.device)
    backend = checks.resolve_backend(backend, hidden_states)
    checks.check_sparse_eps(sparse_eps, hidden_states.dtype, backend)
    checks.check_return_entropy(return_entropy, sparse_eps)
    checks.check_entropy_coef(entropy_coef, sparse_eps)
    checks.check_flag("average_logps", average_logps)
    workspace = checks.check_workspace(workspace_bytes, hidden_states, labels.numel(), backend, lm_head_weight)
    ref_logps, rewards = ref_logps.detach(), rewards.detach()

    groups = {"group_size": group_size} if cu_groups is None else {"cu_groups": cu_groups}
    device = hidden_states.device.type
    # The loss runs in the caller's precision, though the schedules that call it do not.
    precision, autocasts = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    options: dict[str, Any]

    def value_of(logps: Tensor) -> Tensor:
        with torch.autocast(device, precision, autocasts):
            value = loss(logps, ref_logps, rewards, beta=beta, **groups)
        checks.check_loss_value(value)
        return value

    inputs = (hidden_states, lm_head_weight, bias)
    trains = [checks.needs_gradient(x) for x in inputs]
    is_plain = not torch.compiler.is_compiling() and not any(checks.is_transformed(x) for x in inputs if x is not None)
    completions = Completions(
        boundaries.contiguous(),
        group_edges.contiguous(),
        ref_logps.contiguous(),
        rewards.contiguous(),
        float(beta),
        average_logps,
        num_groups=group_edges.numel() - 1,
        equal_sizes=(labels.shape[1], group_size) if cu_seqlens is None and group_size is not None else None,
    )
    checks.require_batch(labels.reshape(-1), lm_head_weight.shape[0], ignore_index, completions)
    if any(trains) and sparse_eps is None and is_plain:
        weight, head_bias = lm_head_weight.detach(), None if bias is None else bias.detach()
        head = plain_head(weight, head_bias, float(logit_scale), softcap, float(temperature))
        tokens = row_major(hidden_states.detach().reshape(-1, hidden_states.shape[-1])), labels.reshape(-1)
        batch = Batch(tokens[0], head, tokens[1], completions, ignore_index)
        options = dict(workspace_bytes=workspace, backend=backend, is_separable=_is_separable(loss))
        wanted = _Entropy(labels.shape, return_entropy, float(entropy_coef))
        output = _in_closed_groups(batch, inputs, recompute.Needs(*trains), value_of, wanted, **options)
        if output is not None:
            return output
    options = dict(
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        workspace_bytes=workspace,
        backend=backend,
    )
    entropy = None
    if return_entropy or entropy_coef:
        expected = "both" if entropy_coef else "logps"
        per_token_logps, entropy = linear_logps_and_entropy(
            hidden_states, lm_head_weight, labels, expected_gradients=expected, **options
        )
    else:
        per_token_logps = linear_logps(hidden_states, lm_head_weight, labels, sparse_eps=sparse_eps, **options)
    logps = sequence_logps(
        per_token_logps, labels, cu_seqlens=cu_seqlens, average=average_logps, ignore_index=ignore_index
    )
    frozen_head = can_keep_tiles(hidden_states.dtype, backend) and trains == [True, False, False]
    units = 2 if frozen_head and not entropy_coef else 2 + sum(trains[:2]) if any(trains) else 1
    sparsity = getattr(per_token_logps, "sparsity", None)
    if sparsity is not None:
        units = 1
    known = logps.detach().clone()  # a loss may work in place
    value, mean_entropy = value_of(logps), None
    if entropy is not None:
        mean_entropy = mean_of_counted(entropy, labels, ignore_index)
        value = value - entropy_coef * mean_entropy if entropy_coef else value
    if mean_entropy is not None:
        mean_entropy = mean_entropy.detach()
    if entropy is not None:
        entropy = entropy.detach() if return_entropy else None
    output = _output(value, known, ref_logps, rewards, beta, units)
    return output._replace(sparsity=sparsity, entropy=entropy, mean_entropy=mean_entropy)


class _Entropy(NamedTuple):
    """What is asked for of it."""

    shape: torch.Size  # of the labels
    is_returned: bool
    coef: float


def _is_separable(loss: Callable[..., Tensor]) -> bool:
    while isinstance(loss, partial) and not hasattr(loss, "separable"):
        loss = loss.func
    return getattr(loss, "separable", False)


def _in_closed_groups(
    batch: Batch,
    inputs: Sequence[Tensor | None],
    needs: recompute.Needs,
    value_of: Callable[[Tensor], Tensor],
    wanted: _Entropy,
    *,
    workspace_bytes: int,
    backend: str,
    is_separable: bool,
) -> CoPGOutput | None:
    """Loss and gradients from one computation of the logits; None where they have to be computed another way."""
    completions = batch.completions
    with on_device(batch.hidden_states, workspace_bytes):
        chunks = chunks_of(batch, needs, workspace_bytes=workspace_bytes, backend=backend)
        # Over several chunks the slopes are asked for before all log-probs are there, and compared in the end.
        if chunks is None or (len(chunks) > 1 and (not is_separable or capturing(batch.labels))):
            return None
        logps = completions.ref_logps.to(accumulation_dtype(batch.hidden_states.dtype), copy=True)
        slopes = _Slopes(value_of, logps, batch)
        contrast = _contrast(slopes, chunks, tile_ops(backend).contrast_fwd)
        dentropy = closed_groups.slope_of_bonus(wanted.coef, batch) if wanted.coef else None
        entropy: dict[str, Any] = dict(entropy=wanted.is_returned or dentropy is not None, dentropy=dentropy)
        contrasted, gradients, _ = closed_groups.in_chunks(batch, chunks, needs, contrast, backend, **entropy)
        if len(chunks) > 1 and not slopes.agree_with(contrasted.coefficients):
            return None
    value, mean_entropy = slopes.value, None
    if contrasted.entropy.numel():
        mean_entropy = mean_of_counted(contrasted.entropy, batch.labels, batch.ignore_index)
        value = value - wanted.coef * mean_entropy if wanted.coef else value
    value = with_gradients(value, inputs, gradients, needs, backend)
    numbers = (completions.ref_logps, completions.rewards, completions.beta)
    output = _output(value, logps, *numbers, 1 + needs.hidden_states + needs.weight)
    token_entropy = contrasted.entropy.view(wanted.shape) if wanted.is_returned else None
    return output._replace(entropy=token_entropy, mean_entropy=mean_entropy)


class _Slopes:
    """The caller's loss at logps (N,), which fill up chunk by chunk, and its derivatives there."""

    def __init__(self, value_of: Callable[[Tensor], Tensor], logps: Tensor, batch: Batch) -> None:
        self.value_of, self.logps, self.batch = value_of, logps, batch
        self.value = logps.new_empty(())

    def per_token(self) -> Tensor:
        """Calls the loss -> what each counted token of a completion gets of dloss/dlogps, (N,); keeps the value.

        The value stays part of the graph of the loss's own tensors.
        """
        with torch.enable_grad():
            leaf = self.logps.clone().requires_grad_()
            self.value = self.value_of(leaf.clone())  # a loss may work in place
            dlogps = None
            if self.value.requires_grad:
                (dlogps,) = torch.autograd.grad(self.value, leaf, retain_graph=True, allow_unused=True)
        if dlogps is None:
            return torch.zeros_like(self.logps)
        if not self.batch.completions.average:
            return dlogps
        counted = self.batch.labels != self.batch.ignore_index
        return (dlogps / segment_sum(counted, self.batch.completions.cu_seqlens)).to(dlogps.dtype)

    def agree_with(self, coefficients: Tensor) -> bool:
        """Whether those of the chunks are those of the whole batch."""
        exact = self.per_token()
        return bool((coefficients - exact).abs().max() <= _SEPARABLE * exact.abs().max())


def _contrast(
    slopes: _Slopes, chunks: list[Chunk], contrast_fwd: Callable[[Partials, PackedRows, Completions], Contrast]
) -> Callable[[Partials, PackedRows, Completions], Contrast]:
    """The contrast of one chunk after the other: log-probabilities of `contrast_fwd`, coefficients of the loss."""
    remaining = iter(chunks)

    def contrast(partials: Partials, rows: PackedRows, completions: Completions) -> Contrast:
        mine = next(remaining).completions
        contrasted = contrast_fwd(partials, rows, completions)
        slopes.logps[mine] = contrasted.logps
        return contrasted._replace(coefficients=slopes.per_token()[mine])

    return contrast


def _output(
    value: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    beta: float,
    units: int,
) -> CoPGOutput:
    log_ratios = logps.double() - ref_logps.double()
    regularized_rewards = rewards.double() - beta * log_ratios
    return CoPGOutput(
        value,
        logps,
        regularized_rewards.to(logps.dtype),
        log_ratios.to(logps.dtype),
        gemm_units(units, logps),
    )
