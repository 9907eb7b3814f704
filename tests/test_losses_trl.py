"""IPO, sigmoid DPO and RLOO against TRL's own trainers: their loss on their batches, and ours on the same model.

TRL computes log-probs, reference log-probs, advantages and the loss; the gradients of all parameters are compared.
"""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from copg_kernels import copg_loss, linear_logps, linear_sequence_loss, losses, sequence_logps
from tests.numerics import relative_error

WORDS = "a b c d e f g h i j k l".split()
BETA = 0.3
QUIET = dict(report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    special = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, initializer_range=0.3, num_key_value_heads=2))


def gradients(loss, model) -> list:
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(ours, theirs, model) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(ours, model), gradients(theirs, model))


def assert_same_gradients(ours: list, theirs: list) -> None:
    assert max(relative_error(*pair) for pair in zip(ours, theirs, strict=True)) < 1e-5


def head_inputs(model, input_ids, attention_mask, labels) -> tuple:
    """Hidden states and head, and the labels that they predict; TRL's models are transformers' own."""
    hidden_states = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
    return hidden_states, model.lm_head.weight, labels[:, 1:].contiguous()


@torch.no_grad()
def sequence_logps_of(model, *batch, average: bool = False):
    hidden_states, lm_head_weight, labels = head_inputs(model, *batch)
    return sequence_logps(linear_logps(hidden_states, lm_head_weight, labels), labels, average=average)


# Pairs


@pytest.fixture
def dpo_trainer(tokenizer, tmp_path):
    """Two pairs of other lengths, a policy and another reference."""

    def build(loss_type: str) -> DPOTrainer:
        columns = dict(prompt=["a b c", "d e"], chosen=[" f g h i", " j"], rejected=[" k l", " a b c d e"])
        rows, policy, reference = Dataset.from_dict(columns), tiny_model(0), tiny_model(1)
        sizes = dict(output_dir=str(tmp_path), per_device_train_batch_size=2)
        config = DPOConfig(loss_type=[loss_type], beta=BETA, **sizes, **QUIET)
        return DPOTrainer(policy, reference, config, train_dataset=rows, processing_class=tokenizer)

    return build


def interleaved(inputs) -> tuple:
    """Chosen, rejected, chosen, rejected; TRL's batch has all the chosen ones first."""
    order = torch.tensor([0, 2, 1, 3])
    input_ids, mask, counted = (inputs[x][order] for x in ("input_ids", "attention_mask", "completion_mask"))
    assert len(set(counted.sum(1).tolist())) > 2  # sums and averages differ
    return input_ids, mask, input_ids.masked_fill(counted == 0, -100)


@pytest.mark.parametrize(
    ("loss_type", "loss", "average"),
    # TRL divides the log-ratios of its IPO by the number of tokens: that is the loss on averages.
    [("sigmoid", losses.dpo_loss, False), ("sigmoid_norm", losses.dpo_loss, True), ("ipo", losses.ipo_loss, True)],
)
def test_pairs(dpo_trainer, loss_type, loss, average):
    trainer = dpo_trainer(loss_type)
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, inputs)

    batch = interleaved(inputs)
    options = dict(loss=loss, beta=BETA, group_size=2, average_logps=average)
    ref_logps = sequence_logps_of(trainer.ref_model, *batch, average=average)
    ours = linear_sequence_loss(*head_inputs(trainer.model, *batch), ref_logps, torch.tensor([1.0, 0, 1, 0]), **options)
    assert_same(ours.loss, theirs, trainer.model)


def test_ipo_on_sums_is_another_loss(dpo_trainer):
    """The two forms differ on these pairs, so that the test above can tell them apart."""
    trainer = dpo_trainer("ipo")
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, inputs)
    batch = interleaved(inputs)
    logps, ref_logps = (sequence_logps_of(model, *batch) for model in (trainer.model, trainer.ref_model))
    assert abs(losses.ipo_loss(logps, ref_logps, torch.tensor([1.0, 0, 1, 0]), beta=BETA) - theirs) > 0.1


# Groups sampled by the trainer


@pytest.fixture
def rloo(tokenizer, tmp_path):
    """A trainer whose policy has left its reference, two groups of four that it sampled and scored, and the rewards."""
    rewards = []

    def reward(completions, **_) -> list[float]:
        rewards.extend(text.count("a") - 0.5 * text.count("b") + 0.01 * len(text) for text in completions)
        return rewards

    # TRL loads the reference policy from where the policy came from.
    policy, origin = tiny_model(0), tmp_path / "reference"
    tiny_model(1).save_pretrained(origin)
    policy.config._name_or_path = str(origin)
    sizes = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=6)
    config = RLOOConfig(output_dir=str(tmp_path / "out"), beta=BETA, **sizes, **QUIET)
    rows = Dataset.from_dict(dict(prompt=["a b c", "d e"]))
    trainer = RLOOTrainer(policy, reward, config, train_dataset=rows, processing_class=tokenizer)
    examples = [{"prompt": prompt} for prompt in rows["prompt"] for _ in range(4)]
    return trainer, trainer._generate_and_score_completions(examples), torch.tensor(rewards)


def rloo_batch(inputs) -> tuple:
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    return input_ids, mask, labels


def test_rloo_at_the_sampling_policy(rloo):
    """Their gradient is that of rloo_loss, which is that of copg_loss."""
    trainer, inputs, rewards = rloo
    theirs = trainer.compute_loss(trainer.model, inputs)
    batch = rloo_batch(inputs)
    ref_logps = sequence_logps_of(trainer.ref_model, *batch)
    expected = gradients(theirs, trainer.model)
    assert rewards.view(2, 4).std(1).min() > 0 and max(g.abs().max() for g in expected) > 0.01
    for loss in (losses.rloo_loss, copg_loss):
        head = head_inputs(trainer.model, *batch)
        ours = linear_sequence_loss(*head, ref_logps, rewards, loss=loss, beta=BETA, group_size=4)
        assert_same_gradients(gradients(ours.loss, trainer.model), expected)


def test_rloo_after_steps_is_the_clipped_ratio(rloo):
    """Past the sampling policy TRL's RLOO is ppo_loss, in value and gradient; some of the ratios here are clipped."""
    trainer, inputs, rewards = rloo
    batch = rloo_batch(inputs)
    ref_logps, old_logps = (sequence_logps_of(model, *batch) for model in (trainer.ref_model, trainer.model))
    torch.testing.assert_close(old_logps, inputs["old_logps"], rtol=1e-5, atol=1e-5)
    for parameter in trainer.model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    ratio = (sequence_logps_of(trainer.model, *batch) - old_logps).exp()
    assert 0 < ((ratio - 1).abs() > trainer.epsilon_low).sum() < 8

    def clipped(logps, ref_logps, rewards, **options):
        return losses.ppo_loss(logps, ref_logps, rewards, old_logps=old_logps, clip=trainer.epsilon_low, **options)

    theirs = trainer.compute_loss(trainer.model, inputs)
    head = head_inputs(trainer.model, *batch)
    ours = linear_sequence_loss(*head, ref_logps, rewards, loss=clipped, beta=BETA, group_size=4)
    assert_same(ours.loss, theirs, trainer.model)
