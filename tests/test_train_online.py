"""Online training: samples of the policy, the user's reward function, and a resume that draws the same samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_models import (
    arguments,
    assert_same_checkpoint,
    begun_run,
    needs_peft,
    refusal,
    save_tiny_model,
    step_records,
    write_rows,
)
from train import checkpoint, run, step
from train.batch import Group
from train.data import Example, read_examples
from train.online import draw_seed, evaluate_samples, next_groups, sample_statistics
from train.scoring import RewardError, load_reward, score
from train.state import policy_logps, reference_logps

pytestmark = pytest.mark.usefixtures("one_thread")

REWARDS = """
CALLS = []


def share_of_e(prompt, completions, letter, **row):
    CALLS.append((prompt, completions, letter, row))
    return [text.count(letter) / max(1, len(text)) for text in completions]


def low_bytes(prompt, completions, **row):
    return [sum(ord(c) < 110 for c in text) / 12 for text in completions]


def raises(prompt, completions, **row):
    raise KeyError("unit tests")


def raises_later(prompt, completions, **row):
    CALLS.append(prompt)
    if len(CALLS) > 9:
        raise KeyError("unit tests")
    return [0.5] * len(completions)


def gives_nan(prompt, completions, **row):
    return [0.0, float("nan"), 1.0][: len(completions)]


def gives_one(prompt, completions, **row):
    return [1.0]


def gives_none(prompt, completions, **row):
    return None


NO_FUNCTION = 3
"""
ONLINE = ("--group-size", "3", "--max-completion-tokens", "6")


@pytest.fixture(autouse=True)
def rewards_module(tmp_path, monkeypatch):
    """A module in the current directory, as a user's would be."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    rows = [{"prompt": f"number {i}, red", "letter": "e", "id": i} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


def online(model: Path, prompts: Path, out: Path, *more: str, reward: str = "low_bytes") -> list[str]:
    return arguments(model, prompts, out, "--reward", f"my_rewards:{reward}", *ONLINE, *more)


def test_rows_keep_their_columns(prompts):
    example = read_examples(prompts, online=True)[3]
    assert example == Example("number 3, red", [], [], {"letter": "e", "id": 3})


def test_the_reward_function_gets_what_it_needs(tmp_path, model, prompts):
    run_ = begun_run(model, prompts, tmp_path / "out", "--reward", "my_rewards:share_of_e", *ONLINE)
    groups = next_groups(run_)
    import my_rewards

    assert len(my_rewards.CALLS) == len(groups) == 3
    for group, (prompt, completions, letter, row) in zip(groups, my_rewards.CALLS, strict=True):
        assert run_.tokenizer.decode(group.prompt_ids) == prompt and letter == "e" and row.keys() == {"id"}
        texts = [run_.tokenizer.decode(ids, skip_special_tokens=True) for ids in group.completion_ids]
        assert completions == texts and "<eos>" not in "".join(texts)
        assert group.rewards == [text.count("e") / max(1, len(text)) for text in texts]


@pytest.mark.parametrize("flags", [(), pytest.param(("--lora-rank", "4"), marks=needs_peft)], ids=["whole", "adapters"])
def test_samples_carry_both_log_probs(tmp_path, model, prompts, flags):
    """After a few steps the policy is no longer the reference, and both are asked about the same samples."""
    command = (*ONLINE, "--lr", "1e-2", "--beta", "0.01", *flags)
    run_ = begun_run(model, prompts, tmp_path / "out", "--reward", "my_rewards:low_bytes", *command)
    for _ in range(3):
        run.train_step(run_)
    groups = next_groups(run_)
    old = torch.tensor([logp for group in groups for logp in group.old_logps])
    ref = torch.tensor([logp for group in groups for logp in group.ref_logps])
    assert torch.equal(old, policy_logps(run_, groups)) and torch.equal(ref, reference_logps(run_, groups))
    untrained = begun_run(model, prompts, tmp_path / "fresh", "--reward", "my_rewards:low_bytes", *ONLINE)
    torch.testing.assert_close(ref, policy_logps(untrained, groups), atol=1e-5, rtol=0)
    assert (old - ref).abs().max() > 1e-2


def test_statistics_by_hand(tmp_path, model, prompts):
    run_ = begun_run(model, prompts, tmp_path / "out", "--reward", "my_rewards:low_bytes", *ONLINE)
    groups = [
        Group([5], [[7, 1], [8, 9, 9]], [1.0, 0.0], ref_logps=(-3.0, -5.0), old_logps=(-2.0, -7.0)),
        Group([5], [[1], [7, 7]], [0.5, 0.5], ref_logps=(-1.0, -1.0), old_logps=(-1.0, -2.0)),
    ]
    expected = {"reward": 0.5, "kl": -2 / 4, "entropy": 12 / 8, "length": 2.0, "truncated": 0.5}
    assert sample_statistics(run_, groups) == expected


def test_the_reward_rises(tmp_path, model, prompts):
    """Half of a random model's bytes are below 110; a few dozen steps make that most of them."""
    command = online(model, prompts, tmp_path / "out", "--steps", "40", "--lr", "1e-2", "--beta", "0.01")
    assert run.main([*command, "--eval-every", "20"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "evaluated_at" in line]
    assert [line["evaluated_at"] for line in evaluations] == [0, 20, 40]
    assert evaluations[0]["heldout_kl"] == pytest.approx(0, abs=1e-5)
    records = step_records(tmp_path / "out")
    first, last = (sum(r["reward"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last > first + 0.1 and records[-1]["kl"] > 0.1
    # An estimate from samples, so it may come out above the largest entropy there is.
    assert records[0]["entropy"] == pytest.approx(math.log(320), abs=0.1)
    assert 0 < records[-1]["entropy"] < records[0]["entropy"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--sync-every", "3", "--loss", "ppo"),
        pytest.param(("--lora-rank", "4", "--loss", "rebel"), marks=needs_peft),
        ("--loss", "reinforce", "--micro-batch", "4"),
    ],
    ids=["ppo", "adapters", "reinforce"],
)
def test_resume_is_bit_identical(tmp_path, model, prompts, flags):
    """The first half ends between two samplings: what was sampled for later steps is in the checkpoint."""
    run.main(online(model, prompts, tmp_path / "whole", "--steps", "7", *flags))
    run.main(online(model, prompts, tmp_path / "halves", "--steps", "4", *flags))
    run.main(online(model, prompts, tmp_path / "halves", "--steps", "7", "--resume", *flags))
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halves")
    assert step_records(tmp_path / "whole") == step_records(tmp_path / "halves")


def test_the_baseline_is_the_mean_of_earlier_rewards(tmp_path, model, prompts, monkeypatch):
    baselines = []
    step_loss = step.step_loss

    def recorded(config, batch, baseline):
        baselines.append(baseline)
        return step_loss(config, batch, baseline)

    monkeypatch.setattr(step, "step_loss", recorded)
    run.main(online(model, prompts, tmp_path / "out", "--steps", "3", "--loss", "reinforce"))
    rewards = [record["reward"] for record in step_records(tmp_path / "out")]
    assert baselines == pytest.approx([rewards[0], rewards[0], (rewards[0] + rewards[1]) / 2])


def test_samples_stand_until_the_next_sampling(tmp_path, model, prompts):
    run_ = begun_run(model, prompts, tmp_path, "--reward", "my_rewards:low_bytes", "--sync-every", "2", *ONLINE)
    first = run.train_step(run_)
    (waiting,) = run_.sampled
    second = run.train_step(run_)
    assert first["kl"] == second["kl"] == pytest.approx(0, abs=1e-5)  # both are of the policy before any step
    assert second["mean_log_ratio"] != second["kl"] and run_.sampled == []
    assert [group.rewards for group in waiting] and run.train_step(run_)["kl"] != 0


def test_evaluation_changes_nothing(tmp_path, model, prompts):
    run_ = begun_run(model, prompts, tmp_path / "out", "--reward", "my_rewards:low_bytes", *ONLINE)
    state = torch.get_rng_state()
    assert evaluate_samples(run_) == evaluate_samples(run_)
    assert torch.equal(state, torch.get_rng_state())
    seeds = {draw_seed(seed, step, stream) for seed in range(3) for step in range(50) for stream in range(2)}
    assert len(seeds) == 300


# Bad input


def test_reward_functions_that_fail_name_the_prompt():
    example = Example("what is red?", [], [], {"letter": "e"})
    failing = {
        "raises": "raised KeyError: 'unit tests' for the prompt 'what is red?'",
        "gives_nan": "gave nan to 'b' for the prompt 'what is red?'",
        "gives_one": "gave 1 rewards for 3 completions for the prompt 'what is red?'",
        "gives_none": "raised TypeError",
    }
    for name, message in failing.items():
        with pytest.raises(RewardError) as error:
            score(load_reward(f"my_rewards:{name}"), example, ["a", "b", "c"])
        assert message in str(error.value)


def test_a_reward_function_that_fails_later_leaves_the_checkpoint(tmp_path, model, prompts, capsys):
    """Four held-out prompts, three of the first step, then two of the second."""
    command = online(model, prompts, tmp_path / "out", "--checkpoint-every", "1", reward="raises_later")
    assert run.main(command) == 1
    assert "the reward function raised KeyError: 'unit tests' for the prompt 'number" in capsys.readouterr().err
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == ["step-00000001"]
    import my_rewards

    my_rewards.CALLS.clear()
    assert run.main([*command, "--resume", "--steps", "2"]) == 0


BAD_REWARDS = {
    "must be module:function, got 'my_rewards'": "my_rewards",
    "No module named 'nowhere'": "nowhere:reward",
    "my_rewards has no function 'missing'": "my_rewards:missing",
    "my_rewards has no function 'NO_FUNCTION'": "my_rewards:NO_FUNCTION",
}


@pytest.mark.parametrize(("message", "name"), BAD_REWARDS.items(), ids=BAD_REWARDS.keys())
def test_bad_rewards_are_refused(tmp_path, model, prompts, capsys, message, name):
    assert message in refusal(capsys, arguments(model, prompts, tmp_path / "out", "--reward", name))
    assert not (tmp_path / "out").exists()


def test_a_warm_up_needs_completions(tmp_path, model, prompts, capsys):
    command = online(model, prompts, tmp_path / "out", "--sft-steps", "2")
    assert "--sft-steps 2 needs completions" in refusal(capsys, command)


def test_an_online_run_is_no_input_of_the_benchmark(tmp_path, model, prompts):
    from bench.trained import trained_inputs

    run.main(online(model, prompts, tmp_path / "out", "--steps", "1"))
    with pytest.raises(ValueError, match="was trained online: its held-out prompts have no completions"):
        trained_inputs(tmp_path / "out")


def test_offline_rows_need_completions(tmp_path, model, prompts, capsys):
    assert "prompts.jsonl:1: missing key 'completions'" in refusal(capsys, arguments(model, prompts, tmp_path / "out"))
