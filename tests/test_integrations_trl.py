"""integrations.trl: the stand-in for TRL's function against float64, and TRL's trainers with it and without."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("datasets")

import trl
from datasets import Dataset

from copg_kernels import linear_logps_and_entropy
from copg_kernels.integrations import trl as fused
from copg_kernels.integrations.trl import ChunkedLogProbFunction
from tests.numerics import assert_close, assert_logps_close, upcast
from tests.test_work import MatmulFlops
from tests.tiny_trl import QUIET, STEPS, count_of_a, policy_with_reference, tiny_model, word_tokenizer

N, V, H = 37, 61, 16
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    fused.uninstall()


# The function


def operands(dtype=torch.float32, bias: bool = False, trainable: str = "hidden weight bias") -> dict:
    tensors = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.randn(V) if bias else None}
    labels = torch.randint(V, (N,))
    labels[:3] = torch.tensor([0, V - 1, V - 2])
    leaves = {
        name: x if x is None else x.to(dtype).requires_grad_(name in trainable.split()) for name, x in tensors.items()
    }
    return leaves | {"labels": labels}


def eager(hidden, weight, bias, labels, temperature, softcap, logit_scale) -> tuple[Tensor, Tensor, float]:
    """Log-probs, entropy and the largest logit, from the logits themselves."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    largest = (logits / temperature).abs().max().item()
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), largest


def gradients(values: dict, *outputs: Tensor) -> dict[str, Tensor]:
    """Of a sum with a weight per token."""
    weights = [torch.linspace(-1, 2, N), torch.linspace(0.5, -1, N)]
    loss = sum((output * w.to(output)).sum() for output, w in zip(outputs, weights, strict=False))
    leaves = {name: x for name, x in values.items() if isinstance(x, Tensor) and x.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


CASES = {
    "plain": (dict(), (1.0, None, 1.0)),
    "temperature": (dict(), (0.7, None, 1.0)),
    "bias, scale and cap": (dict(bias=True), (0.7, 5.0, 0.5)),
    "bfloat16": (dict(dtype=torch.bfloat16, bias=True), (0.7, None, 1.0)),
    "frozen head": (dict(bias=True, trainable="hidden"), (1.0, None, 1.0)),
    "frozen body": (dict(trainable="weight"), (1.0, None, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients(case):
    shape, (temperature, softcap, logit_scale) = CASES[case]
    values = operands(**shape)
    logps, *others = ChunkedLogProbFunction.apply(
        *values.values(), temperature, 16, softcap, logit_scale, ("log_probs",)
    )
    assert others == [None] * 4 and logps.dtype == torch.float32
    exact, base = upcast(values, torch.float64), upcast(values, torch.float32)
    gold_logps, _, largest = eager(**exact, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    base_logps, *_ = eager(**base, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    assert_logps_close("log-probs", logps, base_logps, gold_logps, largest)
    actual, in_float32, gold = gradients(values, logps), gradients(base, base_logps), gradients(exact, gold_logps)
    assert list(actual) == list(gold)
    for name in gold:
        assert_close(name, actual[name], in_float32[name], gold[name])


@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])  # TRL's function rounds the logits
def test_gradients_through_log_probs_and_entropy_add_up(case):
    shape, (temperature, softcap, logit_scale) = CASES[case]
    values = operands(**shape)
    arguments = (*values.values(), temperature, 16, softcap, logit_scale)
    logps, entropy, *_ = ChunkedLogProbFunction.apply(*arguments, ("entropy",))
    exact, base = upcast(values, torch.float64), upcast(values, torch.float32)
    head = dict(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    gold_outputs, base_outputs = eager(**exact, **head)[:2], eager(**base, **head)[:2]
    assert_close("entropy", entropy, base_outputs[1], gold_outputs[1])
    actual, gold = gradients(values, logps, entropy), gradients(exact, *gold_outputs)
    for name, in_float32 in gradients(base, *base_outputs).items():
        assert_close(name, actual[name], in_float32, gold[name])


def test_no_product_outside_of_our_operators():
    """Their own work tests/test_entropy.py counts."""
    values = operands()
    arguments = (*values.values(), 0.7, 16, None, 1.0, ("entropy",))
    with MatmulFlops() as counter:
        logps, entropy, *_ = ChunkedLogProbFunction.apply(*arguments)
        (logps * entropy.detach()).sum().backward(retain_graph=True)
    assert counter.flops == 0
    assert torch.equal(
        entropy, linear_logps_and_entropy(*list(values.values())[:2], values["labels"], temperature=0.7)[1]
    )
    with MatmulFlops() as counter:
        gradients(values, entropy)
    assert counter.flops == 0
    with torch.no_grad():
        assert not ChunkedLogProbFunction.apply(*arguments)[1].requires_grad


def test_gradient_of_entropy_in_the_dtype_of_the_product():
    """That of the operands as they were multiplied, wherever the backward pass runs."""
    values = operands(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, entropy, *_ = ChunkedLogProbFunction.apply(*values.values(), 0.7, 16, 5.0, 0.5, ("entropy",))
        actual = gradients(values, entropy)
    rounded = upcast(values, torch.bfloat16)
    _, expected_entropy, *_ = ChunkedLogProbFunction.apply(*rounded.values(), 0.7, 16, 5.0, 0.5)
    for name, expected in gradients(rounded, expected_entropy).items():
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected.float())


def test_second_derivative_of_entropy_is_refused():
    values = operands()
    _, entropy, *_ = ChunkedLogProbFunction.apply(*values.values(), 1.0, 16)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(entropy.sum(), values["hidden"], create_graph=True)


def test_trls_function_is_never_called(monkeypatch):
    """Not for an output, and not for a gradient."""

    def never(*args):
        raise AssertionError("TRL's function was called")

    monkeypatch.setattr(fused._TRL_FUNCTION, "apply", never)
    values = operands(bias=True)
    outputs = ChunkedLogProbFunction.apply(*values.values(), 0.7, 16, 5.0, 0.5)
    assert all(output is not None for output in outputs) and gradients(values, *outputs[:2])


def test_what_install_is_told_of_gradients(monkeypatch):
    told = []
    ours = fused.linear_token_statistics
    monkeypatch.setattr(
        fused, "linear_token_statistics", lambda *args, **kw: told.append(kw["expected_gradients"]) or ours(*args, **kw)
    )
    for expected in ("logps", "both"):
        with fused.install(expected_gradients=expected):
            ChunkedLogProbFunction.apply(*operands().values(), 1.0, 16)
    assert told == ["logps", "both"]
    with pytest.raises(ValueError, match="expected_gradients must be"):
        fused.install(expected_gradients="neither")


def test_the_other_outputs_are_those_of_trl():
    values = operands(bias=True)
    arguments = (*values.values(), 0.7, 16, 5.0, 0.5)
    ours, theirs = ChunkedLogProbFunction.apply(*arguments), fused._TRL_FUNCTION.apply(*arguments)
    for our_output, their_output in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(our_output, their_output, rtol=1e-5, atol=1e-5)
    for our_output, their_output in zip(ours[2:4], theirs[2:4], strict=True):
        torch.testing.assert_close(our_output, their_output, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[4], theirs[4]) and not any(output.requires_grad for output in ours[2:])
    alone = ChunkedLogProbFunction.apply(*arguments, ("mean_logits",))
    assert torch.equal(alone[3], ours[3]) and alone[1] is alone[2] is alone[4] is None


def test_the_dtype_of_the_product():
    """That of autocast, else of the hidden states; gradients come in the dtype of each operand."""
    values = operands()
    hidden, weight, labels = values["hidden"].bfloat16(), values["weight"], values["labels"]
    expected, *_ = ChunkedLogProbFunction.apply(hidden, weight.bfloat16(), None, labels, 1.0, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logps, *_ = ChunkedLogProbFunction.apply(*values.values(), 1.0, 16)
    assert torch.equal(logps, expected) and logps.dtype == torch.float32
    mixed, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 16)
    assert torch.equal(mixed, expected)
    assert {g.dtype for g in gradients(values, logps).values()} == {torch.float32}


@pytest.mark.parametrize("outputs", [("log_probs",), ("entropy", "is_top1")])
def test_no_tokens(outputs):
    values = operands()
    logps, entropy, *_ = ChunkedLogProbFunction.apply(
        values["hidden"][:0], values["weight"], None, values["labels"][:0], 1.0, 16, None, 1.0, outputs
    )
    assert logps.shape == (0,) and (entropy is None) == ("entropy" not in outputs)
    (logps if entropy is None else logps + entropy).sum().backward()
    assert not values["weight"].grad.any() and not values["hidden"].grad.any()


def test_a_partitioned_head_is_refused():
    values = operands()
    values["weight"].ds_id = 0  # as DeepSpeed marks its parameters
    with pytest.raises(ValueError, match="lm_head_weight is partitioned by DeepSpeed ZeRO-3"):
        ChunkedLogProbFunction.apply(*values.values(), 1.0, 16)


# Its installation


def bound() -> list:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    return [trl.kernels.ChunkedLogProbFunction, chunked_logprob.ChunkedLogProbFunction, utils._ChunkedLogProbFunction]


def test_install_reaches_every_name_and_is_undone(monkeypatch):
    theirs, ours = [fused._TRL_FUNCTION] * 3, [ChunkedLogProbFunction] * 3
    monkeypatch.setattr(trl.trainer.utils, "another_name", fused._TRL_FUNCTION, raising=False)
    assert bound() == theirs
    with fused.install():
        assert bound() == ours and trl.trainer.utils.another_name is ChunkedLogProbFunction
        with fused.install():
            pass
        assert bound() == ours
    assert bound() == theirs and trl.trainer.utils.another_name is fused._TRL_FUNCTION
    undo = fused.install()
    assert bound() == ours
    undo.close()
    assert bound() == theirs
    fused.install()
    fused.uninstall()
    fused.uninstall()
    assert bound() == theirs


def test_another_signature_is_refused(monkeypatch):
    class Later(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature):
            return hidden

    monkeypatch.setattr(fused, "_TRL_FUNCTION", Later)
    with pytest.raises(RuntimeError, match="this TRL's takes .*'targets', 'temperature'.$"):
        fused.install()


# TRL's own tests


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "trl_own_tests.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_trls_own_tests():
    """Of the installed version, from its source archive; skipped only where that cannot be fetched."""
    run = run_script()
    if run.returncode == 69:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr


LIKE_TRLS_TESTS = """
import pytest, torch
from trl.kernels import ChunkedLogProbFunction

@pytest.mark.skipif(not torch.cuda.is_available(), reason="test requires accelerator")
class TestChunkedLogProbFunction:
    def _reference_logprobs_and_entropy(self, hidden, scale):
        return hidden.dtype, scale

    def test_ours_is_in_place(self):
        assert ChunkedLogProbFunction.__module__ == "copg_kernels.integrations.trl"

    def test_what_is_expected(self):
        dtype = self._reference_logprobs_and_entropy(torch.ones(2, dtype=torch.bfloat16), scale=2)
        assert dtype == (torch.float32, 2)

    def test_that_fails(self):
        assert ChunkedLogProbFunction is None
"""


def test_how_trls_own_tests_are_run(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_kernels.py").write_text(LIKE_TRLS_TESTS)
    run = run_script("--source", str(tmp_path))
    assert run.returncode == 1 and "1 failed, 2 passed" in run.stdout, run.stdout + run.stderr


# TRL's trainers


def dpo(folder, loss_type: str, **options):
    columns = dict(prompt=["a b c", "d e"], chosen=[" f g h i", " j"], rejected=[" k l", " a b c d e"])
    config = trl.DPOConfig(
        str(folder), loss_type=[loss_type], beta=0.3, per_device_train_batch_size=2, **STEPS, **QUIET
    )
    return trl.DPOTrainer(
        tiny_model(0),
        None if options else tiny_model(1),
        config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=word_tokenizer(),
        **options,
    )


def online(folder, trainer, config, **settings):
    settings = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=6) | settings
    arguments = config(str(folder / "out"), beta=0.3, **settings, **STEPS, **QUIET)
    rows = Dataset.from_dict(dict(prompt=["a b c", "d e"]))
    policy = policy_with_reference(folder / "reference", seed=0, reference_seed=1)
    return trainer(policy, count_of_a, arguments, train_dataset=rows, processing_class=word_tokenizer())


def lora():
    return pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=64)


TRAINERS = {
    "DPO": lambda folder: dpo(folder, "sigmoid"),
    "IPO": lambda folder: dpo(folder, "ipo"),
    "DPO with LoRA": lambda folder: dpo(folder, "sigmoid", peft_config=lora()),
    "GRPO": lambda folder: online(folder, trl.GRPOTrainer, trl.GRPOConfig),
    "GRPO with an entropy bonus": lambda folder: online(folder, trl.GRPOTrainer, trl.GRPOConfig, entropy_coef=0.5),
    "RLOO": lambda folder: online(folder, trl.RLOOTrainer, trl.RLOOConfig, num_iterations=2, temperature=0.8),
}


def trained(name: str, folder) -> tuple[list[dict], dict]:
    """What was logged, and the parameters."""
    trainer = TRAINERS[name](folder)
    trainer.train()
    timing = ("time", "runtime", "per_second", "tokens")
    logged = [
        {key: value for key, value in entry.items() if not any(part in key for part in timing)}
        for entry in trainer.state.log_history
    ]
    return logged, {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_log_the_same_losses(name, tmp_path, monkeypatch):
    calls = []
    ours = fused.linear_token_statistics
    monkeypatch.setattr(fused, "linear_token_statistics", lambda *args, **kw: calls.append(1) or ours(*args, **kw))
    expected, expected_parameters = trained(name, tmp_path / "theirs")
    assert not calls
    with fused.install():
        logged, parameters = trained(name, tmp_path / "ours")
    assert len(calls) >= 3 and len({entry["loss"] for entry in expected if "loss" in entry}) == 3
    assert [list(entry) for entry in logged] == [list(entry) for entry in expected]
    for ours, theirs in zip(logged, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
    for parameter in expected_parameters:
        torch.testing.assert_close(parameters[parameter], expected_parameters[parameter], rtol=1e-4, atol=1e-5)


def test_the_example_of_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = policy_with_reference(tmp_path / "reference")
    prompts = Dataset.from_dict(dict(prompt=["a b c", "d e"] * 4))
    names = dict(model=model, reward=count_of_a, prompts=prompts, tokenizer=word_tokenizer())
    small = dict(per_device_train_batch_size=8, max_completion_length=4, max_steps=1, learning_rate=0.1)
    monkeypatch.setattr(trl.GRPOConfig, "__init__", _with_defaults(trl.GRPOConfig.__init__, **small, **QUIET))
    before = model.lm_head.weight.clone()
    exec(textwrap.dedent(inspect.getdoc(fused).split("\n\n", 1)[1]), names)
    assert bound()[0] is ChunkedLogProbFunction and not torch.equal(model.lm_head.weight, before)


def _with_defaults(init, **defaults):
    return lambda self, *args, **options: init(self, *args, **(defaults | options))
