"""train/run.py on two processes: the run of one process, whatever is shared out; and ranks that differ, fail or die."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tests.ranks import Ranks
from tests.test_train import tiny_arguments, write_colours, write_triples
from tests.tiny_models import (
    arguments,
    assert_same_checkpoint,
    needs_peft,
    refusal,
    save_tiny_model,
    step_records,
    write_rows,
)
from train import checkpoint, run, start, step, two_pass
from train.config import LOSSES, build_parser, parse_config

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "ddp": (),
    "fsdp": ("--parallel", "fsdp"),
    "ddp, vocabulary": ("--vocab-parallel",),
    "fsdp, vocabulary": ("--parallel", "fsdp", "--vocab-parallel"),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "store")
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process of its own for the run in one: in this one, where fresh memory is NaN, adapters draw other weights."""
    alone = Ranks(1, tmp_path_factory.mktemp("ranks") / "store")
    yield alone
    alone.stop()


@pytest.fixture(scope="module")
def both(alone, ranks):
    return alone, ranks


@pytest.fixture(scope="module")
def triples(tmp_path_factory) -> Path:
    return write_triples(tmp_path_factory.mktemp("data") / "triples.jsonl")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "ragged.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def command(group, flags: list[str], folder: str = ".") -> tuple[int, str]:
    """Exit status and stderr of train/run.py on this rank."""
    os.chdir(folder)
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        try:
            status = run.main(flags)
        except SystemExit as error:
            status = error.code
    return status, stderr.getvalue()


def assert_succeeds(outcomes: list[tuple[int, str]]) -> None:
    assert [status for status, _ in outcomes] == [0] * len(outcomes), outcomes


def curve(out: Path, name: str) -> list[float]:
    return [record[name] for record in step_records(out)]


def final_weights(out: Path) -> torch.Tensor:
    (path,) = checkpoint.checkpoints(out)[-1].glob("*model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])


def assert_same_run(out: Path, other: Path) -> None:
    """To the rounding of sums in another order, and what AdamW makes of it."""
    for name in ("loss", "grad_norm", "margin"):
        assert curve(other, name) == pytest.approx(curve(out, name), rel=2e-5, abs=2e-5), name
    mine, others = final_weights(out), final_weights(other)
    assert mine.shape == others.shape and (mine - others).abs().max() < 2e-5


def assert_train_alike(both: tuple[Ranks, Ranks], to_flags, tmp_path: Path, two: tuple[str, ...]) -> None:
    """`two` is what the run on two ranks is told besides."""
    alone, ranks = both
    assert_succeeds(alone.run(command, to_flags(tmp_path / "one")))
    assert_succeeds(ranks.run(command, to_flags(tmp_path / "two", *two)))
    assert_same_run(tmp_path / "one", tmp_path / "two")


# The same run


@each_way
def test_ranks_train_as_one_process(tmp_path, both, ragged, way):
    """A tied head, a supervised warm-up and ragged groups of which one rank has more."""

    def flags(out, *more):
        return tiny_arguments(ragged, out, "--lr", "1e-3", "--steps", "6", *more)

    assert_train_alike(both, flags, tmp_path, way)


@each_way
def test_groups_may_be_split(tmp_path, both, triples, model, way):
    """An untied head, and one group of three for two ranks."""

    def flags(out, *more):
        return arguments(model, triples, out, "--prompts-per-step", "1", "--steps", "6", *more)

    assert_train_alike(both, flags, tmp_path, way)


@each_way
@pytest.mark.parametrize("micro_batch", ["2", "4"])
def test_micro_batches_over_ranks(tmp_path, both, triples, model, micro_batch, way):
    """Nine completions make five micro-batches of two, or three of four: one rank takes one more than the other."""

    def flags(out, *more):
        return arguments(model, triples, out, "--steps", "4", *more)

    assert_train_alike(both, flags, tmp_path, ("--micro-batch", micro_batch, *way))


@pytest.mark.parametrize("prompts", ["1", "3"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_over_ranks(tmp_path, both, triples, model, loss, prompts):
    def flags(out, *more):
        fixed = ("--loss", loss, "--prompts-per-step", prompts, "--average-logps", "--beta", "0.5", "--steps", "3")
        return arguments(model, triples, out, *fixed, *more)

    assert_train_alike(both, flags, tmp_path, ())


@needs_peft
@each_way
def test_adapters_over_ranks(tmp_path, both, triples, model, way):
    def flags(out, *more):
        return arguments(model, triples, out, "--lora-rank", "4", "--steps", "6", *more)

    assert_train_alike(both, flags, tmp_path, way)


@pytest.mark.parametrize("more", [("--gradient-checkpointing",), ("--sparse-eps", "1e-3")], ids=lambda more: more[0])
@pytest.mark.parametrize("way", [WAYS["ddp"], WAYS["fsdp"]], ids=["ddp", "fsdp"])
def test_options_over_ranks(tmp_path, both, triples, model, more, way):
    def flags(out, *way):
        return arguments(model, triples, out, "--steps", "4", *more, *way)

    assert_train_alike(both, flags, tmp_path, way)
    if more[0] == "--sparse-eps":
        assert curve(tmp_path / "two", "density") == pytest.approx(curve(tmp_path / "one", "density"), abs=1e-3)


def test_bfloat16_over_ranks(tmp_path, ranks, triples, model):
    flags = arguments(model, triples, tmp_path, "--dtype", "bfloat16", "--steps", "2", "--parallel", "fsdp")
    assert_succeeds(ranks.run(command, flags))
    assert all(loss == loss for loss in curve(tmp_path, "loss"))


# What is shared out


def shares(group, flags: list[str]) -> tuple[list[int], int, int]:
    """Rows of the head that this rank multiplied with in a step, elements it stores, and those of the whole model."""
    config = parse_config(build_parser(""), flags)
    run_ = start.start_run(config, *start.load_data(config), torch.device("cpu"))
    rows, head_product = [], two_pass.parallel_linear_logps

    def recorded(hidden_states, lm_head_shard, *others, **options):
        rows.append(lm_head_shard.shape[0])
        return head_product(hidden_states, lm_head_shard, *others, **options)

    two_pass.parallel_linear_logps = recorded
    try:
        step.train_step(run_)
    finally:
        two_pass.parallel_linear_logps = head_product
    parameters = list(run_.model.parameters())
    stored = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    moments = [run_.optimizer.state[p]["exp_avg"] for p in parameters]
    assert all(isinstance(m, DTensor) == isinstance(p, DTensor) for m, p in zip(moments, parameters, strict=True))
    return rows, sum(p.numel() for p in stored), sum(p.numel() for p in parameters)


@each_way
def test_a_rank_has_its_share_only(tmp_path, ranks, triples, model, way):
    """320 rows of the head and, with FSDP2, half of each weight."""
    rows, stored, whole = zip(*ranks.run(shares, arguments(model, triples, tmp_path, *way)), strict=True)
    assert rows == (([160], [160]) if "--vocab-parallel" in way else ([], []))
    assert stored == ((whole[0] // 2,) * 2 if "fsdp" in way else whole)


# Checkpoints


@each_way
def test_resume_is_bit_identical(tmp_path, ranks, ragged, way):
    def flags(out, steps, *more):
        return tiny_arguments(ragged, tmp_path / out, "--steps", steps, *way, *more)

    assert_succeeds(ranks.run(command, flags("whole", "5")))
    assert_succeeds(ranks.run(command, flags("halves", "2")))
    assert_succeeds(ranks.run(command, flags("halves", "5", "--resume")))
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halves")
    assert step_records(tmp_path / "whole") == step_records(tmp_path / "halves")


@each_way
def test_a_run_may_change_its_ranks(tmp_path, ranks, ragged, way):
    """The checkpoint does not tell on how many it was written."""

    def flags(out, steps, *more):
        return tiny_arguments(ragged, tmp_path / out, "--lr", "1e-3", "--steps", steps, *more)

    assert run.main(flags("one", "6")) == 0
    assert run.main(flags("two", "2")) == 0
    assert_succeeds(ranks.run(command, flags("two", "4", "--resume", *way)))
    assert run.main(flags("two", "6", "--resume")) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


# Online


REWARDS = """
import torch.distributed as dist


def low_bytes(prompt, completions, **row):
    return [sum(ord(c) < 110 for c in text) / 12 for text in completions]


def fails_on_the_second_rank(prompt, completions, **row):
    if dist.get_rank() == 1:
        raise KeyError("unit tests")
    return [0.5] * len(completions)
"""


@pytest.fixture
def online(tmp_path, model):
    (tmp_path / "rank_rewards.py").write_text(REWARDS)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"number {i}, red"} for i in range(16)])

    def flags(out: str, function: str, *more: str) -> list[str]:
        reward = ("--reward", f"rank_rewards:{function}", "--group-size", "3", "--max-completion-tokens", "6")
        return arguments(model, prompts, tmp_path / out, *reward, *more)

    return flags


@pytest.mark.parametrize("adapters", [(), pytest.param(("--lora-rank", "4"), marks=needs_peft)], ids=["whole", "LoRA"])
@each_way
def test_online_over_ranks(tmp_path, ranks, online, adapters, way):
    """Three prompts, of which one rank samples for two. The policy starts as the reference, and then leaves it."""
    flags = online("out", "low_bytes", "--steps", "2", *adapters, *way)
    assert_succeeds(ranks.run(command, flags, str(tmp_path)))
    assert_succeeds(ranks.run(command, [*flags, "--steps", "3", "--resume"], str(tmp_path)))
    kl = curve(tmp_path / "out", "kl")
    assert len(kl) == 3 and abs(kl[0]) < 1e-5 and all(abs(value) > 1e-6 for value in kl[1:])
    assert all(0 < reward < 1 for reward in curve(tmp_path / "out", "reward"))


def test_fewer_prompts_than_ranks_online(tmp_path, ranks, online):
    """A rank without prompts samples all the same, where shards are gathered, and its samples are not used."""
    flags = online("out", "low_bytes", "--steps", "2", "--prompts-per-step", "1", "--parallel", "fsdp")
    assert_succeeds(ranks.run(command, flags, str(tmp_path)))
    assert len(curve(tmp_path / "out", "loss")) == 2


def test_a_reward_function_that_fails_on_one_rank_ends_all(tmp_path, ranks, online):
    flags = online("out", "fails_on_the_second_rank", "--steps", "2")
    (status, first), (other_status, second) = ranks.run(command, flags, str(tmp_path))
    assert status == other_status == 1
    assert "rank 1: RewardError: the reward function raised KeyError" in first
    assert "the reward function raised KeyError" in second
    assert len(checkpoint.checkpoints(tmp_path / "out")) == 1


# What is refused


def own_flags(group, flags: list[str], of_rank: list[list[str]]) -> tuple[int, str]:
    return command(group, [*flags, *of_rank[torch.distributed.get_rank(group)]])


@pytest.mark.parametrize(
    ("message", "of_rank"),
    {
        "--beta must be the same on all ranks, got 0.1 on rank 0; 0.2 on rank 1": [[], ["--beta", "0.2"]],
        "the weights (their sum) must be the same on all ranks": [[], ["--seed", "1"]],
    }.items(),
)
def test_ranks_that_differ_are_named(tmp_path, ranks, ragged, message, of_rank):
    flags = tiny_arguments(ragged, tmp_path, "--steps", "1")
    if "weights" in message:
        message = "--seed must be the same on all ranks, got 0 on rank 0; 1 on rank 1"
    for status, stderr in ranks.run(own_flags, flags, of_rank):
        assert status == 2 and message in stderr


def test_other_data_on_one_rank_are_named(tmp_path, ranks, ragged, triples):
    copies = [tmp_path / name / "data.jsonl" for name in ("a", "b")]
    for source, copy in zip((ragged, triples), copies, strict=True):
        copy.parent.mkdir()
        copy.write_bytes(source.read_bytes())
    of_rank = [["--data", str(copy)] for copy in copies]
    flags = tiny_arguments(ragged, tmp_path / "out", "--steps", "1")
    for status, stderr in ranks.run(own_flags, flags, of_rank):
        assert status == 2 and "--data must be the same on all ranks" in stderr


def test_a_file_that_one_rank_lacks_is_named(tmp_path, ranks, ragged):
    of_rank = [[], ["--data", str(tmp_path / "nowhere.jsonl")]]
    flags = tiny_arguments(ragged, tmp_path / "out", "--steps", "1")
    (status, first), (other_status, second) = ranks.run(own_flags, flags, of_rank)
    assert status == other_status == 2
    assert "rank 1: ValueError" in first and "no such data file" in first and "no such data file" in second


SEVERAL = {
    "--check compares gradients in one process": ("--check",),
    "are too few for 2 processes": ("--prompts-per-step", "1", "--sparse-eps", "1e-3"),
    "--vocab-parallel and --sparse-eps exclude each other": ("--vocab-parallel", "--sparse-eps", "1e-3"),
    "--vocab-parallel and --impl reference exclude each other": ("--vocab-parallel", "--impl", "reference"),
}


@pytest.mark.parametrize(("message", "more"), SEVERAL.items())
def test_what_several_processes_cannot_do(tmp_path, ranks, ragged, message, more):
    flags = tiny_arguments(ragged, tmp_path, "--steps", "1", *more)
    for status, stderr in ranks.run(command, flags):
        assert status == 2 and message in stderr


@pytest.mark.parametrize("more", [("--parallel", "fsdp"), ("--vocab-parallel",)], ids=lambda more: more[0])
def test_one_process_refuses_what_takes_several(tmp_path, ragged, capsys, more):
    assert "needs several processes" in refusal(capsys, tiny_arguments(ragged, tmp_path, *more))


# torchrun


def torchrun(*flags: str, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "--max-restarts", str(restarts), str(ROOT / "train" / "run.py"), *flags]


def started(out: Path, flags: list[str], steps: int, restarts: int = 0) -> subprocess.Popen:
    """The command, once it has logged so many steps."""
    launched = torchrun(*flags, restarts=restarts)
    process = subprocess.Popen(launched, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    log = out / "log.jsonl"
    while not (log.exists() and sum('"step"' in line for line in log.read_text().splitlines()) >= steps):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def workers(launcher: int) -> list[int]:
    """The process ids of a launcher's children, in the order of their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def test_torchrun_gives_the_curve_of_one_process(tmp_path, ragged):
    flags = ("--lr", "1e-3", "--steps", "5")
    subprocess.run(torchrun(*tiny_arguments(ragged, tmp_path / "two", *flags)), check=True, cwd=ROOT, timeout=120)
    assert run.main(tiny_arguments(ragged, tmp_path / "one", *flags)) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_a_process_that_dies_ends_the_others_and_the_checkpoint_stands(tmp_path, ragged):
    flags = tiny_arguments(ragged, tmp_path, "--steps", "100000", "--checkpoint-every", "3")
    process = started(tmp_path, flags, 4)
    first, second = workers(process.pid)
    os.kill(second, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and not Path(f"/proc/{first}").exists()
    (folder,) = checkpoint.checkpoints(tmp_path)
    step = checkpoint.load_state(folder)["step"]
    assert step >= 3
    flags[flags.index("100000")] = str(step + 2)
    assert run.main([*flags, "--resume"]) == 0
    assert [record["step"] for record in step_records(tmp_path)] == list(range(1, step + 3))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_restarted_processes_go_on_from_the_checkpoint(tmp_path, ragged):
    flags = tiny_arguments(ragged, tmp_path, "--steps", "300", "--checkpoint-every", "3")
    process = started(tmp_path, flags, 4, restarts=1)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert [record["step"] for record in step_records(tmp_path)] == list(range(1, 301))


def test_a_signal_to_torchrun_ends_all_ranks_with_a_checkpoint(tmp_path, ragged):
    flags = tiny_arguments(ragged, tmp_path, "--steps", "100000", "--checkpoint-every", "100000")
    process = started(tmp_path, flags, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"step"' in line]
    (folder,) = checkpoint.checkpoints(tmp_path)
    assert checkpoint.load_state(folder)["step"] == steps[-1] >= 2
