"""The schedules as torch.library operators: opaque to torch.compile, differentiable once, checked by opcheck.

Values (labels in range, finite rewards, boundaries) are checked here, where tensors are real even under torch.compile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from copg_kernels import checks
from copg_kernels.kernels.contrast import Completions
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.matmul import sums_in_full
from copg_kernels.kernels.row_statistics import Wanted
from copg_kernels.kernels.scale_gradient import scale_gradient_
from copg_kernels.kernels.token_statistics import no_statistics
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
    slopes: str,
    wanted: list[bool],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(T, H), (V, H), (T,) -> per_token_logps (T,), lse (2, T), u (T, H), (T,) each of TokenStatistics.

    slopes, where the head is frozen: u is the derivative by the hidden states of "logps" or of "entropy"; "none".
    wanted: which of the statistics. u and they are empty where not asked for.
    """
    checks.require_labels(labels, lm_head_weight.shape[0], ignore_index)
    head = plain_head(lm_head_weight, bias, logit_scale, softcap, temperature)
    hidden_states = row_major(hidden_states)
    with on_device(hidden_states, workspace_bytes):
        if slopes != "none":
            per_token_logps, lse, u, statistics = frozen.token_logps_and_slopes(
                hidden_states,
                head,
                labels,
                ignore_index=ignore_index,
                workspace_bytes=workspace_bytes,
                backend=backend,
                wanted=Wanted(*wanted),
                of_entropy=slopes == "entropy",
            )
            return per_token_logps, lse, u, *statistics
        per_token_logps, lse, statistics = forward.token_logps(
            hidden_states,
            head,
            labels,
            ignore_index=ignore_index,
            workspace_bytes=workspace_bytes,
            backend=backend,
            wanted=Wanted(*wanted),
        )
    return per_token_logps, lse, lse.new_empty(0), *statistics


@linear_logps_op.register_fake
def _(hidden_states, lm_head_weight, labels, bias, slopes, wanted, *options):
    per_token_logps, lse = _token_outputs(hidden_states)
    nothing = no_statistics(per_token_logps)
    statistics = (x.new_empty(labels.shape) if want else x for x, want in zip(nothing, wanted, strict=True))
    if slopes != "none":
        kept = kept_dtype(hidden_states.dtype)
        u = torch.empty_like(hidden_states, dtype=kept, memory_format=torch.contiguous_format)
        return per_token_logps, lse, u, *statistics
    return per_token_logps, lse, lse.new_empty(0), *statistics


@torch.library.custom_op("copg_kernels::linear_logps_bwd", mutates_args=())
def linear_logps_bwd_op(
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    per_token_logps: Tensor,
    lse: Tensor,
    entropy: Tensor,
    needs: list[bool],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) upstream gradients -> gradients of hidden_states, lm_head_weight, bias; an empty tensor where not needed."""
    with on_device(hidden_states, workspace_bytes):
        return recompute.token_logps_bwd(
            None if dlogps is None else dlogps.contiguous(),
            row_major(hidden_states),
            plain_head(lm_head_weight, bias, logit_scale, softcap, temperature),
            labels,
            per_token_logps,
            lse,
            recompute.Needs(*needs),
            ignore_index=ignore_index,
            workspace_bytes=workspace_bytes,
            backend=backend,
            dentropy=dentropy,
            entropy=entropy,
        )


@linear_logps_bwd_op.register_fake
def _(dlogps, dentropy, hidden_states, lm_head_weight, labels, bias, per_token_logps, lse, entropy, needs, *options):
    inputs = (hidden_states, lm_head_weight, bias)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else hidden_states.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _linear_logps_setup(ctx, inputs, output):
    hidden_states, lm_head_weight, labels, bias, ctx.slopes, (has_entropy, *_), *ctx.options = inputs
    per_token_logps, lse, u, entropy, *others = output
    ctx.mark_non_differentiable(lse, u, *([] if has_entropy else [entropy]), *others)
    # Otherwise the backward pass is given zeros of the size of every other output.
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden_states.dtype
    if ctx.slopes == "none" or has_entropy:
        ctx.save_for_backward(labels, u, hidden_states, lm_head_weight, bias, per_token_logps, lse, entropy)
    else:
        ctx.save_for_backward(labels, u)


def _linear_logps_backward(ctx, dlogps, _, __, dentropy, *___):
    refuse_second_derivative()
    dhidden = dweight = dbias = None
    known = {"logps": (dlogps, dentropy), "entropy": (dentropy, dlogps), "none": (None, True)}
    upstream, other = known[ctx.slopes]
    if dlogps is None and dentropy is None:
        pass
    elif other is None:
        dhidden = _scaled_slopes(ctx, upstream)
    else:
        needs = ctx.needs_input_grad[:2] + ctx.needs_input_grad[3:4]
        dhidden, dweight, dbias = _token_gradients(ctx, dlogps, dentropy, needs)
    return dhidden, dweight, None, dbias, None, None, *(None for _ in ctx.options)


def _scaled_slopes(ctx, upstream):
    labels, u = ctx.saved_tensors[:2]
    ignore_index = ctx.options[3]
    # Whatever reaches an ignored token, NaN included, goes no further.
    coefficient = torch.where(labels != ignore_index, upstream, 0.0)
    return (u * coefficient.unsqueeze(1)).to(ctx.dtype)


def _token_gradients(ctx, dlogps, dentropy, needs):
    labels, _, hidden_states, lm_head_weight, bias, per_token_logps, lse, entropy = ctx.saved_tensors
    operands = (hidden_states, lm_head_weight, labels, bias, per_token_logps, lse, entropy)
    gradients = linear_logps_bwd_op(dlogps, dentropy, *operands, list(needs), *ctx.options)
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
    entropy_coef: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    sparse_eps: float | None,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> Contrast, Gradients (empty where not needed), GEMM units, the numbers of Sparsity (3,).

    With entropy_coef the loss and the gradients have the entropy bonus, and entropy is there, asked for or not.
    The gradients are computed here, where whole groups have their logits at hand; the backward pass scales them.
    equal_sizes is (tokens per completion, completions per group), empty where these differ.
    """
    completions = Completions(
        cu_seqlens.contiguous(),
        cu_groups.contiguous(),
        ref_logps.contiguous(),
        rewards.contiguous(),
        beta,
        average_logps,
        num_groups=cu_groups.numel() - 1,
        equal_sizes=(equal_sizes[0], equal_sizes[1]) if equal_sizes else None,
    )
    checks.require_batch(labels, lm_head_weight.shape[0], ignore_index, completions)
    with on_device(hidden_states, workspace_bytes):
        head = plain_head(lm_head_weight, bias, logit_scale, softcap, temperature)
        contrast, gradients, units, statistics = closed_groups.copg(
            Batch(row_major(hidden_states), head, labels, completions, ignore_index),
            recompute.Needs(*needs),
            sparse_eps=sparse_eps,
            workspace_bytes=workspace_bytes,
            backend=backend,
            entropy=entropy,
            entropy_coef=entropy_coef,
        )
    return *contrast, *gradients, gemm_units(units, contrast.loss), statistics


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
    entropy_coef,
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
    units = rewards.new_empty((), dtype=torch.int64)
    loss, statistics = rewards.new_empty((), dtype=dtype), rewards.new_empty((3,), dtype=dtype)
    per_token_logps, lse = _token_outputs(hidden_states)
    token_entropy = torch.empty_like(per_token_logps) if entropy or entropy_coef else lse.new_empty(0)
    return loss, *per_completion, per_token_logps, lse, token_entropy, *gradients, units, statistics


def _linear_copg_setup(ctx, inputs, output):
    hidden_states, needs = inputs[0], inputs[11]
    ctx.needs, ctx.num_inputs, ctx.dtype, ctx.backend = needs, len(inputs), hidden_states.dtype, inputs[-1]
    _, *others = output
    *_, dhidden, dweight, dbias, _, _ = others
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight, dbias)


def _linear_copg_backward(ctx, dloss, *_):
    refuse_second_derivative()
    if dloss is None:
        return (None,) * ctx.num_inputs
    wanted = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[3]]
    if wanted != ctx.needs:
        raise NotImplementedError(
            "linear_copg_loss was called where it could not see which of its inputs require gradients (torch.func.vmap "
            "within torch.compile), and computed none"
        )
    gradients = scaled_once(ctx.saved_tensors, dloss, ctx.backend)
    dhidden, dweight, dbias = (
        gradient.to(ctx.dtype) if need else None for gradient, need in zip(gradients, ctx.needs, strict=True)
    )
    return dhidden, dweight, None, dbias, *(None for _ in range(ctx.num_inputs - 4))


linear_copg_op.register_autograd(_linear_copg_backward, setup_context=_linear_copg_setup)


def scaled_once(gradients: Sequence[Tensor], dloss: Tensor, backend: str) -> list[Tensor]:
    """Gradients that waited for the backward pass, times the loss's own, which nearly always is 1.

    In place where nobody will ask for them again, as the graph is not kept: the head's is the largest tensor there is.
    """
    if type(dloss) is not Tensor or torch.compiler.is_compiling() or _graph_is_kept():
        return [gradient * dloss for gradient in gradients]
    if backend == "triton":
        with torch.cuda.device_of(dloss):
            return [scale_gradient_(gradient, dloss) for gradient in gradients]
    is_one = not dloss.is_cuda and dloss.item() == 1.0
    return [gradient if is_one else gradient.mul_(dloss) for gradient in gradients]


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


def gemm_units(units: int, like: Tensor) -> Tensor:
    """() int64 beside the loss: a wrapper that gathers outputs wants them all on one device."""
    return torch.full((), units, dtype=torch.int64, device=like.device)


def refuse_second_derivative() -> None:
    """Saved derivatives are constants to autograd: a second derivative would come out wrong, and not say so."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("copg_kernels has no second derivatives: create_graph must be False")


@contextmanager
def on_device(hidden_states: Tensor, workspace_bytes: int) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors'. Out of memory says what to set.

    The schedules' own products keep their digits: no autocast, and sums in full.
    """
    device = torch.cuda.device_of(hidden_states)
    with device, torch.autocast(hidden_states.device.type, enabled=False), sums_in_full():
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


def plain_head(
    weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float
) -> Head:
    """The head as kernels read it: rows of the weight side by side in themselves, the bias contiguous."""
    return Head(row_major(weight), None if bias is None else bias.contiguous(), logit_scale, softcap, temperature)


def row_major(matrix: Tensor) -> Tensor:
    """The tile operations take any row stride, but elements of a row side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)
