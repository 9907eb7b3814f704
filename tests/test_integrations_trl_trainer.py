"""integrations.trl_trainer: CoPG on TRL's online trainer, against RLOO's and against plain PyTorch in float64."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, set_seed
from trl import RLOOConfig, RLOOTrainer

from copg_kernels.integrations import trl_trainer as module
from copg_kernels.integrations.trl_trainer import CoPGConfig, CoPGTrainer
from copg_kernels.reference import copg_loss_ref
from tests.numerics import assert_close, relative_error
from tests.tiny_trl import QUIET, STEPS, count_of_a, policy_with_reference, tiny_model, word_tokenizer

BETA, TEMPERATURE = 0.3, 0.8
PROMPTS = ["a b c", "d e", "f", "g h a l"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(folder, cls=CoPGTrainer, config=CoPGConfig, reward=count_of_a, seed=0, **settings):
    """A policy that has left its reference, unless seed is that of the reference (1)."""
    options = {name: settings.pop(name) for name in ("peft_config", "eval_dataset") if name in settings}
    defaults = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=6, beta=BETA)
    args = config(str(folder / "out"), **(defaults | dict(temperature=TEMPERATURE) | STEPS | QUIET | settings))
    policy = policy_with_reference(folder / "reference", seed=seed, reference_seed=1)
    rows = Dataset.from_dict(dict(prompt=PROMPTS))
    return cls(policy, reward, args, train_dataset=rows, processing_class=word_tokenizer(), **options)


def sample(trainer) -> dict:
    """Two groups of four, scored; the same for every trainer of the same policy."""
    set_seed(7)
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(4)])


def gradients(trainer, inputs) -> list:
    loss = trainer.compute_loss(trainer.model, inputs)
    return list(torch.autograd.grad(loss, [p for p in trainer.model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("settings", [{}, dict(mask_truncated_completions=True, reward_clip_range=(-0.5, 1.0))])
def test_the_first_gradient_is_that_of_rloo(tmp_path, settings):
    trainer = make_trainer(tmp_path / "copg", **settings)
    rloo = make_trainer(tmp_path / "rloo", RLOOTrainer, RLOOConfig, **settings)
    ours, theirs = sample(trainer), sample(rloo)
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    assert len(ours["completion_mask"].sum(1).unique()) > 1 and theirs["advantages"].abs().min() > 1e-3
    torch.testing.assert_close(ours["advantages"], theirs["advantages"], rtol=1e-4, atol=1e-5)
    expected = gradients(rloo, theirs)
    assert max(g.abs().max() for g in expected) > 0.01
    for our_gradient, their_gradient in zip(gradients(trainer, ours), expected, strict=True):
        assert relative_error(our_gradient, their_gradient) < 1e-5


def logps_by_hand(model, inputs, dtype):
    """(N,) from the model's logits."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=input_ids, attention_mask=mask).logits.to(dtype) / TEMPERATURE
    labels = inputs["completion_ids"]
    per_token = logits[:, -labels.shape[1] - 1 : -1].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return (per_token * inputs["completion_mask"]).sum(1)


def test_off_policy_loss_and_gradient(tmp_path):
    """After the policy has moved: the loss of current log-probs, rewards and reference, all by hand."""
    rewards = []

    def reward(completions, **_):
        rewards.extend(count_of_a(completions))
        return rewards

    trainer = make_trainer(tmp_path, reward=reward)
    inputs = sample(trainer)
    for parameter in trainer.model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    assert (logps_by_hand(trainer.model, inputs, torch.float32) - inputs["old_logps"]).abs().max() > 0.3

    def by_hand(model, reference, dtype):
        with torch.no_grad():
            ref_logps = logps_by_hand(reference, inputs, dtype)
        logps = logps_by_hand(model, inputs, dtype)
        loss = copg_loss_ref(logps, ref_logps, torch.tensor(rewards, dtype=dtype), beta=BETA, group_size=4)
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    loss = trainer.compute_loss(trainer.model, inputs).detach()
    actual = (loss, *gradients(trainer, inputs))
    base = by_hand(trainer.model, trainer.ref_model, torch.float32)
    gold = by_hand(trainer.model.double(), trainer.ref_model.double(), torch.float64)
    for triple in zip(actual, base, gold, strict=True):
        assert_close("loss and gradients", *triple)


def test_the_head_is_never_called(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    inputs = sample(trainer)
    called, forward = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: called.append(self) or forward(self, x))
    trainer.compute_loss(trainer.model, inputs).backward()
    assert called and trainer.model.lm_head not in called
    trainer.model(inputs["completion_ids"])
    assert trainer.model.lm_head in called


def test_a_policy_at_its_reference_has_no_divergence(tmp_path):
    trainer = make_trainer(tmp_path, seed=1, learning_rate=0.0)
    trainer.train()
    assert all(entry["kl"] == 0 for entry in trainer.state.log_history if "kl" in entry)


def after_one_step(folder, **settings) -> tuple[list, list]:
    """The prompts of each micro-batch, and the parameters."""
    trainer = make_trainer(folder, max_steps=1, **settings)
    prompts, compute_loss = [], trainer._compute_loss

    def record(model, inputs):
        prompts.append(word_tokenizer().batch_decode(inputs["prompt_ids"], skip_special_tokens=True))
        return compute_loss(model, inputs)

    trainer._compute_loss = record
    trainer.train()
    return prompts, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_groups_stay_whole_under_gradient_accumulation(tmp_path):
    """One step of all completions at once, and the same step in two micro-batches of one group."""
    (both,), whole = after_one_step(tmp_path / "whole")
    parts = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    (first, second), cut = after_one_step(tmp_path / "cut", **parts)
    assert both == first + second and len(set(first)) == len(set(second)) == 1 and first != second
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_completions_are_used_again(tmp_path):
    """Two iterations over two slices: four steps from one generation."""
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        return count_of_a(completions)

    reuse = dict(per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, max_steps=8)
    trainer = make_trainer(tmp_path, reward=reward, **reuse)
    trainer.train()
    assert calls == [8, 8] and trainer.state.global_step == 8


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_entropy_is_that_of_rloo(tmp_path, mode):
    trainers = make_trainer(tmp_path / "copg"), make_trainer(tmp_path / "rloo", RLOOTrainer, RLOOConfig)
    for trainer in trainers:
        inputs = sample(trainer)
        trainer.model.train(mode == "train")
        trainer.compute_loss(trainer.model, inputs)
    (ours,), (theirs,) = (trainer._metrics[mode]["entropy"] for trainer in trainers)
    assert ours == pytest.approx(theirs, rel=1e-5) and ours > 0.1


METRICS = ["loss", "reward", "reward_std", "kl", "entropy", "frac_reward_zero_std", "rewards/count_of_a/mean"]
METRICS += ["completions/mean_length", "completions/clipped_ratio", "completions/max_terminated_length", "grad_norm"]


def test_metrics_and_evaluation(tmp_path):
    rows = Dataset.from_dict(dict(prompt=PROMPTS))
    evaluation = dict(eval_strategy="steps", eval_steps=2, num_generations_eval=2, per_device_eval_batch_size=4)
    trainer = make_trainer(tmp_path, eval_dataset=rows, **evaluation)
    trainer.train()
    trained = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(trained) == 3 and all(name in entry for entry in trained for name in METRICS)
    assert all(entry["loss"] > 0 and entry["kl"] != 0 for entry in trained)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and all(entry["eval_loss"] > 0 for entry in evaluated)
    assert all(f"eval_{name}" in entry for entry in evaluated for name in METRICS if name != "grad_norm")


def test_rewards_rise(tmp_path):
    settings = dict(max_steps=40, learning_rate=0.03, optim="adamw_torch", beta=0.02, temperature=1.0)
    trainer = make_trainer(tmp_path, num_iterations=2, **settings)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.5


def test_lora(tmp_path):
    """The reference is the model without its adapter; the head is frozen."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=64, lora_dropout=0.5)
    trainer = make_trainer(tmp_path, seed=1, peft_config=adapter)
    head = trainer.model.get_output_embeddings().weight.clone()
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0 and 0 not in kl[1:]
    assert torch.equal(trainer.model.get_output_embeddings().weight, head)
    assert any(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


def test_bfloat16_with_activation_checkpointing(tmp_path):
    trainer = make_trainer(tmp_path, seed=1, bf16=True, gradient_checkpointing=True)
    trainer.train()
    trained = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert trained[0]["kl"] == 0 and all(entry["grad_norm"] > 0 for entry in trained)


def test_the_example_of_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(0).save_pretrained("policy")
    prompts = Dataset.from_dict(dict(prompt=PROMPTS))
    names = dict(model="policy", reward=count_of_a, prompts=prompts, tokenizer=word_tokenizer())
    init = CoPGConfig.__init__
    small = dict(max_completion_length=4, max_steps=2) | QUIET
    monkeypatch.setattr(CoPGConfig, "__init__", lambda self, *args, **kw: init(self, *args, **(small | kw)))
    exec(textwrap.dedent(inspect.getdoc(module).split("\n\n", 1)[1]), names)
    assert names["trainer"].state.global_step == 2
    assert not torch.equal(names["trainer"].model.lm_head.weight, tiny_model(0).lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=0.0), "beta must be positive, got 0.0"),
        (dict(epsilon=0.1), "epsilon is not supported by CoPG: it must be 0.2, got 0.1"),
        (dict(epsilon_high=0.3), "epsilon_high is not supported"),
        (dict(normalize_advantages=True), "normalize_advantages is not supported"),
        (dict(use_liger_kernel=True), "use_liger_kernel is not supported"),
        (dict(torch_compile=True), "torch_compile is not supported"),
        (
            dict(per_device_train_batch_size=6, gradient_accumulation_steps=2),
            "per_device_train_batch_size must be a multiple of num_generations.*got 6 and 4",
        ),
        (
            dict(eval_strategy="steps", eval_steps=1, num_generations_eval=1),
            "per_device_eval_batch_size must be a multiple of num_generations_eval.*got 8 and 1",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CoPGConfig(str(tmp_path), **(dict(num_generations=4) | settings), **QUIET)


def test_what_the_trainer_refuses(tmp_path):
    with pytest.raises(TypeError, match="args must be a CoPGConfig, got RLOOConfig"):
        make_trainer(tmp_path, config=RLOOConfig)
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match="per_device_eval_batch_size must be a multiple of .*got 6 and 4"):
        trainer.evaluate(Dataset.from_dict(dict(prompt=PROMPTS)))


@pytest.mark.parametrize(("reward", "message"), [(None, "1 got None from all"), (float("inf"), "got infinity")])
def test_rewards_that_are_refused(tmp_path, reward, message):
    trainer = make_trainer(tmp_path, reward=lambda completions, **_: [reward, *count_of_a(completions)[1:]])
    with pytest.raises(ValueError, match=f"reward_funcs must .*{message}"):
        sample(trainer)


def test_a_routers_loss_is_refused(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    experts = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, pad_token_id=0, eos_token_id=1)
    MixtralForCausalLM(experts).save_pretrained(tmp_path / "experts")
    rows = Dataset.from_dict(dict(prompt=PROMPTS))
    options = dict(train_dataset=rows, processing_class=word_tokenizer())
    with pytest.raises(ValueError, match="router_aux_loss_coef must be 0.0"):
        CoPGTrainer(str(tmp_path / "experts"), count_of_a, CoPGConfig(str(tmp_path), **QUIET), **options)
    CoPGTrainer(
        str(tmp_path / "experts"), count_of_a, CoPGConfig(str(tmp_path), router_aux_loss_coef=0.0, **QUIET), **options
    )
