"""The log-probabilities of every TRL trainer from `copg_kernels.linear_logps`, by one call.

from trl import GRPOConfig, GRPOTrainer
from copg_kernels.integrations import trl as fused

fused.install()
trainer = GRPOTrainer(model, reward, args=GRPOConfig("run"), train_dataset=prompts, processing_class=tokenizer)
trainer.train()
"""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack
from typing import Any

import torch
import trl.trainer.utils  # noqa: F401  (one of the modules where TRL binds its function)
from torch import Tensor
from trl.kernels import chunked_logprob

from copg_kernels import linear_logps, linear_logps_and_entropy
from copg_kernels.ops import refuse_second_derivative

_TRL_FUNCTION = chunked_logprob.ChunkedLogProbFunction
# What TRL 1.16 calls its arguments, in the order in which its trainers pass them.
_ARGUMENTS = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs".split()


class ChunkedLogProbFunction:
    """In place of `trl.kernels.ChunkedLogProbFunction`: same arguments, same outputs, called by `apply` alone.

    Log-probabilities come from `linear_logps`, which does not round logits to bfloat16 and forms the gradients of a
    frozen head along with them. Entropy comes from the same logits, at no GEMM more, as GRPO and RLOO ask for it in
    every step to log it. It is differentiable: where a gradient arrives for it, of an entropy bonus say, the backward
    pass runs TRL's function for that part, four head GEMMs. The other outputs, which carry no gradient, stay TRL's own,
    in its tiles and only where a trainer asks for them, at one GEMM in all.
    """

    @staticmethod
    def apply(
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = chunked_logprob.OPTIONAL_OUTPUTS,
        /,
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), None for what was not asked for.

            logits[t] = cap(logit_scale * (lm_head_weight hidden_states[t] + bias)) / temperature
            logp[t]   = logits[t, labels[t]] - log sum_v exp(logits[t, v])

        Args:
            hidden_states: (N, H), N >= 0. Its dtype, or that of autocast where it is on, is the dtype of the product;
                operands of another dtype are cast whole, and gradients arrive in the dtype of each.
            lm_head_weight: (V, H).
            bias: (V,), or None.
            labels: (N,) int64 in [0, V).
            temperature: divisor of the logits.
            chunk_size: columns per tile of TRL's function where it runs; ours takes the workspace of `linear_logps`.
            softcap: Gemma's final_logit_softcapping, or None.
            logit_scale: factor of the logits, before the cap.
            outputs: which of the other four to compute; "log_probs" is always.

        Returns:
            Log-probs and entropy in float32 and in nats; the rest as TRL returns it.

        Raises:
            TypeError, ValueError: what `linear_logps` refuses; a head that DeepSpeed ZeRO-3 has partitioned.
        """
        if hasattr(lm_head_weight, "ds_id"):
            raise ValueError(
                "lm_head_weight is partitioned by DeepSpeed ZeRO-3 and would be gone in the backward pass; "
                "train without ZeRO-3, or call uninstall()"
            )
        dtype = _product_dtype(hidden_states)
        tensors = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype), labels)
        options = (temperature, chunk_size, softcap, logit_scale)
        logps, entropy = _log_probs(tensors, options, "entropy" in outputs)
        others: tuple[Tensor | None, ...] = (None,) * (len(chunked_logprob.OPTIONAL_OUTPUTS) - 1)
        of_trl = tuple(name for name in chunked_logprob.OPTIONAL_OUTPUTS[1:] if name in outputs)
        if of_trl:
            with torch.no_grad():
                _, _, *others = _TRL_FUNCTION.apply(*tensors, *options, of_trl)
        return logps, entropy, *others


def _log_probs(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], options: tuple[Any, ...], with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """(N,) float32 each, of TRL's arguments."""
    hidden_states, lm_head_weight, bias, labels = tensors
    temperature, _, softcap, logit_scale = options
    operands = (hidden_states, lm_head_weight, labels)
    ours: dict[str, Any] = dict(bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    if not with_entropy:
        return linear_logps(*operands, **ours).float(), None
    logps, entropy = linear_logps_and_entropy(*operands, **ours)
    return logps.float(), _DifferentiableEntropy.apply(entropy.float(), *tensors, options)


class _DifferentiableEntropy(torch.autograd.Function):
    """Entropy whose value is there already; its gradient, which few ask for, is that of TRL's function."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, *arguments: Any) -> Tensor:
        *tensors, ctx.options = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        needs = ctx.needs_input_grad[1:4]
        gradients: list[Tensor | None] = [None] * len(needs)
        if dentropy is not None:
            *operands, labels = ctx.saved_tensors
            leaves = [None if x is None else x.detach().requires_grad_(n) for x, n in zip(operands, needs, strict=True)]
            with torch.enable_grad(), torch.autocast(labels.device.type, enabled=False):
                _, entropy, *_ = _TRL_FUNCTION.apply(*leaves, labels, *ctx.options, ("entropy",))
            entropy.backward(dentropy)
            gradients = [None if x is None else x.grad for x in leaves]
        return None, *gradients, None, None


def install() -> ExitStack:
    """Put `ChunkedLogProbFunction` wherever TRL has its own, in this process and from now on.

    SFT, DPO, KTO, GRPO, RLOO and the experimental trainers that use TRL's fused head then take their log-probs from
    `linear_logps`, those that exist already as well as new ones.

    Returns:
        An ExitStack: `with install(): ...` or `install().close()` undoes it, and so does `uninstall()`. Of calls inside
        one another the first counts.

    Raises:
        RuntimeError: the function of the installed TRL does not take the arguments of TRL 1.16.
    """
    found = list(inspect.signature(_TRL_FUNCTION.forward).parameters)[1:]
    if found != _ARGUMENTS:
        raise RuntimeError(f"trl.kernels.ChunkedLogProbFunction must take {_ARGUMENTS}, this TRL's takes {found}")
    undo = ExitStack()
    if chunked_logprob.ChunkedLogProbFunction is _TRL_FUNCTION:
        _replace(_TRL_FUNCTION, ChunkedLogProbFunction)
        undo.callback(uninstall)
    return undo


def uninstall() -> None:
    """Give TRL its own function back; without effect where it has it."""
    _replace(ChunkedLogProbFunction, _TRL_FUNCTION)


def _replace(present: type, new: type) -> None:
    """In every module of TRL that was imported, under whatever name; later imports take it from trl.kernels."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "trl" and module is not None]
    for module in modules:
        for name in [name for name, value in vars(module).items() if value is present]:
            setattr(module, name, new)


def _product_dtype(hidden_states: Tensor) -> torch.dtype:
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype
