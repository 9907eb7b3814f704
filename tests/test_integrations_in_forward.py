"""integrations.in_forward: states and head on a bare model, and training on two processes, however it is wrapped."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from copg_kernels import linear_logps
from copg_kernels.integrations.in_forward import call_in_forward
from copg_kernels.integrations.transformers import hidden_states_of, read_head
from tests.numerics import relative_error
from tests.ranks import Ranks
from tests.test_integrations_transformers import FAMILIES, LLAMA_LIKE, make_model, with_lora

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


# Two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store", preload=["tests.test_integrations_in_forward"])
    yield ranks
    ranks.stop()


def shard_layers(model, **policy):
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(**policy))
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))


def shard_head_with_norm(model):
    """As accelerate 1.15 does."""
    fully_shard([model.model.norm, model.lm_head])
    return shard_layers(model)


def shard_body_and_head(model):
    """Without a common root."""
    fully_shard(model.model), fully_shard(model.lm_head)
    return model


WRAPPINGS = {
    "DDP": DistributedDataParallel,
    "DDP, unused parameters": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "DDP, static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "FSDP2, one unit": fully_shard,
    "FSDP2, layers": shard_layers,
    "FSDP2, head with norm": shard_head_with_norm,
    "FSDP2, body and head": shard_body_and_head,
}
UNTIED = ["DDP, static graph", "FSDP2, head with norm", "FSDP2, body and head"]


def mean_logp(model, batch):
    """Of a batch, in float32 at least, and all log-probs."""

    def function(hidden_states, head):
        labels = batch["input_ids"][:, 1:]
        logps = linear_logps(hidden_states[:, :-1], head.lm_head_weight, labels, **head.options())
        return {"mean": logps.mean(), "logps": logps.detach()}

    return call_in_forward(model, function, **batch)


def train(model, wrap, batch):
    """-> whole weights after two steps."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        mean_logp(wrapped, batch)["mean"].backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def train_rank(group, model, wrapping, batch):
    rank = dist.get_rank(group)
    return train(model, WRAPPINGS[wrapping], {name: values[rank : rank + 1] for name, values in batch.items()})


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_training_however_it_is_wrapped(ranks, wrapping):
    model = make_model("llama" if wrapping in UNTIED else "llama-tied").double()
    results = ranks.run(train_rank, model, wrapping, BATCH)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, truth in train(model, lambda model: model, BATCH).items():
        assert relative_error(before[name], truth) > 1e-6, name
        assert all(relative_error(ours[name], truth) < 1e-10 for ours in results), name


def logps_in_bfloat16(group, output_dtype):
    model = make_model("llama")
    output = mean_logp(shard_layers(model, param_dtype=torch.bfloat16, output_dtype=output_dtype), BATCH)
    output["mean"].backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters())
    return output["logps"]


def test_fsdp2_does_not_round_what_is_returned(ranks):
    rounding, exact = ranks.run(logps_in_bfloat16, torch.bfloat16), ranks.run(logps_in_bfloat16, None)
    for found, expected in zip(rounding, exact, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)
        assert not torch.equal(found, found.bfloat16().float())


class Doubled(LlamaForCausalLM):
    """Logits that no configuration tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["logits"] = 2 * output["logits"]
        return output


def misread(group):
    mean_logp(shard_layers(Doubled(LlamaConfig(**LLAMA_LIKE))), BATCH)


def test_a_sharded_head_is_compared_with_the_logits(ranks):
    errors = ranks.errors(misread)
    assert all("the head of FSDPDoubled" in error and "its logits differ by 5.0e-01" in error for error in errors)
