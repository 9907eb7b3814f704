"""The pages under docs/: every block of Python runs and does what its page says; tables, doctests and names hold."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy, logsigmoid

import copg_kernels
from copg_kernels import linear_copg_loss, linear_logps, linear_sequence_loss, losses, parallel
from copg_kernels.parallel import parallel_linear_copg_loss, parallel_linear_logps
from copg_kernels.reference import copg_loss_ref
from tests.numerics import relative_error
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
VOCAB, BETA = 61, 0.1


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name: str) -> dict[str, str]:
    """Fenced Python under "heading", "heading 2", ..."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", page(name), flags=re.MULTILINE)[1:]:
        heading = section.split("\n", 1)[0].replace("`", "")
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE), 1):
            found[heading if number == 1 else f"{heading} {number}"] = code
    return found


RECIPES, MIGRATION = blocks("recipes.md"), blocks("migration.md")


def execute(code: str, **given) -> dict:
    exec(code, given)
    return given


# Tiny models


def batch() -> dict:
    """Two pairs; prompts of two tokens, completions of five, but for one of three."""
    completion_mask = torch.ones(4, 7, dtype=torch.bool)
    completion_mask[:, :2] = completion_mask[1, 5:] = False
    numbers = dict(ref_logps=torch.randn(4).double() - 15, rewards=torch.randn(4).double())
    return dict(input_ids=torch.randint(2, VOCAB, (4, 7)), completion_mask=completion_mask, **numbers)


def labels_of(batch: dict) -> torch.Tensor:
    return batch["input_ids"][:, 1:].masked_fill(~batch["completion_mask"][:, 1:], -100)


def logps_by_hand(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """(4,) from logits (4, 7, V)."""
    labels = labels_of(batch)
    return -cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(1)


def plain_model() -> dict:
    body = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, 16), nn.Tanh()).double()
    return dict(body=body, lm_head=nn.Linear(16, VOCAB, bias=False).double())


def gpt2(dtype=torch.float64):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def assert_gradient(weight: nn.Parameter, loss: torch.Tensor) -> None:
    """The gradient that a block left in weight is that of a loss by hand."""
    found, weight.grad = weight.grad, None
    loss.backward()
    assert weight.grad.norm() > 1e-3 and relative_error(found, weight.grad) < 1e-10


# The recipes in the caller's own loop


def test_plain_pytorch():
    given = plain_model() | batch()
    scope = execute(RECIPES["Plain PyTorch"], **given)
    logits = given["lm_head"](given["body"](given["input_ids"]))
    loss = copg_loss_ref(logps_by_hand(logits, given), given["ref_logps"], given["rewards"], beta=BETA, group_size=2)
    assert scope["output"].loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_gradient(given["lm_head"].weight, loss)


def test_plain_reference():
    given = plain_model() | batch()
    scope = execute(RECIPES["Plain PyTorch 2"], **given)
    expected = logps_by_hand(given["lm_head"](given["body"](given["input_ids"])), given)
    assert not scope["ref_logps"].requires_grad and relative_error(scope["ref_logps"], expected) < 1e-12


def test_plain_dpo():
    given = plain_model() | batch()
    hidden_states = given["body"](given["input_ids"])
    execute(RECIPES["Plain PyTorch 3"], **given, hidden_states=hidden_states[:, :-1], labels=labels_of(given))
    logps = logps_by_hand(given["lm_head"](given["body"](given["input_ids"])), given)
    gaps = (logps - given["ref_logps"]).view(2, 2).diff(dim=1)
    better = given["rewards"].view(2, 2).diff(dim=1).sign()
    assert_gradient(given["lm_head"].weight, -logsigmoid(BETA * gaps * better).mean())


def test_transformers_in_a_loop():
    model, given = gpt2(), batch()
    attention_mask = torch.ones_like(given["input_ids"])
    code = RECIPES["A model of transformers in your own loop"]
    execute(code, model=model, attention_mask=attention_mask, labels=labels_of(given), **given)
    logps = logps_by_hand(model(given["input_ids"]).logits, given)
    assert_gradient(
        model.lm_head.weight, copg_loss_ref(logps, given["ref_logps"], given["rewards"], beta=BETA, group_size=2)
    )


def test_accelerate_in_a_loop(monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model, given = gpt2(), batch()
    given |= dict(attention_mask=torch.ones_like(given["input_ids"]), labels=labels_of(given))
    logps = logps_by_hand(model(given["input_ids"]).logits, given)
    loss = copg_loss_ref(logps, given["ref_logps"], given["rewards"], beta=BETA, group_size=2)
    expected = [weight - gradient for weight, gradient in zip(*leaves_and_gradients(model, loss), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scope = execute(RECIPES["The same loop with accelerate"], model=model, optimizer=optimizer, **given)
    assert scope["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    for parameter, truth in zip(model.parameters(), expected, strict=True):
        assert relative_error(parameter, truth) < 1e-10


def leaves_and_gradients(model, loss: torch.Tensor) -> tuple[list, tuple]:
    leaves = list(model.parameters())
    return [leaf.detach().clone() for leaf in leaves], torch.autograd.grad(loss, leaves)


def test_peft_reference():
    peft = pytest.importorskip("peft")
    given, base = batch(), gpt2()
    policy = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["c_attn"]))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    scope = execute(RECIPES["PEFT 2"], policy=policy, labels=labels_of(given), **given)
    assert relative_error(scope["ref_logps"], logps_by_hand(base(given["input_ids"]).logits, given)) < 1e-6
    moved = logps_by_hand(policy(given["input_ids"]).logits, given)
    assert relative_error(scope["ref_logps"], moved) > 1e-2


# The recipes of trainers

ROWS = [{"prompt": [2, 3], "completions": [[4, 5, 1], [6, 1], [7, 1]], "rewards": [1.0, 0.0, 0.5]}]


def defaults(monkeypatch, config: type, **settings) -> None:
    """What a recipe leaves out, for the sake of seconds."""
    init = config.__init__
    monkeypatch.setattr(config, "__init__", lambda self, *args, **kw: init(self, *args, **(settings | kw)))


def small_trl(monkeypatch, config: type, **settings):
    tiny_trl = pytest.importorskip("tests.tiny_trl")
    defaults(monkeypatch, config, **(tiny_trl.QUIET | dict(max_steps=2, learning_rate=0.1) | settings))
    return tiny_trl


def test_trainer_of_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    tokenizer = pytest.importorskip("tests.test_integrations_trainer").word_tokenizer()
    model = gpt2(torch.float32)
    before = model.lm_head.weight.clone()
    trainer = execute(RECIPES["transformers' Trainer"], model=model, tokenizer=tokenizer)["trainer"]
    assert trainer.state.global_step == 1 and not torch.equal(trainer.model.lm_head.weight, before)


def test_trls_own_trainers(tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    tiny_trl = small_trl(monkeypatch, trl.DPOConfig)
    columns = dict(prompt=["a b c", "d e"], chosen=[" f g h i", " j"], rejected=[" k l", " a b c d e"])
    given = dict(pairs=datasets.Dataset.from_dict(columns), tokenizer=tiny_trl.word_tokenizer())
    from copg_kernels.integrations import trl as fused

    calls = []
    ours = fused.linear_token_statistics
    monkeypatch.setattr(fused, "linear_token_statistics", lambda *args, **kw: calls.append(1) or ours(*args, **kw))
    model = tiny_trl.policy_with_reference(tmp_path / "reference")
    try:
        trainer = execute(RECIPES["TRL's own trainers"], model=model, **given)["trainer"]
    finally:
        fused.uninstall()
    assert trainer.state.global_step == 2 and len(calls) >= 2


@pytest.mark.parametrize("recipe", ["CoPG in TRL", "PEFT 3"])
def test_copg_in_trl(tmp_path, monkeypatch, recipe):
    for package in ("trl", "datasets", "peft"):
        pytest.importorskip(package)
    from datasets import Dataset

    from copg_kernels.integrations.trl_trainer import CoPGConfig

    monkeypatch.chdir(tmp_path)
    tiny_trl = small_trl(monkeypatch, CoPGConfig, max_completion_length=4)
    tiny_trl.tiny_model(0).save_pretrained("policy")
    prompts = Dataset.from_dict(dict(prompt=["a b c", "d e"]))
    given = dict(reward=tiny_trl.count_of_a, prompts=prompts, tokenizer=tiny_trl.word_tokenizer())
    trainer = execute(RECIPES[recipe], model="policy", **given)["trainer"]
    head = trainer.model.get_output_embeddings().weight
    assert trainer.state.global_step == 2
    assert torch.equal(head, tiny_trl.tiny_model(0).lm_head.weight) == (recipe == "PEFT 3")
    if recipe == "PEFT 3":
        assert any(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_peft_in_the_trainer(tmp_path, monkeypatch):
    pytest.importorskip("peft"), pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    given = dict(model=gpt2(torch.float32), args=args, rows=ROWS, tokenizer=None)
    before = given["model"].lm_head.weight.clone()
    policy = execute(RECIPES["PEFT"], **given)["policy"]
    assert torch.equal(policy.get_output_embeddings().weight, before)
    assert any(p.abs().sum() > 0 for name, p in policy.named_parameters() if "lora_B" in name)


# Migration


def test_selective_log_softmax():
    trl_function = pytest.importorskip("trl.trainer.utils").selective_log_softmax
    hidden_states, weight = torch.randn(3, 6, 16).double(), torch.randn(VOCAB, 16).double()
    input_ids, temperature = torch.randint(VOCAB, (3, 6)), 0.7
    given = dict(hidden_states=hidden_states, lm_head_weight=weight, input_ids=input_ids, temperature=temperature)
    ours = execute(MIGRATION["TRL's selective_log_softmax"], **given)["per_token_logps"]
    logits, index = (hidden_states @ weight.T)[:, :-1], input_ids[:, 1:]
    assert relative_error(ours, trl_function(logits, index, temperature)) < 1e-12
    row_mask = torch.rand(3, 5) < 0.5
    masked = linear_logps(hidden_states[:, :-1], weight, index.masked_fill(~row_mask, -100), temperature=temperature)
    assert relative_error(masked, trl_function(logits, index, temperature, row_mask=row_mask)) < 1e-12
    assert trl_function(logits.bfloat16(), index).dtype == torch.bfloat16
    assert linear_logps(hidden_states.bfloat16()[:, :-1], weight.bfloat16(), index).dtype == torch.float32
    with pytest.raises((RuntimeError, IndexError)):
        trl_function(logits, index.masked_fill(~row_mask, -100))


def test_trls_chunked_log_probs():
    """Against its own function, gradients of a loss with an entropy bonus included."""
    trl_function = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    operands = dict(hidden=torch.randn(6, 16), weight=torch.randn(VOCAB, 16), bias=torch.randn(VOCAB))
    leaves = {name: x.requires_grad_() for name, x in operands.items()}
    options = dict(targets=torch.randint(VOCAB, (6,)), temperature=0.7, softcap=5.0, logit_scale=0.5)
    given = dict(entropy_coef=0.3, policy_loss=lambda logps: (logps * torch.linspace(-1, 1, 6)).sum())
    ours = execute(MIGRATION["TRL's ChunkedLogProbFunction"], **leaves, **options, **given)
    targets, temperature, softcap, logit_scale = options.values()
    arguments = (*leaves.values(), targets, temperature, 16, softcap, logit_scale, ("entropy", "mean_logits"))
    logps, entropy, _, mean_logits, _ = trl_function.apply(*arguments)
    loss = given["policy_loss"](logps) - 0.3 * entropy.mean()
    for name, value in dict(logps=logps, entropy=entropy, mean_logits=mean_logits, loss=loss).items():
        assert relative_error(ours[name], value) < 1e-5, name
    gradients = (torch.autograd.grad(value, list(leaves.values())) for value in (ours["loss"], loss))
    assert all(relative_error(*pair) < 1e-5 for pair in zip(*gradients, strict=True))


def test_ligers_dpo_loss():
    """Its formula, with all chosen completions first; its chosen_rewards are beta times these log-ratios."""
    hidden_states, weight, bias = torch.randn(6, 5, 16).double(), torch.randn(VOCAB, 16).double(), torch.randn(VOCAB)
    labels, ref_logps = torch.randint(VOCAB, (6, 5)), torch.randn(6).double() - 15
    labels[:, 0] = labels[2, 3:] = -100
    given = dict(hidden_states=hidden_states, lm_head_weight=weight, labels=labels, bias=bias.double())
    is_chosen = torch.arange(6) < 3
    code = MIGRATION["Liger's LigerFusedLinearDPOLoss"]
    output = execute(code, **given, ref_logps=ref_logps, is_chosen=is_chosen)["output"]
    logits = hidden_states @ weight.T + bias
    log_ratios = -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) - ref_logps
    loss = -logsigmoid(0.1 * (log_ratios[:3] - log_ratios[3:])).mean()
    # A pair's winner is told by rewards of 1 and 0, which are float32 here.
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(output.log_ratios[0::2], log_ratios[:3]) < 1e-6


def test_cut_cross_entropy():
    """shift=True and reduction="mean", by its documentation."""
    e, c, targets = torch.randn(2, 6, 16).double(), torch.randn(VOCAB, 16).double(), torch.randint(VOCAB, (2, 6))
    targets[0, 3] = -100
    given = dict(e=e, c=c, targets=targets, softcap=5.0)
    scope = execute(MIGRATION["cut-cross-entropy's linear_cross_entropy"], **given)
    logits = 5.0 * (e[:, :-1] @ c.T / 5.0).tanh()
    expected = cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none")
    assert scope["nll"].shape == (2, 5) and relative_error(scope["nll"], expected) < 1e-12
    assert scope["mean"].item() == pytest.approx(cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()).item())


def test_every_block_has_a_test():
    """By name in this file, so that a new one cannot go without."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(RECIPES) >= 9 and len(MIGRATION) == 4
    assert [name for name in [*RECIPES, *MIGRATION] if f'"{name}"' not in source] == []


# What is supported where

OPERATORS = [
    linear_logps,
    linear_copg_loss,
    linear_sequence_loss,
    parallel_linear_logps,
    parallel_linear_copg_loss,
]


def cells(first: str) -> list[str]:
    """Of the table of operators."""
    table = page("support.md").split("\n## ")[1]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    "name", "bias logit_scale softcap temperature sparse_eps average_logps cu_seqlens cu_groups".split()
)
def test_arguments_in_the_table(name):
    has = [name in inspect.signature(operator).parameters for operator in OPERATORS]
    assert [cell.startswith("yes") for cell in cells(f"`{name}`")] == has
    assert all(cell.startswith(("yes", "no")) for cell in cells(f"`{name}`"))


def call(operator, hidden_states, **options):
    """The scalar that `operator` gives for two pairs of two tokens."""
    weight, labels = torch.linspace(-1, 1, 36).view(9, 4).sin(), torch.arange(8).view(4, 2)
    if operator is linear_logps:
        return linear_logps(hidden_states, weight, labels, **options).sum()
    completions = (torch.zeros(4), torch.tensor([1.0, 0.0, 2.0, 0.5]))
    if operator is linear_sequence_loss:
        options = options | dict(loss=losses.ipo_loss)
    return operator(hidden_states, weight, labels, *completions, beta=BETA, group_size=2, **options).loss


@pytest.mark.parametrize("sparse_eps", [None, 1e-3])
@pytest.mark.parametrize("operator", OPERATORS[:3])
def test_graph_breaks_in_the_table(operator, sparse_eps):
    row = "`torch.compile(fullgraph=True)`" if sparse_eps is None else "the same with `sparse_eps`"
    compiled = torch.compile(lambda x: call(operator, x, sparse_eps=sparse_eps), fullgraph=True, backend="eager")
    hidden_states = torch.randn(4, 2, 4, requires_grad=True)
    if cells(row)[OPERATORS.index(operator)] == "yes":
        assert compiled(hidden_states).item() == pytest.approx(call(operator, hidden_states).item(), rel=1e-5)
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(hidden_states)


def with_a_dtensor(group, operator, argument):
    mesh = DeviceMesh.from_group(group, "cpu")
    tensors = dict(
        hidden_states=torch.randn(4, 2, 4),
        lm_head_weight=torch.randn(9, 4),
        labels=torch.zeros(4, 2, dtype=torch.int64),
        bias=torch.zeros(9),
    )
    tensors[argument] = distribute_tensor(tensors[argument], mesh, [Shard(0)])
    if operator is not linear_logps:
        tensors |= dict(ref_logps=torch.zeros(4), rewards=torch.zeros(4), beta=BETA, group_size=2)
    operator(**tensors, **(dict(loss=losses.ipo_loss) if operator is linear_sequence_loss else {}))


def test_a_dtensor_is_refused(tmp_path):
    """The head's with what to use instead; a DTensor is one on a single rank too."""
    refused = dict(lm_head_weight="gathered", bias="gathered", hidden_states="full_tensor", labels="full_tensor")
    ranks = Ranks(1, tmp_path / "store")
    try:
        for operator, (argument, instead) in product(OPERATORS[:3], refused.items()):
            (error,) = ranks.errors(with_a_dtensor, operator, argument)
            assert f"TypeError: {argument} must be a plain tensor, got a DTensor" in error and instead in error
    finally:
        ranks.stop()


@pytest.mark.parametrize("what", ["lora", "dora"])
def test_trl_refuses_adapters_of_the_head(tmp_path, what):
    for package in ("trl", "datasets", "peft"):
        pytest.importorskip(package)
    import peft
    import trl
    from datasets import Dataset

    from copg_kernels.integrations.trl_trainer import CoPGConfig, CoPGTrainer
    from tests.tiny_trl import QUIET, count_of_a, tiny_model, word_tokenizer

    options = dict(
        processing_class=word_tokenizer(),
        peft_config=peft.LoraConfig(target_modules=["lm_head"], use_dora=what == "dora"),
    )
    prompts, config = Dataset.from_dict(dict(prompt=["a b"])), CoPGConfig(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        CoPGTrainer(tiny_model(0), count_of_a, config, train_dataset=prompts, **options)
    pairs, config = dict(prompt=["a"], chosen=["b"], rejected=["c"]), trl.DPOConfig(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        trl.DPOTrainer(tiny_model(0), args=config, train_dataset=Dataset.from_dict(pairs), **options)


# The API's page and the doctests


def test_public_names_are_on_the_page_of_the_api():
    documented = {name.split(".")[-1] for name in re.findall(r"^::: ([a-zA-Z_.]+)$", page("api.md"), re.MULTILINE)}
    functions = {name for name, value in vars(losses).items() if name.endswith("_loss") and callable(value)}
    expected = {*copg_kernels.__all__, *parallel.__all__, *functions} - {"losses"}
    assert expected - documented == set()


DOCTESTED = [path for path in sorted((ROOT / "copg_kernels").rglob("*.py")) if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("path", DOCTESTED, ids=lambda path: path.stem)
def test_doctests(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0
