"""The layer that a model uses as its head: a plain `nn.Linear`, also under PEFT's wrappers, or a refusal."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# Modules of hooks that gather a weight before forward and let it go after: what they gathered is there.
_GATHERING = ("torch.distributed.fsdp.", "deepspeed.")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LoRA(NamedTuple):
    """One active adapter of the head: scaling * B A dropout(x)."""

    A: nn.Linear
    B: Tensor  # (V, r)
    scaling: float
    dropout: nn.Module


def plain_linear(head: Any) -> nn.Linear:
    """The `nn.Linear` whose weight and bias the head uses now."""
    if _is_lora(head):
        if head.merged and head.disable_adapters:
            head.unmerge()  # as PEFT's own forward does
        return plain_linear(head.base_layer)
    if _is_saved_module(head):
        return plain_linear(_active_copy(head))
    _refuse_unless_linear(head)
    _refuse_other_behaviour(head)
    _refuse_weight(head.weight)
    return head


def active_lora(head: Any) -> list[LoRA]:
    """The LoRA adapters whose product the head adds now: none where they are merged or disabled."""
    if not _is_lora(head) or head.disable_adapters or head.merged:
        return []
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        _refuse_other_lora(head, name)
    return [
        LoRA(head.lora_A[name], head.lora_B[name].weight, head.scaling[name], head.lora_dropout[name]) for name in names
    ]


def refuse_prompt_learning(model: Any) -> None:
    """PEFT methods that work in PeftModel.forward, and would be lost with the body alone."""
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning:
            raise ValueError(
                f"model must not use prompt learning: adapter {name!r} ({config.peft_type}) adds tokens to the body"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"model must not use activated LoRA: adapter {name!r} needs offsets from PeftModel.forward"
            )


def _is_lora(head: Any) -> bool:
    return _comes_from_peft(head) and _layer_type(head) is _peft().tuners.lora.Linear


def _is_saved_module(head: Any) -> bool:
    return _comes_from_peft(head) and isinstance(head, _peft().utils.ModulesToSaveWrapper)


def _comes_from_peft(head: nn.Module) -> bool:
    return _layer_type(head).__module__.startswith("peft.")


def _layer_type(head: nn.Module) -> type:
    """`fully_shard` derives a class of its own from the layer's."""
    return type(head).__bases__[1] if isinstance(head, FSDPModule) else type(head)


def _peft() -> Any:
    import peft

    return peft


def _active_copy(head: Any) -> nn.Module:
    """What a module of modules_to_save calls."""
    active = head.active_adapters
    if head.disable_adapters or not active or any(name not in head.modules_to_save for name in active):
        return head.original_module
    return head.modules_to_save[active[0]]


def _refuse_other_lora(head: Any, name: str) -> None:
    if name in head.lora_variant:
        raise ValueError(
            f"LoRA on the head must be plain W + s B A, adapter {name!r} is {type(head.lora_variant[name]).__name__}; "
            "take the head out of target_modules, or turn use_dora and the like off"
        )
    if head.lora_bias[name]:
        raise ValueError(f"LoRA on the head must have no bias, adapter {name!r} has one; set lora_bias=False")


def _refuse_unless_linear(head: nn.Module) -> None:
    if type(head).forward is nn.Linear.forward:
        return
    name = f"{_layer_type(head).__module__}.{_layer_type(head).__name__}"
    if _comes_from_peft(head):
        raise ValueError(
            f"the adapter on the head must be LoRA, got {name}; take the head out of target_modules, "
            "or put it into modules_to_save"
        )
    raise ValueError(f"the head must be a torch.nn.Linear, got {name}")


def _refuse_other_behaviour(head: nn.Module) -> None:
    hooks = [*head._forward_hooks.values(), *head._forward_pre_hooks.values()]
    others = [hook for hook in hooks if not hook.__module__.startswith(_GATHERING)]
    if others:
        raise ValueError(f"the head must have no forward hooks, which the fused product cannot call, got {len(others)}")
    if "forward" in vars(head):
        raise ValueError("the head must have the forward of torch.nn.Linear, got one that was replaced on the instance")


def _refuse_weight(weight: Tensor) -> None:
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in FLOATS:
        kind = f"{type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"the head's weight must be an ordinary floating-point tensor, got {kind} (quantised, sharded?)"
        )
    if weight.is_meta or weight.numel() == 0:
        got = f"shape {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"the head's weight must be in memory, got {got} (offloaded, ZeRO-3?)")
