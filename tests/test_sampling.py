"""train/sampling.py: draws follow the model's softmax, whatever generation settings the model came with."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from train.sampling import sample_completions  # noqa: E402

EOS_ID, PAD_ID, VOCAB = 1, 0, 20


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5,
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    # What instruction-tuned models ship: followed, it would bias every gradient.
    model.generation_config.top_p, model.generation_config.repetition_penalty = 0.3, 2.0
    return model


def draw(model, prompts, **options):
    options = {"num_samples": 4, "max_new_tokens": 8, "seed": 0} | options
    return sample_completions(model, prompts, eos_id=EOS_ID, pad_id=PAD_ID, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(model, temperature):
    prompt, other, num = [2, 3, 4], [5] * 9, 20_000
    samples = draw(model, [prompt, other], num_samples=num, max_new_tokens=1, temperature=temperature)[0]
    drawn = torch.bincount(torch.tensor(samples).flatten(), minlength=VOCAB) / num
    expected = (model.eval()(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    assert expected.max() > 0.12  # far from uniform
    assert (drawn - expected).abs().max() < 5 * 0.5 / num**0.5


def test_completions_end_with_their_first_eos(model):
    samples = [ids for group in draw(model, [[2], [3, 4]], num_samples=50) for ids in group]
    assert all(EOS_ID not in ids[:-1] for ids in samples)
    assert all(ids[-1] == EOS_ID or len(ids) == 8 for ids in samples)
    assert any(len(ids) == 8 for ids in samples) and any(len(ids) < 8 for ids in samples)


def test_the_seed_is_all_that_draws_depend_on(model):
    model.train()
    first = draw(model, [[2], [3, 4]])
    torch.rand(7)
    state = torch.get_rng_state()
    assert draw(model, [[2], [3, 4]]) == first != draw(model, [[2], [3, 4]], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.generation_config.top_p == 0.3
