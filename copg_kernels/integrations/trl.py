"""The log-probabilities of every TRL trainer from `copg_kernels.linear_token_statistics`, by one call.

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

import torch
import trl.trainer.utils  # noqa: F401  (one of the modules where TRL binds its function)
from torch import Tensor
from trl.kernels import chunked_logprob

from copg_kernels import linear_token_statistics
from copg_kernels.checks import check_expected_gradients

_TRL_FUNCTION = chunked_logprob.ChunkedLogProbFunction
# What TRL 1.16 calls its arguments, in the order in which its trainers pass them.
_ARGUMENTS = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs".split()

# What `install` was told.
_expected_gradients = "logps"


class ChunkedLogProbFunction:
    """In place of `trl.kernels.ChunkedLogProbFunction`: same arguments, same outputs, called by `apply` alone.

    Everything comes from `linear_token_statistics`: log-probabilities whose logits were never rounded to bfloat16, and
    the other outputs where a trainer asks for them, from the same logits, at no GEMM more. The entropy is
    differentiable, as GRPO's entropy bonus wants it, at no GEMM more either where the head is trained; for a frozen
    head see `install`. TRL's own function is never called.
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
            chunk_size: not used: columns per tile of TRL's function. Ours takes the workspace of `linear_logps`.
            softcap: Gemma's final_logit_softcapping, or None.
            logit_scale: factor of the logits, before the cap.
            outputs: which of the other four to compute; "log_probs" is always.

        Returns:
            All in float32, log-probs and entropy in nats, but for is_top1, a bool.

        Raises:
            TypeError, ValueError: what `linear_logps` refuses; a head that DeepSpeed ZeRO-3 has partitioned.
        """
        if hasattr(lm_head_weight, "ds_id"):
            raise ValueError(
                "lm_head_weight is partitioned by DeepSpeed ZeRO-3 and would be gone in the backward pass; "
                "train without ZeRO-3, or call uninstall()"
            )
        dtype = _product_dtype(hidden_states)
        tensors = (hidden_states.to(dtype), lm_head_weight.to(dtype), labels)
        output = linear_token_statistics(
            *tensors,
            outputs=tuple(name for name in chunked_logprob.OPTIONAL_OUTPUTS if name in outputs),
            bias=None if bias is None else bias.to(dtype),
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            expected_gradients=_expected_gradients,
        )
        return tuple(x.float() if x is not None and x.is_floating_point() else x for x in output)


def install(expected_gradients: str = "logps") -> ExitStack:
    """Put `ChunkedLogProbFunction` wherever TRL has its own, in this process and from now on.

    SFT, DPO, KTO, GRPO, RLOO and the experimental trainers that use TRL's fused head then take their log-probs from
    `linear_token_statistics`, those that exist already as well as new ones.

    Args:
        expected_gradients: as in `linear_logps_and_entropy`, for a frozen head. TRL's trainers log the entropy in every
            step, and only GRPO's entropy bonus differentiates it: with "logps" a step takes two head GEMMs, or four
            with the bonus, with "both" three.

    Returns:
        An ExitStack: `with install(): ...` or `install().close()` undoes it, and so does `uninstall()`. Of calls inside
        one another the first counts.

    Raises:
        ValueError: expected_gradients is none of "logps", "entropy", "both".
        RuntimeError: the function of the installed TRL does not take the arguments of TRL 1.16.
    """
    global _expected_gradients
    check_expected_gradients(expected_gradients)
    found = list(inspect.signature(_TRL_FUNCTION.forward).parameters)[1:]
    if found != _ARGUMENTS:
        raise RuntimeError(f"trl.kernels.ChunkedLogProbFunction must take {_ARGUMENTS}, this TRL's takes {found}")
    undo = ExitStack()
    if chunked_logprob.ChunkedLogProbFunction is _TRL_FUNCTION:
        _expected_gradients = expected_gradients
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
