"""What is refused at the door: each error names the argument, what was expected and what came.

Shapes, dtypes and devices are checked by the public functions, while tracing too. Values are checked where the real
tensors are: on a CPU as a ValueError, on a GPU as a device assertion, which costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from copg_kernels.kernels.contrast import Completions, segment_sum
from copg_kernels.kernels.language import INTERPRETING, triton
from copg_kernels.schedules.tile_ops import can_keep_tiles
from copg_kernels.schedules.workspace import default_workspace_bytes, least_workspace_bytes

# Comparisons instead of math.isfinite, which torch.compile cannot trace on a symbolic number.
_INFINITY = float("inf")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def resolve_backend(backend: str, hidden_states: Tensor) -> str:
    """ "auto" -> "triton" on a GPU that has it, "torch" elsewhere; an explicit request is granted or refused."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}')
    if backend == "auto":
        return "triton" if hidden_states.is_cuda and triton is not None and not INTERPRETING else "torch"
    if backend == "triton" and triton is None:
        raise ValueError('backend="triton" needs the triton package, which is not installed; use backend="torch"')
    if backend == "triton" and not hidden_states.is_cuda and not INTERPRETING:
        raise ValueError(
            f'backend="triton" needs CUDA tensors, got hidden_states on {hidden_states.device}; use backend="torch", '
            "or set TRITON_INTERPRET=1 before the first import to run the kernels in the interpreter"
        )
    if backend == "triton" and hidden_states.dtype == torch.float64:
        raise TypeError('hidden_states must be float32, bfloat16 or float16 for backend="triton", got torch.float64')
    return backend


def check_head(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, bias: Tensor | None, *, least_rows: int = 1
) -> None:
    """Shapes, dtypes and devices of the head's operands, all of them plain; a shard of the head may have no row."""
    _refuse_dtensor("hidden_states", hidden_states, "pass its full_tensor()")
    _refuse_dtensor("labels", labels, "pass its full_tensor()")
    for_shards = (
        "copg_kernels.parallel.gathered makes it whole, parallel_linear_logps and parallel_linear_copg_loss take shards"
    )
    _refuse_dtensor("lm_head_weight", lm_head_weight, for_shards)
    _refuse_dtensor("bias", bias, for_shards)
    _require_tensor("hidden_states", hidden_states, _FLOATS)
    _require_tensor("lm_head_weight", lm_head_weight, (hidden_states.dtype,), hidden_states.device)
    _require_tensor("labels", labels, (torch.int64,), hidden_states.device)
    if hidden_states.dim() < 2 or hidden_states.shape[-1] == 0:
        raise ValueError(f"hidden_states must have shape (..., H) with H > 0, got {tuple(hidden_states.shape)}")
    H = hidden_states.shape[-1]
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != H or lm_head_weight.shape[0] < least_rows:
        raise ValueError(f"lm_head_weight must have shape (V, H) = (V, {H}), got {tuple(lm_head_weight.shape)}")
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of hidden_states without its last dimension, "
            f"{tuple(hidden_states.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if bias is not None:
        _require_tensor("bias", bias, (hidden_states.dtype,), hidden_states.device)
        _require_shape("bias", bias, (lm_head_weight.shape[0],), "(V,)")


def check_transforms(*tensors: Tensor | None) -> None:
    """Derivatives go backwards through autograd; any other kind would be lost without a word."""
    for tensor in tensors:
        if tensor is not None:
            _refuse_transform(tensor)


def _refuse_transform(tensor: Tensor) -> None:
    """Through the wrappers of torch.func, outermost first: a vmap may lie around or within a grad."""
    while True:
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "copg_kernels has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, forward_ad): "
                "differentiate with backward() or torch.autograd.grad"
            )
        if not is_transformed(tensor):
            return
        if torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "copg_kernels cannot be differentiated by torch.func.grad, vjp or jacrev: "
                "differentiate with backward() or torch.autograd.grad"
            )
        tensor = torch._C._functorch.get_unwrapped(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func.vmap, or another of its kind, runs; torch.compile cannot trace this, and has its own way."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def needs_gradient(tensor: Tensor | None) -> bool:
    """Also through vmap's wrapper, which hides that the tensor within it is part of a graph."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    while not tensor.requires_grad and is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def check_logit_options(logit_scale: float, softcap: float | None, temperature: float) -> None:
    """The scalars between x W^T and the softmax."""
    is_number = isinstance(logit_scale, int | float) and not isinstance(logit_scale, bool)
    if not (is_number and -_INFINITY < logit_scale < _INFINITY):
        raise ValueError(f"logit_scale must be a finite number, got {logit_scale!r}")
    _require_positive("temperature", temperature)
    if softcap is not None:
        _require_positive("softcap", softcap)


def check_sparse_eps(sparse_eps: float | None, dtype: torch.dtype, backend: str) -> None:
    """A probability, where the backend can keep a tile."""
    if sparse_eps is None:
        return
    if isinstance(sparse_eps, bool) or not isinstance(sparse_eps, int | float):
        raise TypeError(f"sparse_eps must be a number or None, got {type(sparse_eps).__name__}")
    if not 0 < sparse_eps < 1:
        raise ValueError(f"sparse_eps must be a probability in (0, 1), got {sparse_eps}")
    if not can_keep_tiles(dtype, backend):
        raise ValueError(f"sparse_eps needs float32 or bfloat16 with backend {backend!r}, got {dtype}")


def check_flag(name: str, value: bool) -> None:
    """True or False: "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_ignore_index(ignore_index: int) -> None:
    """A label."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


def check_return_entropy(return_entropy: bool, sparse_eps: float | None) -> None:
    """Of the softmax, which sparse_eps does not keep."""
    check_flag("return_entropy", return_entropy)
    if return_entropy and sparse_eps is not None:
        raise ValueError(f"return_entropy needs sparse_eps = None, got {sparse_eps}")


def check_entropy_coef(entropy_coef: float, sparse_eps: float | None) -> None:
    """Any number, and 0 with sparse_eps."""
    is_number = isinstance(entropy_coef, int | float) and not isinstance(entropy_coef, bool)
    if not (is_number and -_INFINITY < entropy_coef < _INFINITY):
        raise ValueError(f"entropy_coef must be a finite number, got {entropy_coef!r}")
    if entropy_coef and sparse_eps is not None:
        raise ValueError(f"entropy_coef needs sparse_eps = None, got {sparse_eps}")


def check_outputs(outputs: Sequence[str], known: Sequence[str]) -> None:
    """Names, each of them known."""
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise TypeError(f"outputs must be a sequence of names, got {outputs!r}")
    for name in outputs:
        if name not in known:
            raise ValueError(f"outputs must be of {', '.join(known)}, got {name!r}")


def check_expected_gradients(expected_gradients: str) -> None:
    """A name."""
    if expected_gradients not in ("logps", "entropy", "both"):
        raise ValueError(f'expected_gradients must be "logps", "entropy" or "both", got {expected_gradients!r}')


def check_workspace(
    workspace_bytes: int | None, hidden_states: Tensor, num_rows: int, backend: str, weight: Tensor | None = None
) -> int:
    """The budget in bytes, refused when not even one tile fits; with `weight`, the head's tuned one by default."""
    least = least_workspace_bytes(num_rows, hidden_states.shape[-1], hidden_states.dtype, hidden_states.device, backend)
    if workspace_bytes is None:
        return max(default_workspace_bytes(backend, weight), least)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}")
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes must be at least {least} (one tile of all {num_rows} tokens), got {workspace_bytes}"
        )
    return workspace_bytes


def completion_boundaries(hidden_states: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N + 1,) int32: cu_seqlens for packed tokens, equal rows for padded ones."""
    if cu_seqlens is not None:
        if labels.dim() != 1:
            raise ValueError(f"labels must have shape (T,) when cu_seqlens is given, got {tuple(labels.shape)}")
        _check_boundaries("cu_seqlens", cu_seqlens, labels.device)
        return cu_seqlens
    if labels.dim() != 2:
        raise ValueError(
            f"labels must have shape (B, L), or (T,) with cu_seqlens, got {tuple(labels.shape)} without cu_seqlens"
        )
    return torch.arange(labels.shape[0] + 1, dtype=torch.int32, device=hidden_states.device) * labels.shape[1]


def group_boundaries(
    num_sequences: int, group_size: int | None, cu_groups: Tensor | None, device: torch.device
) -> Tensor:
    """(G + 1,) int32: cu_groups for ragged groups, multiples of group_size for equal ones."""
    if (group_size is None) == (cu_groups is None):
        came = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size or cu_groups must be given, and not both, to say which completions belong together; got {came}"
        )
    if cu_groups is not None:
        _check_boundaries("cu_groups", cu_groups, device)
        return cu_groups
    assert group_size is not None
    check_group_size(group_size)
    if num_sequences == 0 or num_sequences % group_size:
        raise ValueError(f"group_size must divide the number of completions, {num_sequences}, got {group_size}")
    return torch.arange(0, num_sequences + 1, group_size, dtype=torch.int32, device=device)


def check_group_size(group_size: int) -> None:
    """Completions per prompt."""
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2 (a contrast needs another completion), got {group_size}")


def check_completions(ref_logps: Tensor, rewards: Tensor, num_sequences: int, device: torch.device) -> None:
    """One floating-point number per completion."""
    for name, values in (("ref_logps", ref_logps), ("rewards", rewards)):
        _require_tensor(name, values, _FLOATS, device)
        _require_shape(name, values, (num_sequences,), "(N,), one per completion,")
        refuse_gradient(name, values)


def refuse_gradient(name: str, values: Tensor) -> None:
    """A constant of the losses: a gradient that is asked for and never comes would not be missed."""
    if needs_gradient(values) or torch.autograd.forward_ad.unpack_dual(values).tangent is not None:
        raise ValueError(f"{name} must not require a gradient, as no loss here has one; pass {name}.detach()")


def check_loss(loss: Callable[..., Tensor]) -> None:
    """A function of log-probabilities."""
    if not callable(loss):
        raise TypeError(f"loss must be a function, such as copg_kernels.losses.dpo_loss, got {loss!r}")


def check_loss_value(value: Tensor) -> None:
    """What the caller's loss returned."""
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must return a floating-point scalar tensor, got {came}")


def check_loss_inputs(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    beta: float,
    group_size: int | None,
    cu_groups: Tensor | None,
) -> None:
    """The arguments every loss on log-probabilities shares."""
    check_loss_values(logps, ref_logps, rewards, beta)
    group_boundaries(logps.numel(), group_size, cu_groups, logps.device)
    if cu_groups is not None:
        require_boundaries("cu_groups", cu_groups, logps.numel(), least_size=2)


def check_loss_values(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> None:
    """One finite number per completion, however these are grouped."""
    _require_tensor("logps", logps, _FLOATS)
    if logps.dim() != 1:
        raise ValueError(f"logps must have shape (N,), got {tuple(logps.shape)}")
    check_completions(ref_logps, rewards, logps.numel(), logps.device)
    check_beta(beta)
    require_finite("ref_logps", ref_logps)
    require_finite("rewards", rewards)


def check_group_ids(group_ids: Tensor, logps: Tensor) -> None:
    """The prompt of each completion."""
    _require_tensor("group_ids", group_ids, (torch.int64,), logps.device)
    _require_shape("group_ids", group_ids, tuple(logps.shape), "of logps")


def check_old_logps(old_logps: Tensor, logps: Tensor, clip: float) -> None:
    """What the clipped ratio needs besides."""
    _require_tensor("old_logps", old_logps, _FLOATS, logps.device)
    _require_shape("old_logps", old_logps, tuple(logps.shape), "of logps")
    refuse_gradient("old_logps", old_logps)
    _require_positive("clip", clip)
    require_finite("old_logps", old_logps)


def check_token_logps(per_token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> None:
    """The arguments of sequence_logps."""
    _require_tensor("per_token_logps", per_token_logps, (torch.float32, torch.float64))
    _require_tensor("labels", labels, (torch.int64,), per_token_logps.device)
    _require_shape("labels", labels, per_token_logps.shape, "of per_token_logps")
    completion_boundaries(per_token_logps, labels, cu_seqlens)


def check_beta(beta: float) -> None:
    """The strength of the regulariser."""
    _require_positive("beta", beta)


def require(condition: Tensor, message: str) -> None:
    """Refuse values: a ValueError on a CPU, an asynchronous assertion on a GPU and in compiled code."""
    if _on_gpu(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def require_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Labels are tokens of the vocabulary or ignore_index."""
    valid = ((labels >= 0) & (labels < vocab_size)) | (labels == ignore_index)
    came = "" if _on_gpu(labels) else f", got {_first(labels, ~valid)}"
    require(valid.all(), f"labels must lie in [0, {vocab_size}) or be ignore_index = {ignore_index}{came}")


def require_finite(name: str, values: Tensor) -> None:
    """No NaN, no infinity."""
    finite = values.isfinite()
    came = "" if _on_gpu(values) else f", got {_first(values, ~finite)}"
    require(finite.all(), f"{name} must be finite{came}")


def require_boundaries(name: str, boundaries: Tensor, last: int, least_size: int) -> None:
    """Boundaries start at 0, end at `last` and leave every segment at least `least_size` long."""
    came = "" if _on_gpu(boundaries) else f", got {boundaries.tolist()[:16]}"
    require(boundaries[0] == 0, f"{name} must start at 0{came}")
    require(boundaries[-1] == last, f"{name} must end at {last}{came}")
    smallest = "not decrease" if least_size == 0 else f"leave at least {least_size} completions in every group"
    require((boundaries.diff() >= least_size).all(), f"{name} must {smallest}{came}")


def require_batch(labels: Tensor, vocab_size: int, ignore_index: int, completions: Completions) -> None:
    """Every value a fused loss depends on."""
    require_labels(labels, vocab_size, ignore_index)
    require_boundaries("cu_seqlens", completions.cu_seqlens, labels.numel(), least_size=0)
    require_boundaries("cu_groups", completions.cu_groups, completions.rewards.numel(), least_size=2)
    require_finite("ref_logps", completions.ref_logps)
    require_finite("rewards", completions.rewards)
    require_nonempty(segment_sum(labels != ignore_index, completions.cu_seqlens))


def require_nonempty(counts: Tensor) -> None:
    """A completion without tokens has no mean, and its sum, log 1, would stand in its group's contrast all the same."""
    came = "" if _on_gpu(counts) else f", completion {_first_index(counts == 0)} has none"
    require((counts > 0).all(), f"labels must leave every completion a counted token{came}")


def _on_gpu(tensor: Tensor) -> bool:
    """Whether its numbers are out of the host's sight, which must not wait for them."""
    return tensor.is_cuda or torch.compiler.is_compiling()


def _first_index(wrong: Tensor) -> int:
    return int(wrong.flatten().to(torch.uint8).argmax())


def _first(values: Tensor, wrong: Tensor) -> str:
    index = _first_index(wrong) if values.numel() else 0
    return f"{values.flatten()[index].item() if values.numel() else None} at index {index}"


def _require_tensor(
    name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")


def _refuse_dtensor(name: str, value: Tensor | None, instead: str) -> None:
    # By an attribute: the import of DTensor takes half a second, which few callers need to spend.
    if hasattr(value, "device_mesh"):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: {instead}")


def _require_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {meaning} = {tuple(shape)}, got {tuple(value.shape)}")


def _require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < _INFINITY:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_boundaries(name: str, boundaries: Tensor, device: torch.device) -> None:
    _require_tensor(name, boundaries, (torch.int32,), device)
    if boundaries.dim() != 1 or boundaries.numel() < 2:
        raise ValueError(f"{name} must have shape (N + 1,) with N >= 1, got {tuple(boundaries.shape)}")
