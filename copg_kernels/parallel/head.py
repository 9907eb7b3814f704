"""Per-token log-probabilities of a head whose vocabulary is spread over the ranks of a process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from copg_kernels import checks
from copg_kernels.kernels.head import Head
from copg_kernels.ops import on_device, plain_head, row_major
from copg_kernels.parallel.agreement import Call, agree, process_group
from copg_kernels.schedules import vocab_parallel
from copg_kernels.schedules.recompute import Needs


class _Options(NamedTuple):
    """How the logits come out, and what computes them."""

    logit_scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    workspace_bytes: int | None
    backend: str


def shard_bounds(vocab_size: int, world_size: int, rank: int) -> tuple[int, int]:
    """First and past-the-last row of a rank's shard, as torch.chunk and DTensor split: the last ranks may be short.

    Examples:
        >>> [shard_bounds(5, 4, rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    if vocab_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            "shard_bounds needs vocab_size >= 1, world_size >= 1 and 0 <= rank < world_size, "
            f"got {vocab_size}, {world_size} and {rank}"
        )
    size = -(-vocab_size // world_size)
    return min(rank * size, vocab_size), min((rank + 1) * size, vocab_size)


@torch.compiler.disable
def parallel_linear_logps(
    hidden_states: Tensor,
    lm_head_shard: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """`linear_logps` where each rank holds some rows of the head's weight and computes with these only.

        lm_head_weight = [lm_head_shard of rank 0; of rank 1; ...]          parallel_linear_logps = linear_logps of it

    Exact, and as precise as `linear_logps`: the ranks exchange the float32 statistics of their logits (largest, sum of
    exponentials without the label's, the label's), three numbers per token, and merge them in rank order. Gradients:

        dlm_head_shard[v] = sum_t g[t] (1[v = labels[t]] - P[t, v]) dlogits[t, v]/dz * hidden_states[t]       own rows
        dhidden_states[t] = sum over ranks of their rows' part                     in float32; the same on every rank

    where P is the softmax over the whole vocabulary. So all ranks must differentiate the same loss of the result, and
    the gradients are complete: nothing is left to sum over this group. Three head GEMMs more than the forward pass's
    one, each over world_size; equal calls give equal bits.

    Args:
        hidden_states: (..., H), the same on all ranks; where the sequence is sharded, gather it first.
        lm_head_shard: (V_r, H), same dtype, this rank's rows; V_r may differ and be 0. Or the whole weight as a DTensor
            that is Shard(0) on a one-dimensional mesh, whose group is then used.
        labels: (...,) int64, tokens of the whole vocabulary, the same on all ranks.
        bias: (V_r,), same dtype, for these rows, or a DTensor like the weight, or None on all ranks.
        logit_scale, softcap, temperature, ignore_index, workspace_bytes, backend: as `linear_logps`.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for all processes (with a DTensor: its mesh).

    Returns:
        (...,) float32, in nats (float64 for float64 operands), the same bits on every rank.

    Raises, on all ranks, with the rank it came from:
        TypeError, ValueError: a rank's arguments are refused as by `linear_logps`; tokens, labels, dtypes, options or
            the need of dhidden_states differ between ranks; the DTensor has another placement.
        RuntimeError: of torch.distributed, where a rank dies or does not call this within the group's timeout.
    """
    group = process_group(_mesh_or_group(lm_head_shard, group))
    options = _Options(logit_scale, softcap, temperature, ignore_index, workspace_bytes, backend)
    sizes = agree(group, lambda: _describe(hidden_states, lm_head_shard, labels, bias, options))
    checks.require_labels(labels, sum(sizes), ignore_index)
    first_row, num_rows = sum(sizes[: dist.get_rank(group)]), sizes[dist.get_rank(group)]
    backend = checks.resolve_backend(backend, hidden_states)
    per_token_logps = _ParallelLogps.apply(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        _local("lm_head_shard", lm_head_shard),
        _local("bias", bias),
        vocab_parallel.shard_labels(labels.reshape(-1), ignore_index, first_row, num_rows),
        (float(logit_scale), softcap, float(temperature)),
        group,
        dict(
            workspace_bytes=checks.check_workspace(workspace_bytes, hidden_states, labels.numel(), backend),
            backend=backend,
        ),
    )
    return per_token_logps.view(labels.shape)


class _ParallelLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        shard: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_options: tuple[float, float | None, float],
        group: dist.ProcessGroup,
        options: dict[str, Any],
    ) -> Tensor:
        hidden_states, head = row_major(hidden_states), plain_head(shard, bias, *logit_options)
        with on_device(hidden_states, options["workspace_bytes"]):
            per_token_logps, lse = vocab_parallel.token_logps(hidden_states, head, labels, group, **options)
        ctx.logit_options, ctx.group, ctx.options = logit_options, group, options
        ctx.save_for_backward(hidden_states, *head[:2], labels, per_token_logps, lse)
        return per_token_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight, bias, labels, per_token_logps, lse = ctx.saved_tensors
        needs, head = Needs(*ctx.needs_input_grad[:3]), Head(weight, bias, *ctx.logit_options)
        operands = (dlogps.contiguous(), hidden_states, head, labels, per_token_logps, lse, needs, ctx.group)
        with on_device(hidden_states, ctx.options["workspace_bytes"]):
            gradients = vocab_parallel.token_logps_bwd(*operands, **ctx.options)
        wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *wanted, None, None, None, None


def _mesh_or_group(
    lm_head_shard: Tensor, group: dist.ProcessGroup | DeviceMesh | None
) -> dist.ProcessGroup | DeviceMesh | None:
    if not isinstance(lm_head_shard, DTensor):
        return group
    mesh = lm_head_shard.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"lm_head_shard must be a DTensor on a one-dimensional mesh, got {mesh.ndim} dimensions with placements "
            f"{tuple(lm_head_shard.placements)}: gather the data-parallel ones first (FSDP2 does in forward)"
        )
    if group is not None and process_group(group) is not mesh.get_group():
        raise ValueError("group must be that of lm_head_shard's mesh, or None, where lm_head_shard is a DTensor")
    return mesh


def _describe(
    hidden_states: Tensor, lm_head_shard: Tensor, labels: Tensor, bias: Tensor | None, options: _Options
) -> Call:
    shard, bias = _local("lm_head_shard", lm_head_shard), _local("bias", bias)
    checks.check_head(hidden_states, shard, labels, bias, least_rows=0)
    checks.check_transforms(hidden_states, shard, bias)
    checks.check_ignore_index(options.ignore_index)
    checks.check_logit_options(options.logit_scale, options.softcap, options.temperature)
    backend = checks.resolve_backend(options.backend, hidden_states)
    checks.check_workspace(options.workspace_bytes, hidden_states, labels.numel(), backend)
    odd_numbers = 1 + 2 * torch.arange(labels.numel(), device=labels.device)
    shared = {
        "the shape of hidden_states": tuple(hidden_states.shape),
        "the dtype of hidden_states": hidden_states.dtype,
        "labels (their checksum)": int((labels.reshape(-1) * odd_numbers).sum()),
        "the use of bias": bias is not None,
        "the need of a gradient of hidden_states": torch.is_grad_enabled() and hidden_states.requires_grad,
        "logit_scale": options.logit_scale,
        "softcap": options.softcap,
        "temperature": options.temperature,
        "ignore_index": options.ignore_index,
        "backend": backend,
    }
    return Call(shared, shard.shape[0])


def _local(name: str, value: Any) -> Any:
    """This rank's rows of a DTensor; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    if tuple(value.placements) != (Shard(0),):
        raise ValueError(f"{name} must be placed as (Shard(0),) where it is a DTensor, got {tuple(value.placements)}")
    return value.to_local()
