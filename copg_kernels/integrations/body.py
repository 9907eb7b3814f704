"""A causal model without its head: the states that enter the head, in the dtype of the head's product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from copg_kernels.integrations.head_layer import active_lora, plain_linear


def decoder_of(causal: Any) -> nn.Module:
    """The module whose output the head takes: the body, or the decoder inside it (OPT and the Bart family)."""
    return getattr(causal.base_model, "decoder", causal.base_model)


def body_states(causal: Any, batch: dict[str, Any]) -> Tensor:
    """(B, L, H), or (B, L, H + r) where LoRA adapts the head."""
    outputs = decoder_of(causal)(**({"use_cache": False} | batch))
    return with_lora_columns(causal, outputs[0])


def with_lora_columns(causal: Any, hidden_states: Tensor) -> Tensor:
    """[x; A dropout(x)] on the device of the head's weight."""
    head = causal.get_output_embeddings()
    weight = plain_linear(head).weight
    hidden_states = hidden_states.to(weight.device)
    projected = [lora.A(lora.dropout(hidden_states.to(lora.A.weight.dtype))) for lora in active_lora(head)]
    dtype = operand_dtype(weight)
    return torch.cat([part.to(dtype) for part in (hidden_states, *projected)], dim=-1)


def operand_dtype(weight: Tensor) -> torch.dtype:
    """What the model's own head multiplies in: the dtype of autocast where that is on, else the weight's."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype
