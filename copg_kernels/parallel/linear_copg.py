"""The contrastive loss straight from hidden states and a head whose vocabulary is spread over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from copg_kernels import checks
from copg_kernels.copg import CoPGOutput, mean_of_counted
from copg_kernels.kernels.contrast import Completions
from copg_kernels.known_gradients import with_gradients
from copg_kernels.ops import gemm_units, on_device, plain_head, row_major
from copg_kernels.parallel.agreement import Call, agree
from copg_kernels.parallel.shard import HeadCall, Place, checksum, describe_head, group_of, place_of
from copg_kernels.schedules import sharded_groups
from copg_kernels.schedules.chunks import Batch
from copg_kernels.schedules.recompute import Needs
from copg_kernels.schedules.shards import IGNORED, shard_labels


@torch.compiler.disable
def parallel_linear_copg_loss(
    hidden_states: Tensor,
    lm_head_shard: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
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
    return_entropy: bool = False,
    entropy_coef: float = 0.0,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> CoPGOutput:
    """`linear_copg_loss` where each rank holds some rows of the head's weight and computes with these only.

        lm_head_weight = [lm_head_shard of rank 0; of rank 1; ...]    parallel_linear_copg_loss = linear_copg_loss of it

    The gradients are computed along with the loss, from the logits of as many whole groups as fit workspace_bytes on
    the rank with the largest shard. Before a chunk of groups is dropped the ranks exchange three float32 numbers per
    token (four where the entropy is wanted), from which each computes the same loss and coefficients, to the bit. The
    gradient of hidden_states is summed over the ranks in float32, once for the batch; the backward pass sends nothing.
    Three head GEMMs, two with a frozen head, one without gradients, each over world_size. With a trainable head or an
    entropy bonus, a group whose logits exceed workspace_bytes makes it compute the whole batch's logits twice, and so
    does float16 on a GPU; gemm_units tells.

        dlm_head_shard[v] = sum_t c[t] (1[v = labels[t]] - P[t, v]) dlogits[t, v]/dz * hidden_states[t]       own rows
        dhidden_states[t] = sum over ranks of their rows' part                     in float32; the same on every rank

    where c[t] is the loss's derivative by the log-probability of token t; see `copg_loss`. All ranks must differentiate
    the same loss of the result, and the gradients are complete: nothing is left to sum over this group.

    Args:
        hidden_states: (B, L, H) padded, or (T, H) packed with cu_seqlens; the same on all ranks.
        lm_head_shard: (V_r, H), same dtype, this rank's rows; V_r may differ and be 0. Or the whole weight as a DTensor
            that is Shard(0) on a one-dimensional mesh, whose group is then used.
        labels: (B, L) or (T,) int64, tokens of the whole vocabulary, the same on all ranks; ignore_index on prompt and
            padding.
        ref_logps, rewards: (N,) floating point, the same on all ranks.
        beta, group_size, cu_groups, cu_seqlens, average_logps, return_entropy, entropy_coef: as `linear_copg_loss`.
        bias: (V_r,), same dtype, for these rows, or a DTensor like the weight, or None on all ranks.
        logit_scale, softcap, temperature, ignore_index, backend: as `linear_logps`.
        workspace_bytes: as `linear_copg_loss`, for a rank's shard; the smallest of the ranks counts.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for all processes (with a DTensor: its mesh).

    Returns:
        CoPGOutput: loss, logps, regularized_rewards, log_ratios, float32 (float64 for float64 operands); gemm_units;
        entropy and mean_entropy where asked for. The same bits on every rank.

    Raises, on all ranks, with the rank it came from:
        TypeError, ValueError: a rank's arguments are refused as by `linear_copg_loss`; tokens, labels, ref_logps,
            rewards, groups, dtypes, options or the need of gradients differ between ranks; the DTensor has another
            placement.
        RuntimeError: of torch.distributed, where a rank dies or does not call this within the group's timeout.

    Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185.
    """
    options = (logit_scale, softcap, temperature, ignore_index, workspace_bytes, backend)
    head = HeadCall("parallel_linear_copg_loss", hidden_states, lm_head_shard, labels, bias, *options)
    numbers = (ref_logps, rewards, beta, group_size, cu_groups, cu_seqlens, average_logps, return_entropy, entropy_coef)
    call = _LossCall(head, *numbers)
    group = group_of(lm_head_shard, group)
    place = place_of(group, agree(group, lambda: _describe(call)))
    return _loss(call, place)


class _LossCall(NamedTuple):
    """What the function was called with."""

    head: HeadCall
    ref_logps: Tensor
    rewards: Tensor
    beta: float
    group_size: int | None
    cu_groups: Tensor | None
    cu_seqlens: Tensor | None
    average_logps: bool
    return_entropy: bool
    entropy_coef: float


def _describe(call: _LossCall) -> Call:
    shared, own = describe_head(call.head)
    checks.check_flag("average_logps", call.average_logps)
    checks.check_return_entropy(call.return_entropy, sparse_eps=None)
    checks.check_entropy_coef(call.entropy_coef, sparse_eps=None)
    completions = _completions(call)
    shared |= {
        "beta": completions.beta,
        "group_size": call.group_size,
        "cu_groups (their checksum)": checksum(completions.cu_groups),
        "cu_seqlens (their checksum)": checksum(completions.cu_seqlens),
        "ref_logps (their checksum)": checksum(call.ref_logps),
        "rewards (their checksum)": checksum(call.rewards),
        "average_logps": call.average_logps,
        "return_entropy": call.return_entropy,
        "entropy_coef": call.entropy_coef,
    }
    return Call(shared, own)


def _completions(call: _LossCall) -> Completions:
    """With the shapes and dtypes of their tensors checked."""
    hidden_states, labels = call.head.hidden_states, call.head.labels
    boundaries = checks.completion_boundaries(hidden_states, labels, call.cu_seqlens)
    num_sequences = boundaries.numel() - 1
    checks.check_completions(call.ref_logps, call.rewards, num_sequences, hidden_states.device)
    checks.check_beta(call.beta)
    groups = checks.group_boundaries(num_sequences, call.group_size, call.cu_groups, hidden_states.device)
    return Completions(
        boundaries.contiguous(),
        groups.contiguous(),
        call.ref_logps.detach().contiguous(),
        call.rewards.detach().contiguous(),
        float(call.beta),
        call.average_logps,
        num_groups=groups.numel() - 1,
        equal_sizes=(labels.shape[1], call.group_size) if call.cu_seqlens is None and call.group_size else None,
    )


def _loss(call: _LossCall, place: Place) -> CoPGOutput:
    head, completions, inputs = call.head, _completions(call), call.head.inputs()
    checks.require_batch(head.labels.reshape(-1), place.vocab_size, head.ignore_index, completions)
    batch, needs = _shards_batch(head, place, completions), Needs(*head.needs())
    backend = checks.resolve_backend(head.backend, head.hidden_states)
    options: dict[str, Any] = dict(workspace_bytes=place.workspace_bytes, backend=backend)
    options |= dict(entropy=call.return_entropy, entropy_coef=float(call.entropy_coef))
    with on_device(batch.hidden_states, place.workspace_bytes):
        contrast, gradients, units = sharded_groups.copg(batch, needs, place.shards, **options)
    mean_entropy = None
    if contrast.entropy.numel():
        mean_entropy = mean_of_counted(contrast.entropy, batch.labels, batch.ignore_index)
    return CoPGOutput(
        with_gradients(contrast.loss, inputs, gradients, needs, backend),
        contrast.logps,
        contrast.regularized_rewards,
        contrast.log_ratios,
        gemm_units(units, contrast.loss),
        entropy=contrast.entropy.view(head.labels.shape) if call.return_entropy else None,
        mean_entropy=mean_entropy,
    )


def _shards_batch(head: HeadCall, place: Place, completions: Completions) -> Batch:
    """All tokens, with this rank's rows of the head and its numbers of the labels."""
    hidden_states, shard, bias = head.inputs()
    bias = None if bias is None else bias.detach()
    return Batch(
        row_major(hidden_states.detach().reshape(-1, hidden_states.shape[-1])),
        plain_head(shard.detach(), bias, float(head.logit_scale), head.softcap, float(head.temperature)),
        shard_labels(head.labels.reshape(-1), head.ignore_index, place.first_row, place.num_rows),
        completions,
        IGNORED,
    )
