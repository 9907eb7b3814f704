"""A head weight that is sharded over data-parallel ranks, whole for one forward and backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def gathered(lm_head_weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole weight from a DTensor of FSDP2, differentiable; a plain tensor is returned as it is, cast to dtype.

        gathered(W)   = W, all-gathered over the ranks of its mesh
        gradient of W = mean over these ranks of their gradients, reduce-scattered into W's own placement

    That is what FSDP2 and DDP do to all other parameters; `DTensor.full_tensor()` alone keeps each rank's own gradient.
    The mean is taken in float32 and rounded once to the weight's dtype.

    For a head outside of FSDP's hooks: `fully_shard(body)`, `fully_shard(lm_head)`, call the body as a module, then
    `linear_copg_loss(hidden_states, gathered(lm_head.weight), ...)`. A body whose parameters belong to a sharded parent
    cannot be called by itself, and `fully_shard` unties, in silence, a head that it shards apart from its embedding.
    Then put the loss into the forward of the module that is sharded: there the weight is whole, and a plain tensor.

    Args:
        lm_head_weight: (V, H) DTensor, sharded or replicated along each dimension of its mesh, all of which are
            data-parallel; or a plain tensor. A bias (V,) as well.
        dtype: of the result; the shards are cast before they travel.

    Returns:
        (V, H) plain tensor on every rank. It lives as long as the backward pass needs it.

    Raises:
        TypeError: not a tensor.
        ValueError: a placement is neither Shard nor Replicate.
    """
    if not isinstance(lm_head_weight, Tensor):
        raise TypeError(f"lm_head_weight must be a tensor, got {type(lm_head_weight).__name__}")
    dtype = dtype or lm_head_weight.dtype
    if not isinstance(lm_head_weight, DTensor):
        return lm_head_weight.to(dtype)
    for placement in lm_head_weight.placements:
        # Subclasses are other layouts: fully_shard makes _StridedShard of a weight that is tensor-parallel already.
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"lm_head_weight must be sharded or replicated along each mesh dimension, got {placement!r}: a "
                "tensor-parallel head is for parallel_linear_logps"
            )
    return _Gather.apply(lm_head_weight, dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = weight.device_mesh, weight.placements, weight.dtype
        return weight.to(dtype).full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        mesh = ctx.mesh
        summed = torch.promote_types(gradient.dtype, torch.float32)
        mine = gradient.to(summed) / mesh.size()
        partial = DTensor.from_local(mine, mesh, [Partial("sum")] * mesh.ndim, run_check=False)
        return partial.redistribute(mesh, ctx.placements).to(ctx.dtype), None
