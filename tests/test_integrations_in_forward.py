"""integrations.in_forward on a bare model: the same states and head as from `hidden_states_of` and `read_head`."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("transformers")

from copg_kernels.integrations.in_forward import call_in_forward
from copg_kernels.integrations.transformers import hidden_states_of, read_head
from tests.test_integrations_transformers import FAMILIES, make_model, with_lora

BATCH = {"input_ids": torch.arange(2, 14).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}


def assert_called_with_states_and_head(model) -> None:
    def function(states, head):
        trained = [states, head.lm_head_weight] + [head.bias] * (head.bias is not None)
        return states, head, sum(tensor.sum() for tensor in trained)

    states, head, trained = call_in_forward(model, function, **BATCH)
    expected = read_head(model)
    assert torch.equal(states, hidden_states_of(model, **BATCH))
    assert torch.equal(head.lm_head_weight, expected.lm_head_weight) and head[2:] == expected[2:]
    assert head.bias is expected.bias
    trained.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    assert_called_with_states_and_head(make_model(family))


@pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora(target_modules):
    model = make_model("llama", tie_word_embeddings=False)
    assert_called_with_states_and_head(with_lora(model, target_modules=target_modules))


def test_autocast_gives_the_operands_and_is_off_in_the_function():
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = call_in_forward(
            make_model("llama"),
            lambda states, head: (states.dtype, head.lm_head_weight.dtype, torch.is_autocast_enabled("cpu")),
            **BATCH,
        )
    assert dtypes == (torch.bfloat16, torch.bfloat16, False)


def test_the_model_is_as_it_was_afterwards():
    model = make_model("llama")
    logits = model(**BATCH).logits
    model.forward = own = functools.partial(type(model).forward, model)
    with pytest.raises(ZeroDivisionError):
        call_in_forward(model, lambda states, head: 1 / 0, **BATCH)
    model.model.layers[0].register_forward_pre_hook(stop := lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_in_forward(model, lambda states, head: states, **BATCH)
    assert stop in model.model.layers[0]._forward_pre_hooks.values()
    model.model.layers[0]._forward_pre_hooks.clear()
    assert model.forward is own and "forward" not in vars(model.lm_head)
    assert torch.equal(model(**BATCH).logits, logits)


def test_what_is_refused():
    model = make_model("llama")
    with pytest.raises(TypeError, match="batch must not hold labels"):
        call_in_forward(model, lambda states, head: states, **BATCH, labels=BATCH["input_ids"])
    with pytest.raises(TypeError, match="model must be a causal model.*DistributedDataParallel: call_in_forward"):
        call_in_forward(model.model.layers[0], lambda states, head: states, **BATCH)
    model.lm_head.forward = lambda states: states
    with pytest.raises(ValueError, match="forward of torch.nn.Linear, got one that was replaced"):
        call_in_forward(model, lambda states, head: states, **BATCH)
