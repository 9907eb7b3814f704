"""Per-token log-probabilities of a head whose vocabulary is spread over the ranks of a process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from copg_kernels import checks
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.row_statistics import Wanted
from copg_kernels.ops import on_device, plain_head, row_major
from copg_kernels.parallel.agreement import Call, agree
from copg_kernels.parallel.shard import HeadCall, describe_head, group_of, place_of
from copg_kernels.schedules import frozen_head, vocab_parallel
from copg_kernels.schedules.recompute import Gradients, Needs
from copg_kernels.schedules.shards import IGNORED, Shards, shard_labels
from copg_kernels.schedules.tile_ops import can_keep_tiles


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
    one, each over world_size; equal calls give equal bits. With a frozen head dlogp/dhidden_states is formed and summed
    over the ranks along with logp, as `linear_logps` does it: two GEMMs, and a backward pass that sends nothing
    (float16 on a GPU: three).

    Args:
        hidden_states: (..., H), the same on all ranks; where the sequence is sharded, gather it first.
        lm_head_shard: (V_r, H), same dtype, this rank's rows; V_r may differ and be 0. Or the whole weight as a DTensor
            that is Shard(0) on a one-dimensional mesh, whose group is then used.
        labels: (...,) int64, tokens of the whole vocabulary, the same on all ranks.
        bias: (V_r,), same dtype, for these rows, or a DTensor like the weight, or None on all ranks.
        logit_scale, softcap, temperature, ignore_index, backend: as `linear_logps`.
        workspace_bytes: as `linear_logps`, for a rank's shard; the smallest of the ranks counts.
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for all processes (with a DTensor: its mesh).

    Returns:
        (...,) float32, in nats (float64 for float64 operands), the same bits on every rank.

    Raises, on all ranks, with the rank it came from:
        TypeError, ValueError: a rank's arguments are refused as by `linear_logps`; tokens, labels, dtypes, options or
            the need of gradients differ between ranks; the DTensor has another placement.
        RuntimeError: of torch.distributed, where a rank dies or does not call this within the group's timeout.
    """
    options = (logit_scale, softcap, temperature, ignore_index, workspace_bytes, backend)
    call = HeadCall("parallel_linear_logps", hidden_states, lm_head_shard, labels, bias, *options)
    return _logps(call, group, slopes="logps", entropy=False)[0]


@torch.compiler.disable
def parallel_linear_logps_and_entropy(
    hidden_states: Tensor,
    lm_head_shard: Tensor,
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
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> tuple[Tensor, Tensor]:
    """`parallel_linear_logps`, and the entropy of each row's softmax over the whole vocabulary; both differentiable.

        entropy[t] = -sum_v P[t, v] log P[t, v],    P = softmax(logits)        (0 where labels[t] = ignore_index)

    `linear_logps_and_entropy` of the head whose rows the ranks hold. A fourth number per token travels: of a rank's
    entries, sum_v exp(z - max) (z - max). The log-probabilities have the bits of `parallel_linear_logps`. With upstream
    gradients g of the log-probabilities and h of the entropy, the gradient of a rank's own logits is

        dlogits[t, v] = g[t] (1[v = labels[t]] - P[t, v]) - h[t] P[t, v] (log P[t, v] + entropy[t])

    and goes on as in `parallel_linear_logps`. A trainable head takes four head GEMMs in all, a frozen one three, or two
    where the forward pass knows what will arrive; each over world_size.

    Args:
        expected_gradients: as in `linear_logps_and_entropy`, the same on all ranks.
        The others: as in `parallel_linear_logps`.

    Returns:
        per_token_logps, entropy: (...,) float32, in nats (float64 for float64 operands), the same bits on every rank.

    Raises, on all ranks, with the rank it came from:
        TypeError, ValueError, RuntimeError: as `parallel_linear_logps`; expected_gradients is none of the three, or
            differs between ranks.
    """
    options = (logit_scale, softcap, temperature, ignore_index, workspace_bytes, backend)
    call = HeadCall("parallel_linear_logps_and_entropy", hidden_states, lm_head_shard, labels, bias, *options)
    return _logps(call, group, slopes=expected_gradients, entropy=True)


class _Setting(NamedTuple):
    """Everything but the tensors that may need a gradient."""

    labels: Tensor  # (T,) of the shard
    logit_options: tuple[float, float | None, float]
    shards: Shards
    slopes: str
    """Whose derivative the forward pass forms, as in `linear_logps_op`: that of "logps", of "entropy", or "none"."""
    entropy: bool
    options: dict[str, Any]  # workspace_bytes and backend


def _logps(
    call: HeadCall, group: dist.ProcessGroup | DeviceMesh | None, *, slopes: str, entropy: bool
) -> tuple[Tensor, Tensor]:
    """slopes: which upstream gradients are expected."""
    group = group_of(call.lm_head_shard, group)
    place = place_of(group, agree(group, lambda: _describe(call, slopes)))
    checks.require_labels(call.labels, place.vocab_size, call.ignore_index)
    hidden_states, shard, bias = call.inputs()
    backend = checks.resolve_backend(call.backend, hidden_states)
    is_frozen = call.needs() == [True, False, False] and can_keep_tiles(hidden_states.dtype, backend)
    setting = _Setting(
        shard_labels(call.labels.reshape(-1), call.ignore_index, place.first_row, place.num_rows),
        (float(call.logit_scale), call.softcap, float(call.temperature)),
        place.shards,
        slopes if is_frozen and slopes != "both" else "none",
        entropy,
        dict(workspace_bytes=place.workspace_bytes, backend=backend),
    )
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    per_token_logps, token_entropy = _ParallelLogps.apply(flat, shard, bias, setting)
    shape = call.labels.shape
    return per_token_logps.view(shape), token_entropy.view(shape) if entropy else token_entropy


def _describe(call: HeadCall, expected_gradients: str) -> Call:
    checks.check_expected_gradients(expected_gradients)
    shared, own = describe_head(call)
    return Call(shared | {"expected_gradients": expected_gradients}, own)


class _ParallelLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, shard: Tensor, bias: Tensor | None, setting: _Setting
    ) -> tuple[Tensor, Tensor]:
        ctx.setting, ctx.dtype = setting, hidden_states.dtype
        ctx.set_materialize_grads(False)
        hidden_states, head = row_major(hidden_states), plain_head(shard, bias, *setting.logit_options)
        tokens, shards = (hidden_states, head, setting.labels), setting.shards
        options: dict[str, Any] = dict(setting.options)
        with on_device(hidden_states, setting.options["workspace_bytes"]):
            if setting.slopes == "none":
                options |= dict(entropy=setting.entropy)
                per_token_logps, lse, entropy = vocab_parallel.token_logps(*tokens, shards, **options)
                u = lse.new_empty(0)
            else:
                options |= dict(ignore_index=IGNORED, of_entropy=setting.slopes == "entropy", shards=shards)
                options |= dict(wanted=Wanted(setting.entropy))
                per_token_logps, lse, u, statistics = frozen_head.token_logps_and_slopes(*tokens, **options)
                entropy = statistics.entropy
        known = (hidden_states, *head[:2], per_token_logps, lse, entropy)
        ctx.save_for_backward(u, *(known if setting.slopes == "none" or setting.entropy else ()))
        if not setting.entropy:
            ctx.mark_non_differentiable(entropy)
        return per_token_logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogps is None and dentropy is None:
            return None, None, None, None
        setting = ctx.setting
        known = {"logps": (dlogps, dentropy), "entropy": (dentropy, dlogps), "none": (None, True)}
        upstream, other = known[setting.slopes]
        if other is None:
            assert upstream is not None
            # Whatever reaches an ignored token, NaN included, goes no further.
            coefficient = upstream.where(setting.labels != IGNORED, 0.0)
            return (ctx.saved_tensors[0] * coefficient.unsqueeze(1)).to(ctx.dtype), None, None, None
        needs = Needs(*ctx.needs_input_grad[:3])
        gradients = _recomputed(setting, dlogps, dentropy, ctx.saved_tensors[1:], needs)
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None


def _recomputed(
    setting: _Setting, dlogps: Tensor | None, dentropy: Tensor | None, saved: tuple[Tensor, ...], needs: Needs
) -> Gradients:
    hidden_states, weight, bias, per_token_logps, lse, entropy = saved
    head = Head(weight, bias, *setting.logit_options)
    dlogps = None if dlogps is None else dlogps.contiguous()
    operands = (dlogps, hidden_states, head, setting.labels, per_token_logps, lse, needs, setting.shards)
    with on_device(hidden_states, setting.options["workspace_bytes"]):
        return vocab_parallel.token_logps_bwd(*operands, **setting.options, dentropy=dentropy, entropy=entropy)
