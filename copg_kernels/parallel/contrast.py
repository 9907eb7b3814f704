"""The contrastive loss over completions of one prompt that lie on several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from copg_kernels import checks
from copg_kernels.copg import copg_loss
from copg_kernels.parallel.agreement import Call, agree, process_group
from copg_kernels.parallel.rows import gather_rows


@torch.compiler.disable
def parallel_copg_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """`copg_loss` over the completions of all ranks, whose groups may span ranks.

        loss = copg_loss(logps of rank 0, of rank 1, ..., the same for ref_logps and rewards)

    Three numbers per completion travel (four with group_ids), once: the backward pass needs no communication. Every
    rank gets the same loss, the mean over the prompts of all ranks, and its own completions' part of the gradient,
    dloss / dlogps_i = -(A_i - mean_{j != i} A_j) / (k * prompts of all ranks). The gradient of a shared parameter is
    therefore the sum over ranks. DDP and FSDP2 average over ranks instead: give them `loss * world_size`.

    Args:
        logps: (N_r,) floating point, log pi(y|x) of this rank's completions in nats; N_r may differ between ranks, and
            be 0. The only differentiable argument.
        ref_logps, rewards: (N_r,) floating point.
        beta: as in `copg_loss`.
        group_size: k >= 2 consecutive completions per prompt, counted through the ranks in their order; divides the
            number of completions of all ranks. It has no default.
        group_ids: (N_r,) int64, the prompt of each completion, instead of group_size: completions with the same number
            form a group, of any size from two, wherever they are.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for all processes.

    Returns:
        Scalar float32 (float64 for float64 logps), with the same bits on every rank.

    Raises, on all ranks, with the rank it came from:
        TypeError, ValueError: a rank's arguments are refused as by `copg_loss`; beta, group_size, the dtype of logps or
            the use of group_ids differ between ranks; group_size does not divide the completions; a prompt has one.
        RuntimeError: of torch.distributed, where a rank dies or does not call this within the group's timeout.

    Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185.
    """
    group = process_group(group)
    sizes = agree(group, lambda: _describe(logps, ref_logps, rewards, beta, group_size, group_ids))
    if group_size is not None and (sum(sizes) == 0 or sum(sizes) % group_size):
        per_rank = dict(zip(dist.get_process_group_ranks(group), sizes, strict=True))
        raise ValueError(
            f"group_size must divide the number of completions of all ranks, {sum(sizes)}, got {group_size} and "
            f"completions per rank {per_rank}"
        )
    local = torch.stack([logps.double(), ref_logps.detach().double(), rewards.detach().double()], dim=1)
    completions = gather_rows(local, sizes, group=group)
    cu_groups = None
    if group_ids is not None:
        order, cu_groups = _consecutive(gather_rows(group_ids, sizes, group=group))
        completions = completions[order]
    all_logps, (all_ref_logps, all_rewards) = completions[:, 0], completions[:, 1:].detach().unbind(1)
    loss = copg_loss(all_logps, all_ref_logps, all_rewards, beta=beta, group_size=group_size, cu_groups=cu_groups)
    return loss if logps.dtype == torch.float64 else loss.float()


def _describe(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, group_size: int | None, group_ids: Tensor | None
) -> Call:
    checks.check_loss_values(logps, ref_logps, rewards, beta)
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        raise ValueError(f"group_size or group_ids must be given, and not both; got {came}")
    if group_size is not None:
        checks.check_group_size(group_size)
    if group_ids is not None:
        checks.check_group_ids(group_ids, logps)
    return Call({"beta": beta, "group_size": group_size, "the dtype of logps": logps.dtype}, logps.numel())


def _consecutive(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) -> the order that puts groups side by side, and their boundaries."""
    sorted_ids, order = group_ids.sort(stable=True)
    ids, counts = sorted_ids.unique_consecutive(return_counts=True)
    if not ids.numel() or (counts < 2).any():
        alone = ids[counts < 2].tolist()[:8]
        raise ValueError(f"group_ids must give every prompt at least two completions, got one for {alone or 'none'}")
    boundaries = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return order, boundaries.to(torch.int32)
