"""train/summarize.py: its parts against hand values, and the whole experiment at a size that takes seconds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from train import summarize
from train.batch import Group, pack
from train.documents import Document, Splits, others, read_documents, to_document
from train.laboratory import Laboratory, evaluate
from train.model import EOS_ID, PAD_ID, train_tokenizer
from train.offline import offline_pairs
from train.optimize import descend
from train.policy import completion_logps, new_policy
from train.preferences import KINDS, preference_pairs
from train.reward_model import accuracy, bradley_terry_loss, fit_reward_model, new_reward_model, score
from train.summarize_report import spread
from train.summarize_report import summarize as summarize_runs
from train.summarize_settings import SIZES
from train.sweep import METHODS, Job, policy_loss, train_policy, unregularized_rloo_loss

MICRO = replace(SIZES["micro"], data_prompts=6)
COLOURS = ("red", "green", "blue", "white", "black", "grey")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"this text is about {colour} things" for colour in COLOURS], 300)


@pytest.fixture(scope="module")
def documents(tokenizer) -> list[Document]:
    return [to_document(tokenizer, f"this text is about {word}", f"{word} things", MICRO) for word in COLOURS]


@pytest.fixture(scope="module")
def lab(tokenizer, documents) -> Laboratory:
    """A policy and a reward model with random weights, and offline data of two seeds."""
    reference = new_policy(MICRO, tokenizer)
    reward_model = new_reward_model(reference)
    torch.nn.init.normal_(reward_model.classifier.weight)
    offline = {seed: offline_pairs(documents, reference, reward_model, MICRO, seed) for seed in (0, 1)}
    return Laboratory(MICRO, tokenizer, reference, reward_model, documents, documents, offline)


@pytest.fixture(scope="module")
def folder(lab, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("laboratory")
    lab.save(path)
    return path


# Documents and preferences


def test_documents_keep_the_beginning_and_end_in_a_newline(tokenizer):
    settings = replace(MICRO, max_prompt_tokens=4, max_completion_tokens=3)
    document = to_document(tokenizer, "this text is about red things and more", "red things", settings)
    assert tokenizer.decode(document.prompt_ids) == "this text is\n"
    assert len(document.summary_ids) == 3 and tokenizer.decode(document.summary_ids[:1]) in "red"
    whole = to_document(tokenizer, "this text", "red things", MICRO)
    assert whole.summary_ids[-1] == EOS_ID and tokenizer.decode(whole.summary_ids[:-1]) == "red things"


def test_splits_are_disjoint(tmp_path):
    _, splits = read_documents(SIZES["micro"])
    assert [len(splits.validation), len(splits.test)] == [8, 12]
    prompts = [tuple(document.summary_ids) for split in splits for document in split]
    assert isinstance(splits, Splits) and len(set(prompts)) == len(prompts)


def test_too_few_docstrings_are_refused():
    with pytest.raises(ValueError, match="docstrings are too few"):
        read_documents(replace(SIZES["micro"], files_per_package=2))


def test_another_document_is_never_the_same(documents):
    for seed in range(5):
        found = others(documents, random.Random(seed))
        assert all(a is not b for a, b in zip(documents, found, strict=True))
        assert sorted(d.summary for d in found) == sorted(f"{colour} things" for colour in COLOURS)


def test_preference_pairs_by_hand(tokenizer, documents):
    """Of the samples the second shares a word with the true line; in the last document neither does."""
    bad, good = tokenizer.encode("text is").ids, tokenizer.encode("text things").ids + [EOS_ID]
    samples = [[bad, good]] * 5 + [[bad, bad]]
    pairs = preference_pairs(documents, samples, tokenizer, seed=0)
    assert tuple(pairs) == KINDS and [len(pairs[kind]) for kind in KINDS] == [6, 6, 5]
    summaries = [document.summary_ids for document in documents]
    for document, other, sampled in zip(documents, *(pairs[kind] for kind in KINDS[:2]), strict=True):
        assert other.prompt_ids == sampled.prompt_ids == document.prompt_ids
        assert other.completion_ids[0] == sampled.completion_ids[0] == document.summary_ids
        assert other.completion_ids[1] in summaries and other.completion_ids[1] != document.summary_ids
        assert sampled.completion_ids[1] in (bad, good)
    assert all(pair.completion_ids == [good, bad] and pair.rewards == [1.0, 0.0] for pair in pairs[KINDS[2]])


# The reward model


def test_bradley_terry_by_hand():
    better, worse = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.0, 1.0]).double()
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert bradley_terry_loss(better, worse).item() == pytest.approx(expected, rel=1e-12)
    assert bradley_terry_loss(worse, worse).item() == pytest.approx(math.log(2), rel=1e-12)


def test_score_is_the_mean_over_completion_tokens_whatever_the_batch(lab, documents):
    """One sequence at a time, without padding, and the mean taken by hand."""
    groups = [Group(documents[0].prompt_ids, [documents[0].summary_ids, documents[1].summary_ids[:1]], [0.0, 0.0])]
    for reward, ids in zip(score(lab.reward_model, groups, MICRO), groups[0].completion_ids, strict=True):
        token_scores = lab.reward_model(torch.tensor([groups[0].prompt_ids + ids])).logits[0, :, 0]
        assert reward.item() == pytest.approx(token_scores[-len(ids) :].mean().item(), abs=1e-5)


def test_reward_model_learns_a_preference(tokenizer, documents):
    pairs = {
        "kind": [Group(d.prompt_ids, [d.summary_ids, d.prompt_ids[:3]], [1.0, 0.0]) for d in documents],
        "none": [],
    }
    model = new_reward_model(new_policy(MICRO, tokenizer))
    assert score(model, pairs["kind"], MICRO).abs().max() == 0
    losses = fit_reward_model(model, pairs, replace(MICRO, reward_epochs=20, reward_batch=4))
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.3
    assert accuracy(model, pairs["kind"], MICRO) == 1.0 and accuracy(model, [], MICRO) is None


# Offline data and policies


def test_offline_pairs_hold_every_source(lab, documents):
    pairs = lab.offline[0]
    assert len(pairs) == 2 * MICRO.data_prompts and lab.offline[1] != pairs
    for document in documents:
        found = [ids for pair in pairs if pair.prompt_ids == document.prompt_ids for ids in pair.completion_ids]
        lines = [ids for ids in found if ids in [d.summary_ids for d in documents]]
        assert len(found) == 4 and document.summary_ids in lines and len(lines) >= 2
    rewards = score(lab.reward_model, pairs, MICRO).tolist()
    assert [reward for pair in pairs for reward in pair.rewards] == pytest.approx(rewards)
    logps = completion_logps(lab.reference, pairs, MICRO).tolist()
    assert [logp for pair in pairs for logp in pair.ref_logps] == pytest.approx(logps)


def test_completion_logps_by_hand(lab, documents):
    document = documents[2]
    logits = lab.reference(torch.tensor([document.prompt_ids + document.summary_ids])).logits[0].double()
    chosen = logits.log_softmax(-1)[len(document.prompt_ids) - 1 : -1].gather(
        1, torch.tensor(document.summary_ids)[:, None]
    )
    group = Group(document.prompt_ids, [document.summary_ids, [EOS_ID]], [0.0, 0.0])
    assert completion_logps(lab.reference, [group], MICRO)[0].item() == pytest.approx(chosen.sum().item(), abs=1e-4)


def test_kl_of_the_reference_is_zero_and_of_another_policy_is_not(lab, documents):
    point = evaluate(lab.reference, lab, documents, seed=3)
    assert point["kl"] == 0.0 and 1 <= point["length"] <= MICRO.max_completion_tokens
    other = new_policy(MICRO, lab.tokenizer)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(3)
    assert evaluate(other, lab, documents * 4, seed=3)["kl"] > 0


def gradient(lab: Laboratory, method: str, beta: float | None) -> torch.Tensor:
    """Of the method's loss on seed 0's pairs, at a policy away from the reference, where the KL part is not zero."""
    policy = new_policy(MICRO, lab.tokenizer)
    with torch.no_grad():
        policy.transformer.wte.weight.mul_(1.5)
    batch = pack(lab.offline[0], PAD_ID, torch.device("cpu"))
    policy_loss(policy, batch, Job(method, beta, seed=0), MICRO).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def test_rloo_has_the_gradient_of_copg(lab):
    copg, rloo = gradient(lab, "CoPG", 0.3), gradient(lab, "RLOO", 0.3)
    assert (copg - rloo).norm() < 1e-5 * copg.norm()
    others = [gradient(lab, name, 0.3) for name in METHODS if name not in ("CoPG", "RLOO")]
    assert all((copg - other).norm() > 1e-2 * copg.norm() for other in others)


def test_rloo_without_beta_by_hand():
    """Rewards 3 and 1 of a pair: each against the other, and minus a half for the mean over the pair."""
    logps = torch.tensor([-4.0, -7.0], requires_grad=True)
    numbers = (logps, torch.tensor([9.0, 2.0]), torch.tensor([3.0, 1.0]))
    unregularized_rloo_loss(*numbers, beta=5.0, group_size=2).backward()
    assert logps.grad.tolist() == [-1.0, 1.0]


def test_averaged_loss_is_that_of_averaged_log_probs(lab):
    """The value by hand: log-ratios divided by the completion's tokens, then half the pair's squared difference."""
    policy = new_policy(MICRO, lab.tokenizer)
    with torch.no_grad():
        policy.transformer.wte.weight.mul_(1.5)
    pairs, beta = lab.offline[0], 2.0
    lengths = torch.tensor([len(ids) for pair in pairs for ids in pair.completion_ids])
    ref_logps = torch.tensor([logp for pair in pairs for logp in pair.ref_logps])
    rewards = torch.tensor([reward for pair in pairs for reward in pair.rewards])
    regularized = rewards - beta * (completion_logps(policy, pairs, MICRO) - ref_logps) / lengths
    first, second = regularized.double().view(-1, 2).unbind(1)
    batch = pack(pairs, PAD_ID, torch.device("cpu"))
    loss = policy_loss(policy, batch, Job("CoPG, averaged", beta, seed=0), MICRO)
    assert loss.item() == pytest.approx(((first - second) ** 2).mean().item() / (4 * beta), rel=1e-4)


def test_a_job_repeats_and_its_seed_matters(folder):
    records = [train_policy(folder, Job("CoPG", 0.3, seed)) for seed in (0, 0, 1)]
    assert records[0] == records[1] and records[0]["test"] != records[2]["test"]
    assert [point["step"] for point in records[0]["points"]] == [1, 2]


def test_bfloat16_trains_and_starts_at_the_reference(lab, documents, tmp_path):
    """The precision of the size for a GPU, on the CPU: log-ratios start at zero here too."""
    settings = replace(MICRO, dtype="bfloat16")
    offline = {0: offline_pairs(documents, lab.reference, lab.reward_model, settings, 0)}
    half = replace(lab, settings=settings, offline=offline)
    assert evaluate(half.reference, half, documents, seed=0)["kl"] == 0.0
    half.save(tmp_path)
    record = train_policy(tmp_path, Job("CoPG", 0.3, 0))
    assert math.isfinite(record["test"]["reward"]) and record["test"]["kl"] != 0.0


def test_schedules_of_the_learning_rate():
    """With a constant gradient AdamW moves by the learning rate at each step."""
    weight = torch.nn.Linear(1, 1, bias=False)
    moves = {}
    for to_zero in (False, True):
        torch.nn.init.zeros_(weight.weight)
        places = [
            weight.weight.item()
            for _ in descend(weight, lambda _: weight.weight.sum(), steps=20, lr=0.1, to_zero=to_zero)
        ]
        moves[to_zero] = [a - b for a, b in zip([0.0, *places], places, strict=False)]
    assert moves[False][:2] == pytest.approx([0.0, 0.05]) and moves[False][2:] == pytest.approx([0.1] * 18)
    assert moves[True][2] == pytest.approx(0.1) and moves[True][-1] == pytest.approx(0.0, abs=2e-3)


# The report


def fake_run(method: str, beta: float | None, seed: int, validation: float, test: float) -> dict:
    measures = {"kl": 1.0, "length": 5.0, "overlap": 0.1}
    point = {"step": 10, "reward": validation} | measures
    return {"method": method, "beta": beta, "seed": seed, "points": [point], "test": {"reward": test} | measures}


def test_summary_by_hand():
    """The best beta is the validation prompts' choice, the reward the test prompts'; differences are within a seed."""
    runs = [fake_run("CoPG", 0.1, seed, 1.0, 5.0) for seed in (0, 1)]
    runs += [fake_run("CoPG", 1.0, 0, 2.0, 3.0), fake_run("CoPG", 1.0, 1, 2.0, 4.0)]
    runs += [fake_run("RLOO", 1.0, 0, 2.0, 3.0), fake_run("RLOO", 1.0, 1, 2.0, 3.5)]
    reference = [fake_run("reference", None, seed, 0.0, seed) for seed in (0, 1)]
    summary = summarize_runs(runs[::-1], reference)
    assert summary["best_beta"] == {"CoPG": 1.0, "RLOO": 1.0}
    assert summary["copg_minus_reference"] == {"mean": 3.0, "se": 0.0}
    assert summary["rloo_minus_copg"] == 0.5
    assert spread([1.0, 3.0]) == {"mean": 2.0, "se": 1.0} and spread([1.0]) == {"mean": 1.0, "se": None}


# The script


def test_experiment_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    assert summarize.main(["--size", "micro", "--seeds", "2", "--betas", "0.3", "--out", str(out)]) == 0
    names = ["averaging.png", "results.json", "reward-kl.png", "reward-step.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    results = json.loads((out / "results.json").read_text())
    assert {"provenance", "size", "seeds", "settings", "seconds", "prepared", "summary", "runs"} <= results.keys()
    assert {"commit", "versions", "command"} <= results["provenance"].keys()
    assert {kind for kind in results["prepared"]["reward_model"]["heldout_accuracy"]} == set(KINDS)
    assert sorted({run["method"] for run in results["runs"]}) == sorted(METHODS)
    assert len(results["runs"]) == 2 * len(METHODS)
    assert all(record["test"]["kl"] == 0.0 for record in results["reference"])
    averaged = next(run for run in results["runs"] if run["method"] == "CoPG, averaged")
    assert averaged["beta"] == pytest.approx(0.3 * results["prepared"]["offline"]["mean_length"])
    assert results["summary"]["rloo_minus_copg"] < 0.05
    assert "RAFT" in capsys.readouterr().out


BAD_FLAGS = {
    "--seeds must be positive, got 0": ["--seeds", "0"],
    "--betas must be positive and finite, got 0.0": ["--betas", "0.1", "0"],
    "--betas must be positive and finite, got nan": ["--betas", "nan"],
    "--betas must differ from each other": ["--betas", "0.1", "0.1"],
    "--processes must be positive, got -1": ["--processes", "-1"],
    "--out must name a folder": ["--out", ""],
    "invalid choice: 'large'": ["--size", "large"],
}


@pytest.mark.parametrize(("message", "flags"), BAD_FLAGS.items(), ids=BAD_FLAGS.keys())
def test_bad_flags(tmp_path, capsys, message, flags):
    with pytest.raises(SystemExit) as error:
        summarize.main(["--size", "micro", "--out", str(tmp_path / "out"), *flags])
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_size_for_a_gpu_needs_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        summarize.main(["--size", "small", "--out", str(tmp_path / "out")])
    assert "--size small needs a CUDA device" in capsys.readouterr().err
