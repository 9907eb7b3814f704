"""What was read of a model's head against the model itself, once per model and kind of head."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from copg_kernels.integrations.body import body_states, decoder_of, with_lora_columns

if TYPE_CHECKING:
    from copg_kernels.integrations.transformers import HeadInputs

# Caps are near 15, 30 or 50: at this root mean square of the logits each of them shows.
LOGITS_RMS = 30.0
NUM_TOKENS = 4

Call = Callable[[Callable, dict[str, Tensor]], Any]
"""Of (function, batch): function(hidden_states of the batch, head), where the weights are."""

_agreed: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()


def require_agreement(causal: Any, head: HeadInputs) -> None:
    """ValueError unless `head` and the states of the body give the logits of the model's own forward."""
    kind = (head.lm_head_weight.shape, head.lm_head_weight.dtype, head.bias is None, head.logit_scale, head.softcap)
    if kind not in _agreed.setdefault(causal, set()):
        _compare_with(causal, causal, lambda read, batch: read(body_states(causal, batch), head))
        _agreed[causal].add(kind)


def require_agreement_in_forward(model: nn.Module, causal: Any, call: Call) -> None:
    """The same of a model whose weights are together only while it is called: once, and by all processes together."""
    if not _agreed.setdefault(causal, set()):
        _compare_with(model, causal, call)
        _agreed[causal].add(("in forward",))


def _compare_with(model: nn.Module, causal: Any, call: Call) -> None:
    """The body's output is replaced on its way to the model's head, by random states that give large logits: those of a
    fresh model are too small to tell a cap of 30 from none.
    """
    vocab_size = causal.get_output_embeddings().out_features
    input_ids = torch.arange(1, NUM_TOKENS + 1, device=causal.device)[None] % vocab_size
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def read(hidden_states: Tensor, head: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
        states = _large_states(causal, head)
        return hidden_states, states, _logits(head, with_lora_columns(causal, states))

    with torch.no_grad(), _evaluating(causal):
        hidden_states, states, logits = call(read, batch)
        own_states, own_logits = _own_forward(model, causal, batch, states)
        # The columns of LoRA, behind those of the body, are seen in the logits.
        hidden_states = hidden_states[..., : own_states.shape[-1]]
        _compare(causal, "hidden states", hidden_states, own_states.to(hidden_states), states.dtype)
        _compare(causal, "logits", logits, own_logits.to(logits.device), states.dtype)


def _large_states(causal: Any, head: HeadInputs) -> Tensor:
    """(1, NUM_TOKENS, H), the same in every process."""
    shape = (1, NUM_TOKENS, causal.get_output_embeddings().in_features)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(head.lm_head_weight)
    rms = _logits(head._replace(bias=None, softcap=None), with_lora_columns(causal, states)).square().mean().sqrt()
    if not 0 < rms < float("inf"):
        raise ValueError(f"the head cannot be checked: its logits on random hidden states are {rms.item()}")
    return states * (LOGITS_RMS / rms).to(states)


def _logits(head: HeadInputs, hidden_states: Tensor) -> Tensor:
    logits = head.logit_scale * nn.functional.linear(hidden_states, head.lm_head_weight, head.bias).float()
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def _own_forward(model: nn.Module, causal: Any, batch: dict[str, Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states of the body, logits of the model with `states` in their place)"""
    decoder = decoder_of(causal)
    seen: list[Tensor] = []

    def replace(module: nn.Module, args: Any, outputs: Any) -> Any:
        seen.append(outputs[0])
        if isinstance(outputs, tuple):
            return (states.to(outputs[0]), *outputs[1:])
        outputs["last_hidden_state"] = states.to(outputs[0])
        return outputs

    handle = decoder.register_forward_hook(replace)
    try:
        logits = model(**batch, use_cache=False)["logits"]
    finally:
        handle.remove()
    if len(seen) != 1:
        raise _not_understood(causal, f"its forward calls {type(decoder).__name__} {len(seen)} times")
    return seen[0], logits


def _compare(causal: Any, what: str, read: Tensor, own: Tensor, dtype: torch.dtype) -> None:
    if read.shape != own.shape:
        raise _not_understood(causal, f"its {what} have shape {tuple(own.shape)}, those read {tuple(read.shape)}")
    # Room for a few roundings to 16 bits, or for the 10 bits of TF32.
    tolerance = max(1e-3, 2 * torch.finfo(dtype).eps)
    own, read = own.float(), read.float()
    error = ((own - read).norm() / own.norm()).item()
    if not error <= tolerance:
        raise _not_understood(causal, f"its {what} differ by {error:.1e} (relative) from those read")


def _not_understood(causal: Any, why: str) -> ValueError:
    name, config = type(causal).__name__, causal.config
    settings = {key: value for key, value in config.to_dict().items() if re.search(r"scal|cap|mult|mup", key)}
    hint = f"; its configuration has {settings}" if settings else ""
    return ValueError(f"the head of {name} (model_type {config.model_type!r}) is not understood: {why}{hint}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
