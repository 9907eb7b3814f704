"""From a Hugging Face causal model to what `copg_kernels.linear_logps` needs; no logits are computed on the way.

    head = read_head(model)
    hidden_states = hidden_states_of(model, input_ids=input_ids, attention_mask=attention_mask)
    linear_logps(hidden_states[:, :-1], head.lm_head_weight, labels, **head.options())

The model may be one of transformers or a `peft.PeftModel` around it; in DDP or FSDP2 it is for `call_in_forward`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from copg_kernels.integrations.body import body_states, operand_dtype
from copg_kernels.integrations.head_check import require_agreement
from copg_kernels.integrations.head_layer import active_lora, plain_linear, refuse_prompt_learning


class HeadInputs(NamedTuple):
    """A model's head: logits = cap(logit_scale * (lm_head_weight x + bias)), cap(z) = softcap * tanh(z / softcap)."""

    lm_head_weight: Tensor
    """(V, H); (V, H + r) where LoRA of rank r adapts the head."""
    bias: Tensor | None
    """(V,), same dtype."""
    logit_scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `linear_logps`, `linear_copg_loss` and `linear_sequence_loss`."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def read_head(model: nn.Module) -> HeadInputs:
    """Weight, bias, scale and cap of the model's head, as its own forward would use them now.

    The tensors are the model's own parameters, so gradients reach them; under autocast they are cast as the head's
    product would be. Call it in every step: it is cheap, and weights, adapters and the dtype of autocast may change.

    What is read is compared with the model once, on four tokens: its own logits on given hidden states, large enough
    for a cap to show, and the hidden states that reach its head. Whatever scale, cap or layer this library does not
    know therefore ends in an error and not in other log-probabilities.

    LoRA on the head is W + s B A, computed as one product of (V, H + r) and (N, H + r):

        (W + s B A) x  =  [W, s B] [x; A dropout(x)]

    so that nothing is lost where W is bfloat16 and s B A is small. The r columns come from `hidden_states_of`. It costs
    a copy of W in every step, and the backward pass computes the gradient of all H + r columns, W's too.

    Args:
        model: a causal model of transformers, or a PeftModel of one. Of `modules_to_save` the active copy is read;
            merged and disabled adapters count as in the model's forward.

    Returns:
        HeadInputs; pass it on as `linear_logps(hidden_states, head.lm_head_weight, labels, **head.options())`.

    Raises:
        TypeError: model is neither.
        ValueError: the head is not an `nn.Linear` of unsharded floating-point weights, has hooks or a forward of its
            own, carries an adapter other than plain LoRA, or does not give the model's logits.
    """
    causal = causal_model(model)
    head = read_unchecked(causal)
    require_agreement(causal, head)
    return head


def hidden_states_of(model: nn.Module, **batch: Any) -> Tensor:
    """Hidden states as they enter the head, from the model's body alone: the logits never exist.

    Adapters of PEFT stay active, and so do gradient checkpointing and autocast. Losses that a model adds from inside
    (router balancing) are not part of it.

    Args:
        model: a causal model of transformers, or a PeftModel of one.
        batch: what the model's body takes: input_ids (B, L), attention_mask, position_ids, ...; no labels.

    Returns:
        (B, L, H) in the dtype of `read_head(model).lm_head_weight`; (B, L, H + r) where LoRA adapts the head.
        hidden_states[:, t] predicts token t + 1.

    Raises:
        TypeError: model is neither, or batch holds labels.
        ValueError: the body cannot stand alone (prompt learning), or the head is one that `read_head` refuses.
    """
    if "labels" in batch:
        raise TypeError("batch must not hold labels: they belong to linear_logps")
    return body_states(causal_model(model), batch)


def causal_model(model: Any) -> PreTrainedModel:
    """The model inside of PEFT's wrapper."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        refuse_prompt_learning(model)
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "model must be a causal model of transformers or a PeftModel of one, without another wrapper around it "
            "(DistributedDataParallel: call_in_forward; torch.compile: pass the module inside), "
            f"got {type(model).__name__}"
        )
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise ValueError(f"model must have a language-model head, {type(model).__name__} has none")
    return model


def read_unchecked(causal: Any) -> HeadInputs:
    """`read_head` of the model inside of PEFT's wrapper, without the comparison with its logits."""
    head = causal.get_output_embeddings()
    linear = plain_linear(head)
    weight, bias, dtype = linear.weight, linear.bias, operand_dtype(linear.weight)
    columns = [lora.scaling * lora.B for lora in active_lora(head)]
    if columns:
        weight = torch.cat([weight.to(dtype), *(column.to(weight.device, dtype) for column in columns)], dim=1)
    scale, cap = _scale_and_cap(causal)
    return HeadInputs(weight.to(dtype), None if bias is None else bias.to(dtype), float(scale), cap)


def _scale_and_cap(causal: Any) -> tuple[float, float | None]:
    """Read where each family's forward reads them. All others leave the product as it is, which is checked."""
    config = causal.config
    match config.model_type:
        case "cohere" | "cohere2" | "cohere2_moe" | "cohere_compass_text":
            return causal.logit_scale, None
        case "granite" | "granite_swa" | "granitemoe" | "granitemoe_swa" | "granitemoehybrid" | "granitemoeshared":
            return 1 / config.logits_scaling, None
        case "hyperclovax":
            return config.logits_scaling, None
        case "minicpm3":  # divides the hidden states; its head has no bias, so the logits are the same
            return 1 / config.logits_scaling, None
        case "falcon_h1":
            return causal.model.lm_head_multiplier, None
        case "gemma2" | "gemma3_text" | "gemma3n_text" | "gemma4_text" | "vaultgemma" | "nanochat" | "beam":
            return 1.0, config.final_logit_softcapping
        case "recurrent_gemma":
            return 1.0, config.logits_soft_cap
        case "xlstm":
            return 1.0, config.output_logit_soft_cap
    return 1.0, None
