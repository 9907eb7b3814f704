"""train/run.py: the data format, the packed batch, both heads' gradients, checkpoints and exact resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from train import checkpoint, run, start
from train.batch import Group, pack, split_heldout, step_indices, tokenize
from train.config import Config, build_parser, parse_config
from train.data import Example, parse_example, read_jsonl, write_jsonl
from train.docstrings import docstring_examples, is_told_by, split_docstring
from train.model import EOS, EOS_ID, PAD, PAD_ID, head_operands, train_tokenizer
from train.objective import (
    fused_objective,
    head_difference,
    reference_objective,
    reward_margin,
    step_loss,
)
from train.reward import token_f1
from train.state import Run, pack_for, policy_logps

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = (
    "--device cpu --heldout-prompts 4 --vocab-size 300 --hidden-size 16 --num-layers 1 --num-heads 2 "
    "--max-prompt-tokens 24 --max-completion-tokens 12 --sft-steps 2 --prompts-per-step 3 --lr 1e-2"
).split()
COLOURS = ("red", "green", "blue", "white", "black")


def colour_examples(count: int) -> list[Example]:
    """Prompts that name a colour; the completion that repeats it is the good one. Groups of two and three."""
    examples = []
    for i in range(count):
        colour, *others = COLOURS[i % 5 :] + COLOURS[: i % 5]
        completions = [f"it is {word}" for word in (others[0], colour, others[1])][: 2 + i % 2]
        rewards = [float(completion.endswith(colour)) for completion in completions]
        examples.append(Example(f"number {i}, {colour}\n", completions, rewards))
    return examples


def write_colours(path: Path) -> Path:
    write_jsonl(path, colour_examples(20))
    return path


def write_triples(path: Path) -> Path:
    """Groups of three, of different lengths."""
    examples = [example for example in colour_examples(40) if len(example.completions) == 3]
    write_jsonl(path, [Example(e.prompt, [*e.completions[:2], "it " * 4], e.rewards) for e in examples])
    return path


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "colours.jsonl")


def tiny_arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [*TINY, "--data", str(data), "--out", str(out), *more]


def tiny_config(data: Path, out: Path, *more: str) -> Config:
    return parse_config(build_parser(""), tiny_arguments(data, out, *more))


def tiny_run(data: Path, out: Path, *more: str) -> Run:
    config = tiny_config(data, out, *more)
    return start.start_run(config, *start.load_data(config), CPU)


def step_records(out: Path) -> list[dict]:
    """What the log says about each step, without the clock's and the memory's part of it."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_s", "peak_mib")}
        for line in lines
        if "step" in line
    ]


def final_checkpoint(out: Path) -> tuple[bytes, dict]:
    folder = checkpoint.checkpoints(out)[-1]
    return (folder / "model.safetensors").read_bytes(), checkpoint.load_state(folder)["optimizer"]


def assert_same_checkpoint(out: Path, other: Path) -> None:
    (weights, optimizer), (other_weights, other_optimizer) = final_checkpoint(out), final_checkpoint(other)
    assert weights == other_weights
    for index, moments in optimizer["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, other_optimizer["state"][index][name]), (index, name)


# Data and reward


def test_token_f1_by_hand():
    # One of two words is shared with a truth of three: precision 1/2, recall 1/3, so 2 * 1/6 / (5/6).
    assert token_f1("Return ones", "Return the shape.") == pytest.approx(2 / 5)
    assert token_f1("RETURN, the shape", "Return the shape.") == 1.0
    assert token_f1("nothing in common", "Return the shape.") == 0.0
    # A repeated word counts as often as the truth has it: one shared of 3 + 3.
    assert token_f1("the the the", "Return the shape.") == pytest.approx(2 * 1 / 6)
    assert token_f1("!", "?") == 0.0


def test_jsonl_round_trip(tmp_path):
    examples = [
        Example("a\nb", ["x", "ü \u2028"], [1.0, -0.5]),
        Example("c", ["1", "2", "3"], [0.0, 1.0, 2.0]),
    ]
    write_jsonl(tmp_path / "data.jsonl", examples)
    assert read_jsonl(tmp_path / "data.jsonl") == examples


def test_integers_are_rewards_and_other_keys_are_ignored():
    line = b'{"id": 7, "prompt": "p", "completions": ["a", "b"], "rewards": [1, 0]}'
    assert parse_example(line) == Example("p", ["a", "b"], [1.0, 0.0])


GOOD = {"prompt": "p", "completions": ["a", "b"], "rewards": [1, 0]}
BAD_LINES = {
    "not a JSON line": b"{prompt: 1}",
    "not a JSON line: 'utf-8'": b'{"prompt": "\xff"}',
    "expected a JSON object, got list": b"[1, 2]",
    "missing key 'rewards'": b'{"prompt": "p", "completions": ["a", "b"]}',
    "missing key 'prompt'": b'{"completions": ["a", "b"], "rewards": [1, 0]}',
    "prompt must be a non-empty string, got 3": GOOD | {"prompt": 3},
    "prompt must be a non-empty string, got ''": GOOD | {"prompt": ""},
    "completions must be a list": GOOD | {"completions": "ab"},
    "completions[1] must be a string": GOOD | {"completions": ["a", None]},
    "completions[0] is empty": GOOD | {"completions": [" ", "b"]},
    "at least 2 completions, got 1": GOOD | {"completions": ["a"], "rewards": [1]},
    "2 completions but 3 rewards": GOOD | {"rewards": [1, 0, 1]},
    "rewards must be a list": GOOD | {"rewards": 1},
    "rewards[0] must be a number, got '1'": GOOD | {"rewards": ["1", 0]},
    "rewards[1] must be a number, got True": GOOD | {"rewards": [1, True]},
    "rewards[1] must be finite, got nan": GOOD | {"rewards": [1, math.nan]},
    "rewards[0] must be finite, got -inf": GOOD | {"rewards": [-math.inf, 1]},
    "rewards[0] must be finite, got inf": GOOD | {"rewards": [10**400, 1]},
}


@pytest.mark.parametrize(("message", "line"), BAD_LINES.items(), ids=BAD_LINES.keys())
def test_bad_line_is_named(tmp_path, message, line):
    path = tmp_path / "data.jsonl"
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no examples"):
        read_jsonl(tmp_path / "data.jsonl")


def test_split_docstring():
    body = "A body of more than a dozen words, over\n    two lines, that says what the function really does."
    assert split_docstring(f"A summary line.\n\n{body}") == (" ".join(body.split()), "A summary line.")
    assert split_docstring(f"A summary\nof two lines.\n\n{body}") is None
    assert split_docstring("A summary line.\n\nToo short.") is None


def test_a_body_tells_its_summary():
    assert is_told_by("Concatenates along an axis the arrays given", "Join arrays along an axis.")
    assert not is_told_by("See the other function for its parameters", "Join arrays along an axis.")
    assert not is_told_by("the a an of", "Get it.")


def test_docstring_examples_are_deterministic(monkeypatch):
    monkeypatch.setattr("train.docstrings.PACKAGES", ())
    monkeypatch.setattr("train.docstrings.FILES_PER_PACKAGE", 40)
    examples = docstring_examples(num_prompts=5, group_size=3, seed=1)
    assert examples == docstring_examples(num_prompts=5, group_size=3, seed=1)
    assert examples != docstring_examples(num_prompts=5, group_size=3, seed=2)
    assert len(examples) == 5
    for example in examples:
        assert len(set(example.completions)) == 3 and example.rewards.count(1.0) == 1
        truth = example.completions[example.rewards.index(1.0)]
        assert example.rewards == [token_f1(line, truth) for line in example.completions]
        assert example.prompt.count("\n") == 1 and truth not in example.prompt.split("\n")


# Batches


def test_tokenize_ends_completions_and_counts_cuts():
    tokenizer = train_tokenizer(["some words to learn from"], vocab_size=300)
    examples = [Example("ab", ["x", "yyy" * 9], [0.0, 1.0]), Example("0123456789", ["x", "y"], [0.0, 1.0])]
    groups, num_cut = tokenize(examples, tokenizer, EOS_ID, max_prompt=4, max_completion=6)
    assert num_cut == 2
    assert tokenizer.decode(groups[0].prompt_ids) == "ab" and tokenizer.decode(groups[1].prompt_ids) == "6789"
    assert groups[0].completion_ids[0][-1] == EOS_ID and tokenizer.decode(groups[0].completion_ids[0]) == "x"
    assert len(groups[0].completion_ids[1]) == 6 and EOS_ID not in groups[0].completion_ids[1]


def test_every_string_has_tokens():
    tokenizer = train_tokenizer(["ascii only"], vocab_size=300)
    assert tokenizer.token_to_id(PAD) == PAD_ID and tokenizer.token_to_id(EOS) == EOS_ID
    for text in ("\n", "日本", "\x00", "🙂"):
        ids = tokenizer.encode(text).ids
        assert ids and tokenizer.decode(ids) == text


def test_pack_against_a_loop():
    groups = [
        Group([5, 6, 7], [[8, 9, 1], [10, 1]], [1.0, 0.0], (-3.0, -2.5)),
        Group([11], [[12, 1], [13, 14, 15, 16, 1], [17, 1]], [0.5, 0.25, 0.0], (-1.0, -2.0, -4.0)),
    ]
    batch = pack(groups, pad_id=0, device=CPU)
    row, labels, cu_seqlens = 0, [], [0]
    flat_positions = []
    for group in groups:
        for completion in group.completion_ids:
            sequence = group.prompt_ids + completion
            padding = [0] * (batch.input_ids.shape[1] - len(sequence))
            assert batch.input_ids[row].tolist() == sequence + padding
            assert batch.attention_mask[row].tolist() == [1] * len(sequence) + padding
            for place, token in enumerate(completion, start=len(group.prompt_ids)):
                labels.append(token)
                flat_positions.append(row * batch.input_ids.shape[1] + place - 1)
            cu_seqlens.append(len(labels))
            row += 1
    assert batch.labels.tolist() == labels and batch.positions.tolist() == flat_positions
    assert batch.cu_seqlens.tolist() == cu_seqlens and batch.cu_seqlens.dtype == torch.int32
    # The state in front of a label sits right before it in the sequences.
    assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.labels)
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5, 0.25, 0.0] and batch.ref_logps.tolist()[2] == -1.0


def test_groups_are_equal_or_ragged():
    pair, triple = Group([1], [[2], [3]], [0.0, 1.0]), Group([1], [[2], [3], [4]], [0.0, 1.0, 2.0])
    equal, ragged = pack([triple, triple], 0, CPU), pack([pair, triple, pair], 0, CPU)
    assert equal.cu_groups is None and equal.group_sizes == [3, 3]
    assert ragged.cu_groups.tolist() == [0, 2, 5, 7] and ragged.cu_groups.dtype == torch.int32


def test_an_epoch_visits_every_group_once():
    steps = [step_indices(step, num_groups=13, prompts_per_step=4, seed=0) for step in range(6)]
    assert all(len(indices) == 4 for indices in steps)
    first, second = steps[0] + steps[1] + steps[2], steps[3] + steps[4] + steps[5]
    assert len(set(first)) == len(set(second)) == 12 and first != second
    assert step_indices(5, 13, 4, 0) == steps[5]
    assert sorted(step_indices(9, num_groups=3, prompts_per_step=8, seed=0)) == [0, 1, 2]


def test_heldout_groups_are_not_trained_on():
    groups = [Group([i], [[1], [2]], [0.0, 1.0]) for i in range(12)]
    train, heldout = split_heldout(groups, heldout=100, seed=3)
    assert len(heldout) == 3 and sorted(g.prompt_ids[0] for g in train + heldout) == list(range(12))
    assert len(split_heldout(groups, heldout=2, seed=3)[1]) == 2


# Objective


def test_padding_and_neighbours_do_not_change_logps(colours, tmp_path):
    """Packed hidden states are those that each sequence has on its own, without padding."""
    run_ = tiny_run(colours, tmp_path)
    logps = policy_logps(run_, run_.train_groups[:4])
    row = 0
    for group in run_.train_groups[:4]:
        for completion in group.completion_ids:
            sequence = torch.tensor([group.prompt_ids + completion])
            with torch.no_grad():
                logits = run_.model(sequence).logits[0].double().log_softmax(-1)
            places = range(len(group.prompt_ids), sequence.shape[1])
            expected = sum(logits[place - 1, sequence[0, place]] for place in places)
            assert logps[row].item() == pytest.approx(expected.item(), abs=1e-4)
            row += 1


def test_fused_and_reference_agree(colours, tmp_path):
    """On ragged groups, away from the reference policy, for every parameter of the model."""
    run_ = tiny_run(colours, tmp_path)
    run.train_step(run_)
    batch = pack_for(run_, run_.train_groups[:6])
    assert batch.cu_groups is not None
    inputs = (*head_operands(run_.model, batch, torch.float32), batch, step_loss(run_.config, batch))
    difference = head_difference(run_.model, *inputs)
    assert difference.gradient <= 1e-5 and difference.loss <= 1e-5
    fused, reference = (f(*inputs) for f in (fused_objective, reference_objective))
    torch.testing.assert_close(fused.log_ratios.double(), reference.log_ratios, atol=1e-4, rtol=0)
    assert reference.log_ratios.abs().max() > 1e-2
    regularized = (batch.rewards - 0.1 * reference.log_ratios).split(batch.group_sizes)
    by_hand = sum(group.var() / (2 * 0.1) for group in regularized) / len(regularized)
    assert reference.loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_difference_sees_a_wrong_gradient(colours, tmp_path, monkeypatch):
    run_ = tiny_run(colours, tmp_path)
    batch = pack_for(run_, run_.train_groups[:4])
    inputs = (*head_operands(run_.model, batch, torch.float32), batch, step_loss(run_.config, batch))

    def off_by_a_thousandth(*args):
        return fused_objective(*args)._replace(loss=reference_objective(*args).loss * 1.001)

    monkeypatch.setattr("train.objective.fused_objective", off_by_a_thousandth)
    assert head_difference(run_.model, *inputs).gradient == pytest.approx(1e-3, rel=1e-2)


def test_both_heads_train_alike(colours, tmp_path):
    losses = {}
    for impl in ("fused", "reference"):
        arguments = tiny_arguments(colours, tmp_path / impl, "--steps", "8", "--impl", impl)
        assert run.main(arguments) == 0
        losses[impl] = [record["loss"] for record in step_records(tmp_path / impl)]
    assert losses["fused"] == pytest.approx(losses["reference"], rel=1e-4)


def test_margin_by_hand():
    groups = [
        Group([1], [[2], [3], [4]], [0.0, 1.0, -1.0]),
        Group([1], [[2], [3]], [2.0, 2.0]),
        Group([1], [[2], [3]], [1.0, 0.0]),
    ]
    log_ratios = torch.tensor([0.0, 5.0, 2.0, 1.0, 9.0, -1.0, 1.5])
    assert reward_margin(log_ratios, groups) == [3.0, -2.5]


def test_log_ratios_start_at_zero_and_the_margin_rises(tmp_path):
    """On prompts that were not trained on, too: the policy learns the colour, not the number."""
    write_jsonl(tmp_path / "data.jsonl", colour_examples(200))
    flags = ("--sft-steps", "60", "--heldout-prompts", "40", "--prompts-per-step", "8")
    run_ = tiny_run(tmp_path / "data.jsonl", tmp_path, *flags)
    assert run.heldout_margins(run_) == [0.0] * 40
    first = run.train_step(run_)
    # Other batches, so other paddings and sums, than those of the reference pass.
    assert first["mean_log_ratio"] == pytest.approx(0, abs=1e-4)
    margins = [run.train_step(run_)["margin"] for _ in range(120)]
    assert sum(margins[-10:]) / 10 > 1.0
    assert sum(run.heldout_margins(run_)) / 40 > 1.0


# Checkpoints


def test_resume_is_bit_identical(colours, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run.main(tiny_arguments(colours, whole, "--steps", "6"))
    run.main(tiny_arguments(colours, halves, "--steps", "3"))
    run.main(tiny_arguments(colours, halves, "--steps", "6", "--resume"))
    assert_same_checkpoint(whole, halves)
    assert step_records(whole) == step_records(halves)


def test_resume_after_an_exception(colours, tmp_path, monkeypatch):
    """Steps after the last checkpoint are taken again, and logged once."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.main(tiny_arguments(colours, whole, "--steps", "6"))
    train_step = run.train_step

    def fail_at_five(run_: Run) -> dict:
        if run_.step == 5:
            raise RuntimeError("out of memory")
        return train_step(run_)

    monkeypatch.setattr(run, "train_step", fail_at_five)
    arguments = tiny_arguments(colours, broken, "--steps", "6", "--checkpoint-every", "2")
    with pytest.raises(RuntimeError, match="out of memory"):
        run.main(arguments)
    monkeypatch.undo()
    assert checkpoint.checkpoints(broken)[-1].name == "step-00000004"
    assert len(step_records(broken)) == 5
    run.main([*arguments, "--resume"])
    assert_same_checkpoint(whole, broken)
    assert step_records(whole) == step_records(broken)


def wait_for_steps(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count('"grad_norm"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} steps within a minute; exit status {process.poll()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_resume_after_a_signal(colours, tmp_path, number):
    """SIGTERM finishes the step and exits with 0; SIGKILL leaves the last periodic checkpoint."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = tiny_arguments(colours, stopped, "--checkpoint-every", "7")
    command = [sys.executable, str(Path(run.__file__)), *arguments, "--steps", "100000"]
    # The bits depend on how many threads share a sum.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=threads)
    try:
        wait_for_steps(process, stopped, 9)
        process.send_signal(number)
        status = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    step = checkpoint.load_state(checkpoint.checkpoints(stopped)[-1])["step"]
    assert step >= 7 and (number == signal.SIGTERM or step % 7 == 0)
    steps = str(step + 5)
    run.main([*arguments, "--steps", steps, "--resume"])
    run.main(tiny_arguments(colours, whole, "--steps", steps))
    assert_same_checkpoint(whole, stopped)
    assert step_records(whole) == step_records(stopped)


def test_a_write_that_fails_leaves_the_previous_checkpoint(colours, tmp_path, monkeypatch):
    run_ = tiny_run(colours, tmp_path)
    before = final_checkpoint(tmp_path)
    run.train_step(run_)

    def disk_full(state, path):
        Path(path).write_bytes(b"half")
        assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000000"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        start.save_run(run_)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert final_checkpoint(tmp_path)[0] == before[0]
    start.save_run(run_)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert final_checkpoint(tmp_path)[0] != before[0]


def test_a_kill_during_the_write_is_no_checkpoint(colours, tmp_path):
    """The folder that a kill leaves behind is neither loaded nor in the way of the next write."""
    run_ = tiny_run(colours, tmp_path)
    partial = tmp_path / "checkpoints" / ".step-00000001.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000000"]
    run.train_step(run_)
    assert checkpoint.load_state(start.save_run(run_))["step"] == 1


def test_checkpoint_brings_back_the_random_numbers():
    state = checkpoint.rng_state()
    drawn = torch.rand(3)
    checkpoint.restore_rng(state)
    assert torch.equal(drawn, torch.rand(3))


# The command line


def test_one_command_checks_and_logs(colours, tmp_path, capsys):
    assert run.main(tiny_arguments(colours, tmp_path, "--steps", "3", "--check")) == 0
    assert "largest differences over 3 steps" in capsys.readouterr().out
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert header["config"]["steps"] == 3 and header["versions"]["torch"] == torch.__version__
    keys = {"loss", "margin", "mean_log_ratio", "grad_norm", "gradient_difference", "loss_difference"}
    for number, record in enumerate(step_records(tmp_path), start=1):
        assert record["step"] == number and keys <= record.keys()


def test_check_fails_where_the_gradients_differ(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECK_TOLERANCE", 0.0)
    assert run.main(tiny_arguments(colours, tmp_path, "--steps", "1", "--check")) == 1


BAD_COMMANDS = {
    "--beta must be positive, got 0.0": ["--beta", "0"],
    "--lr must be positive, got nan": ["--lr", "nan"],
    "--sft-steps must not be negative": ["--sft-steps", "-1"],
    "--group-size must be at least 2": ["--group-size", "1"],
    "--hidden-size must be a multiple": ["--num-heads", "3"],
    "invalid choice: 'magic'": ["--impl", "magic"],
    "missing.jsonl: no such data file": ["--data", "missing.jsonl"],
    "holds no checkpoint": ["--resume"],
}


@pytest.mark.parametrize(("message", "flags"), BAD_COMMANDS.items(), ids=BAD_COMMANDS.keys())
def test_bad_commands(colours, tmp_path, capsys, message, flags):
    with pytest.raises(SystemExit) as error:
        run.main(tiny_arguments(colours, tmp_path / "out", *flags))
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_resumes_leave_the_run_alone(colours, tmp_path, capsys):
    arguments = tiny_arguments(colours, tmp_path / "out", "--steps", "1")
    run.main(arguments)
    log, before = (tmp_path / "out" / "log.jsonl").read_bytes(), final_checkpoint(tmp_path / "out")[0]
    changed = tmp_path / "changed.jsonl"
    write_jsonl(changed, colour_examples(19))
    refused = {
        "holds a run; continue it with --resume": arguments,
        "another configuration: --beta 0.1 there, 0.2 here": [*arguments, "--resume", "--beta", "0.2"],
        "another configuration: --data": [*arguments, "--resume", "--data", str(changed)],
        "--resume needs --out": [*TINY, "--data", str(colours), "--resume"],
    }
    for message, command in refused.items():
        with pytest.raises(SystemExit):
            run.main(command)
        assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == log
    assert final_checkpoint(tmp_path / "out")[0] == before


def test_changed_data_are_refused(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, colour_examples(20))
    arguments = tiny_arguments(data, tmp_path / "out", "--steps", "1")
    run.main(arguments)
    write_jsonl(data, colour_examples(19))
    with pytest.raises(SystemExit):
        run.main([*arguments, "--resume"])
    assert "the data have changed" in capsys.readouterr().err


def test_one_prompt_is_refused(tmp_path, capsys):
    write_jsonl(tmp_path / "data.jsonl", colour_examples(1))
    with pytest.raises(SystemExit):
        run.main(tiny_arguments(tmp_path / "data.jsonl", tmp_path / "out"))
    assert "at least 2 prompts, got 1" in capsys.readouterr().err


def test_bfloat16_runs(colours, tmp_path):
    assert run.main(tiny_arguments(colours, tmp_path, "--steps", "2", "--dtype", "bfloat16")) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_runs(colours, tmp_path, dtype):
    flags = ("--steps", "3", "--device", "cuda", "--dtype", dtype, "--check")
    assert run.main(tiny_arguments(colours, tmp_path, *flags)) == 0
