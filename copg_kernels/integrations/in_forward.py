"""A function of hidden states and head inside of a model's forward, where the hooks of DDP, FSDP2 and ZeRO see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from copg_kernels.integrations.body import decoder_of, with_lora_columns
from copg_kernels.integrations.head_check import require_agreement_in_forward
from copg_kernels.integrations.transformers import HeadInputs, causal_model, read_head, read_unchecked

Outputs = TypeVar("Outputs")


def call_in_forward(model: nn.Module, function: Callable[[Tensor, HeadInputs], Outputs], **batch: Any) -> Outputs:
    """function(hidden_states, head), called where the model's head would be, within model(**batch).

        loss = call_in_forward(model, lambda states, head: linear_copg_loss(states, head.lm_head_weight, ...), ...)

    For a model that may be wrapped: DDP averages the gradients of what its forward returned, and FSDP2 and ZeRO-3 have
    the weights of body and head together only while they are called. None of them sees `hidden_states_of` and
    `read_head`. The logits are not computed. All processes call it together.

    Args:
        model: a causal model of transformers, or a PeftModel of one, bare, in DistributedDataParallel, sharded by
            `fully_shard`, as `accelerate` does it with fsdp_version 2, or in DeepSpeed's engine (ZeRO 1, 2 or 3).
        function: of hidden_states and head, which are those of `hidden_states_of` and `read_head`, dtypes included; it
            returns a tensor, or a tuple, NamedTuple or dict with tensors. Autocast is off in it.
        batch: what the model's body takes, by name: input_ids (B, L), attention_mask, ...; no labels. For autocast call
            it within `accelerator.autocast()`: that which accelerate puts around a model's forward is not entered.

    Returns:
        What function returned, differentiable, in the dtypes in which it returned it.

    Raises:
        TypeError: model is neither of those, or batch holds labels.
        ValueError: what `read_head` refuses.
    """
    if "labels" in batch:
        raise TypeError("batch must not hold labels: they belong to function")
    causal = causal_model(model.module if _is_wrapper(model) else model)
    if _is_sharded(model, causal):
        require_agreement_in_forward(model, causal, partial(_call, model, causal))
    else:
        read_head(causal)

    def without_autocast(hidden_states: Tensor, head: HeadInputs) -> Outputs:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return function(hidden_states, head)

    return _call(model, causal, without_autocast, batch)


def _is_wrapper(model: nn.Module) -> bool:
    # DeepSpeed is no dependency, and its import takes seconds.
    return isinstance(model, DistributedDataParallel) or type(model).__module__.startswith("deepspeed.")


def _is_sharded(model: nn.Module, causal: Any) -> bool:
    head = causal.get_output_embeddings()
    of_zero = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    return of_zero or any(isinstance(module, FSDPModule) for module in (model, causal, head))


def _call(model: nn.Module, causal: Any, function: Callable, batch: dict[str, Any]) -> Any:
    head, made = causal.get_output_embeddings(), []

    def in_place_of_logits(hidden_states: Tensor) -> Any:
        made.append(function(with_lora_columns(causal, hidden_states), read_unchecked(causal)))
        return made[0]

    def forward(**inputs: Any) -> Any:
        # Wrappers add arguments and move tensors: the body takes ours, as they arrive.
        return head(decoder_of(causal)(use_cache=False, **{name: inputs[name] for name in batch})[0])

    with _next_forward(causal, forward), _next_forward(head, in_place_of_logits):
        returned = model(**batch)
    return tree_map(_before_a_cast, made[0], returned)


def _before_a_cast(made: Any, returned: Any) -> Any:
    """FSDP2 with mixed precision rounds what a forward returns; its hooks are on the tensor as it was before, too."""
    return made if isinstance(made, Tensor) and made.dtype != returned.dtype else returned


@contextmanager
def _next_forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """The module's next call is to function; from then on it is as before, with a forward of its own if it had one."""
    with ExitStack() as undo:
        own = vars(module).get("forward")
        undo.callback(lambda: vars(module).pop("forward") if own is None else setattr(module, "forward", own))

        def forward(*args: Any, **kwargs: Any) -> Any:
            undo.close()
            return function(*args, **kwargs)

        module.forward = forward
        yield
