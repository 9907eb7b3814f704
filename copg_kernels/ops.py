"""The schedules as torch.library operators: opaque to torch.compile, differentiable once, checked by opcheck.

Values (labels in range, finite rewards, boundaries) are checked here, where tensors are real even under torch.compile.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from copg_kernels import checks
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.schedules import closed_groups, forward, recompute
from copg_kernels.schedules import frozen_head as frozen
from copg_kernels.schedules.chunks import Batch
from copg_kernels.schedules.tile_ops import accumulation_dtype, kept_dtype


@torch.library.custom_op("copg_kernels::linear_logps", mutates_args=())
def linear_logps_op(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    frozen_head: bool,
    entropy: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T, H), (V, H), (T,) -> per_token_logps (T,), lse (2, T), dlogp/dhidden (T, H), entropy (T,).

    The last two are empty where not asked for.
    """
    checks.require_labels(labels, lm_head_weight.shape[0], ignore_index)
    head = Head(row_major(lm_head_weight), bias, logit_scale, softcap, temperature)
    hidden_states = row_major(hidden_states)
    with on_device(hidden_states, workspace_bytes):
        if frozen_head:
            return frozen.token_logps_and_slopes(
                hidden_states,
                head,
                labels,
                ignore_index=ignore_index,
                workspace_bytes=workspace_bytes,
                backend=backend,
                entropy=entropy,
            )
        per_token_logps, lse, token_entropy = forward.token_logps(
            hidden_states,
            head,
            labels,
            ignore_index=ignore_index,
            workspace_bytes=workspace_bytes,
            backend=backend,
            entropy=entropy,
        )
    return per_token_logps, lse, lse.new_empty(0), token_entropy


@linear_logps_op.register_fake
def _(hidden_states, lm_head_weight, labels, bias, frozen_head, entropy, *options):
    per_token_logps, lse = _token_outputs(hidden_states)
    token_entropy = torch.empty_like(per_token_logps) if entropy else lse.new_empty(0)
    if frozen_head:
        slopes = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        return per_token_logps, lse, slopes, token_entropy
    return per_token_logps, lse, lse.new_empty(0), token_entropy


@torch.library.custom_op("copg_kernels::linear_logps_bwd", mutates_args=())
def linear_logps_bwd_op(
    dlogps: Tensor,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    per_token_logps: Tensor,
    lse: Tensor,
    needs: list[bool],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) upstream gradient -> gradients of hidden_states, lm_head_weight, bias; an empty tensor where not needed."""
    with on_device(hidden_states, workspace_bytes):
        return recompute.token_logps_bwd(
            dlogps.contiguous(),
            row_major(hidden_states),
            Head(row_major(lm_head_weight), bias, logit_scale, softcap, temperature),
            labels,
            per_token_logps,
            lse,
            recompute.Needs(*needs),
            ignore_index=ignore_index,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )


@linear_logps_bwd_op.register_fake
def _(dlogps, hidden_states, lm_head_weight, labels, bias, per_token_logps, lse, needs, *options):
    inputs = (hidden_states, lm_head_weight, bias)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else hidden_states.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _linear_logps_setup(ctx, inputs, output):
    hidden_states, lm_head_weight, labels, bias, ctx.frozen_head, _, *ctx.options = inputs
    per_token_logps, lse, dlogp_dhidden, entropy = output
    ctx.mark_non_differentiable(lse, dlogp_dhidden, entropy)
    # Otherwise the backward pass is given zeros of the size of every other output.
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden_states.dtype
    if ctx.frozen_head:
        ctx.save_for_backward(labels, dlogp_dhidden)
    else:
        ctx.save_for_backward(hidden_states, lm_head_weight, labels, bias, per_token_logps, lse)


def _linear_logps_backward(ctx, dlogps, *_):
    refuse_second_derivative()
    if dlogps is None:
        return (None,) * (6 + len(ctx.options))
    if ctx.frozen_head:
        labels, dlogp_dhidden = ctx.saved_tensors
        ignore_index = ctx.options[3]
        # Whatever reaches an ignored token, NaN included, goes no further.
        coefficient = torch.where(labels != ignore_index, dlogps, 0.0)
        dhidden, dweight, dbias = (dlogp_dhidden * coefficient.unsqueeze(1)).to(ctx.dtype), None, None
    else:
        needs = ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:4]
        dhidden, dweight, dbias = _token_gradients(ctx, dlogps, needs)
    return dhidden, dweight, None, dbias, None, None, *(None for _ in ctx.options)


def _token_gradients(ctx, dlogps, needs):
    hidden_states, lm_head_weight, labels, bias, per_token_logps, lse = ctx.saved_tensors[:6]
    gradients = linear_logps_bwd_op(
        dlogps, hidden_states, lm_head_weight, labels, bias, per_token_logps, lse, list(needs), *ctx.options
    )
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


linear_logps_op.register_autograd(_linear_logps_backward, setup_context=_linear_logps_setup)


@torch.library.custom_op("copg_kernels::linear_copg", mutates_args=())
def linear_copg_op(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_logps: Tensor,
    rewards: Tensor,
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    equal_sizes: list[int],
    beta: float,
    average_logps: bool,
    needs: list[bool],
    entropy: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    sparse_eps: float | None,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> Contrast, Gradients (empty where not needed), GEMM units, the numbers of Sparsity (3,).

    The gradients are computed here, where whole groups have their logits at hand; the backward pass scales them.
    equal_sizes is (tokens per completion, completions per group), empty where these differ.
    """
    completions = Completions(
        cu_seqlens,
        cu_groups,
        ref_logps,
        rewards,
        beta,
        average_logps,
        num_groups=cu_groups.numel() - 1,
        equal_sizes=(equal_sizes[0], equal_sizes[1]) if equal_sizes else None,
    )
    checks.require_batch(labels, lm_head_weight.shape[0], ignore_index, completions)
    with on_device(hidden_states, workspace_bytes):
        head = Head(row_major(lm_head_weight), bias, logit_scale, softcap, temperature)
        contrast, gradients, units, statistics = closed_groups.copg(
            Batch(row_major(hidden_states), head, labels, completions, ignore_index),
            recompute.Needs(*needs),
            sparse_eps=sparse_eps,
            workspace_bytes=workspace_bytes,
            backend=backend,
            entropy=entropy,
        )
    return *contrast, *gradients, torch.tensor(units), statistics


@linear_copg_op.register_fake
def _(
    hidden_states,
    lm_head_weight,
    labels,
    bias,
    ref_logps,
    rewards,
    cu_seqlens,
    cu_groups,
    equal_sizes,
    beta,
    average_logps,
    needs,
    entropy,
    *options,
):
    dtype, kept = accumulation_dtype(hidden_states.dtype), kept_dtype(hidden_states.dtype)
    per_completion = (torch.empty_like(rewards, dtype=dtype) for _ in range(4))
    gradients = (
        torch.empty_like(x, dtype=kept, memory_format=torch.contiguous_format)
        if need
        else hidden_states.new_empty(0, dtype=kept)
        for x, need in zip((hidden_states, lm_head_weight, bias), needs, strict=True)
    )
    units = torch.empty((), dtype=torch.int64, device="cpu")
    loss, statistics = rewards.new_empty((), dtype=dtype), rewards.new_empty((3,))
    per_token_logps, lse = _token_outputs(hidden_states)
    token_entropy = torch.empty_like(per_token_logps) if entropy else lse.new_empty(0)
    return loss, *per_completion, per_token_logps, lse, token_entropy, *gradients, units, statistics


def _linear_copg_setup(ctx, inputs, output):
    hidden_states, needs = inputs[0], inputs[11]
    ctx.needs, ctx.num_inputs, ctx.dtype = needs, len(inputs), hidden_states.dtype
    _, *others = output
    *_, dhidden, dweight, dbias, _, _ = others
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight, dbias)


def _linear_copg_backward(ctx, dloss, *_):
    refuse_second_derivative()
    if dloss is None:
        return (None,) * ctx.num_inputs
    # A loss that is differentiated by itself has nothing to scale; on a GPU it would cost a wait to find out.
    is_one = type(dloss) is Tensor and not dloss.is_cuda and dloss.item() == 1.0
    dhidden, dweight, dbias = (
        (gradient if is_one else gradient * dloss).to(ctx.dtype) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return dhidden, dweight, None, dbias, *(None for _ in range(ctx.num_inputs - 4))


linear_copg_op.register_autograd(_linear_copg_backward, setup_context=_linear_copg_setup)


def refuse_second_derivative() -> None:
    """Saved derivatives are constants to autograd: a second derivative would come out wrong, and not say so."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("copg_kernels has no second derivatives: create_graph must be False")


@contextmanager
def on_device(hidden_states: Tensor, workspace_bytes: int) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'. Out of memory says what to set.

    Without autocast, which would round the operands of the schedules' own products.
    """
    with torch.cuda.device_of(hidden_states), torch.autocast(hidden_states.device.type, enabled=False):
        try:
            yield
        except torch.OutOfMemoryError as error:
            message = (
                f"copg_kernels ran out of memory with workspace_bytes={workspace_bytes}; set a smaller one. {error}"
            )
            raise torch.OutOfMemoryError(message) from error


def _token_outputs(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    dtype, num_tokens = accumulation_dtype(hidden_states.dtype), hidden_states.shape[0]
    return hidden_states.new_empty((num_tokens,), dtype=dtype), hidden_states.new_empty((2, num_tokens), dtype=dtype)


def row_major(matrix: Tensor) -> Tensor:
    """The tile operations take any row stride, but elements of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
