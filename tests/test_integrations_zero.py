"""DeepSpeed's ZeRO, two processes: the loss inside of the engine's forward gives the steps of one process.

DeepSpeed is no dependency; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from copg_kernels import linear_copg_loss
from copg_kernels.integrations.in_forward import call_in_forward
from tests.numerics import relative_error
from tests.ranks import Ranks

CONFIGS = {
    "untied head": LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "tied head": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    ),
}
LR, STEPS = 0.03, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.stop()


def engine_of(module: nn.Module, stage: int, batch_size: int):
    """On a CPU, with every parameter sharded, however small."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=LR), config=config, dist_init_required=False
    )[0]


def batch_of(size: int) -> dict[str, torch.Tensor]:
    completions = dict(ref_logps=torch.randn(size) - 25, rewards=torch.randn(size))
    return dict(input_ids=torch.randint(64, (size, 7)), **completions)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"][:, 1:]

    def loss(hidden_states, head):
        operands = (hidden_states[:, :-1], head.lm_head_weight, labels, batch["ref_logps"], batch["rewards"])
        return linear_copg_loss(*operands, beta=0.1, group_size=2, **head.options()).loss

    return call_in_forward(model, loss, input_ids=batch["input_ids"])


class PolicyLoss(nn.Module):
    """A module of one's own around a body and a head, as docs/scaling.md has it for ZeRO-3."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.lm_head = nn.Linear(32, 64, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["input_ids"][:, 1:]
        operands = (self.body(batch["input_ids"])[:, :-1], self.lm_head.weight, labels)
        return linear_copg_loss(*operands, batch["ref_logps"], batch["rewards"], beta=0.1, group_size=2).loss


def plain_steps(module: nn.Module, loss_on, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[torch.Tensor]]:
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=LR), []
    for _ in range(STEPS):
        loss = loss_on(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in module.parameters()]


def zero_steps(group, module, stage, batch, is_causal):
    """The same on this rank's part of the batch; also how many elements of the weights it stored."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {name: values.chunk(size)[rank] for name, values in batch.items()}
    engine = engine_of(module, stage, len(own["rewards"]))
    import deepspeed

    if not is_causal and stage == 3:
        deepspeed.zero.register_external_parameter(module, module.lm_head.weight)
    stored, losses = sum(parameter.numel() for parameter in module.parameters()), []
    for _ in range(STEPS):
        loss = loss_of(engine, own) if is_causal else engine(own)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        return losses, [parameter.detach().clone() for parameter in module.parameters()], stored


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", [*CONFIGS, "a module of one's own"])
def test_steps_equal_those_of_one_process(ranks, kind, stage):
    torch.manual_seed(0)
    is_causal = kind in CONFIGS
    module = AutoModelForCausalLM.from_config(CONFIGS[kind]) if is_causal else PolicyLoss()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    batch = batch_of(8)
    results = ranks.run(zero_steps, module, stage, batch, is_causal)
    losses, weights = plain_steps(module, lambda b: loss_of(module, b) if is_causal else module(b), batch)
    assert losses[-1] < losses[0]
    mean = torch.tensor([ours for ours, _, _ in results]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-6, atol=0)
    for _, ours, stored in results:
        assert (stored == 0) == (stage == 3)
        assert relative_error(flat(ours) - flat(before), flat(weights) - flat(before)) < 1e-5
