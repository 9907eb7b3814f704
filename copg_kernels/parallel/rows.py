"""Rows of all ranks side by side, differentiable in one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from copg_kernels.parallel.agreement import process_group


@torch.compiler.disable
def gather_rows(
    rows: Tensor, num_rows: Sequence[int], *, group: dist.ProcessGroup | DeviceMesh | None = None
) -> Tensor:
    """The rows of rank 0, of rank 1, ...; a rank's gradient is that of its own rows.

        gathered      = cat(rows of each rank)
        drows_of_rank = dgathered[rows of rank], without communication

    That is the gradient of a loss which every rank computes from all rows with the same result, as `copg_loss` of all
    log-probs or `parallel_linear_logps` of all hidden states: a shared parameter's gradient is then the sum over ranks.

    Args:
        rows: (n_r, ...) of any dtype, n_r may be 0; the other dimensions and the dtype are the same on all ranks.
        num_rows: n_r of each rank, in rank order; the same list on all ranks, which is not compared here.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for all processes.

    Returns:
        (sum of num_rows, ...).

    Raises:
        ValueError: num_rows does not have a number per rank, or not rows' own.
        RuntimeError: of torch.distributed, where a rank dies or does not call this within the group's timeout.
    """
    group = process_group(group)
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if len(num_rows) != world_size or num_rows[rank] != rows.shape[0]:
        raise ValueError(
            f"num_rows must have a number for each of {world_size} ranks, and {rows.shape[0]} for rank {rank}, "
            f"got {list(num_rows)}"
        )
    # Gloo and NCCL gather equal shapes only.
    padded = rows.new_zeros((max(num_rows), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in num_rows]
    dist.all_gather(gathered, padded, group=group)
    parts = [part[:n] for part, n in zip(gathered, num_rows, strict=True)]
    parts[rank] = rows
    return torch.cat(parts)
