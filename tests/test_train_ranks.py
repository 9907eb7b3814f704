"""train/run.py on two processes: the run of one process, whatever is shared out; and ranks that differ, fail or die."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


class Alone:
    """Runs of one process, each made once, whatever it is compared with: known by their flags but for the folder.

    A process of its own: in this one, where fresh memory is NaN, adapters draw other weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}
        self.process = Ranks(1, folder / "store")

    def run(self, to_flags) -> Path:
        """The folder of the run with the flags to_flags(folder)."""
        key = tuple(to_flags(Path("out")))
        if key not in self.made:
            self.made[key] = self.folder / f"run{len(self.made)}"
            assert_succeeds(self.process.run(command, to_flags(self.made[key])))
        return self.made[key]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    alone = Alone(tmp_path_factory.mktemp("alone"))
    yield alone
    alone.process.stop()


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


def assert_same_curve(out: Path, other: Path) -> None:
    """As far as `out` went."""
    for name in ("loss", "grad_norm", "margin"):
        expected = curve(out, name)
        assert curve(other, name)[: len(expected)] == pytest.approx(expected, rel=2e-5, abs=2e-5), name


def assert_same_run(out: Path, other: Path) -> None:
    """To the rounding of sums in another order, and what AdamW makes of it."""
    assert len(step_records(out)) == len(step_records(other))
    assert_same_curve(out, other)
    mine, others = final_weights(out), final_weights(other)
    assert mine.shape == others.shape and (mine - others).abs().max() < 2e-5


def assert_train_alike(both: tuple[Alone, Ranks], to_flags, two: Path, more: tuple[str, ...]) -> Path:
    """The folder `two` gets the run on two ranks, who are told `more` besides; returns that of the run in one."""
    alone, ranks = both
    one = alone.run(to_flags)
    assert_succeeds(ranks.run(command, to_flags(two, *more)))
    assert_same_run(one, two)
    return one


# The same run


@each_way
def test_ranks_train_as_one_process(tmp_path, both, ragged, way):
    """A tied head, a supervised warm-up and ragged groups of which one rank has more."""

    def flags(out, *more):
        return tiny_arguments(ragged, out, "--lr", "1e-3", "--steps", "4", *more)

    assert_train_alike(both, flags, tmp_path, way)


@each_way
def test_groups_may_be_split(tmp_path, both, triples, model, way):
    """An untied head, and one group of three for two ranks."""

    def flags(out, *more):
        return arguments(model, triples, out, "--prompts-per-step", "1", "--steps", "4", *more)

    assert_train_alike(both, flags, tmp_path, way)


@pytest.mark.parametrize(("way", "micro_batch"), [*zip(WAYS.values(), ("2", "4", "4", "2"), strict=True)], ids=WAYS)
def test_micro_batches_over_ranks(tmp_path, both, triples, model, way, micro_batch):
    """Nine completions make five micro-batches of two, or three of four: one rank takes one more than the other."""

    def flags(out, *more):
        return arguments(model, triples, out, "--steps", "4", *more)

    assert_train_alike(both, flags, tmp_path, ("--micro-batch", micro_batch, *way))


@pytest.mark.parametrize(("loss", "prompts"), [*((loss, "3") for loss in LOSSES), ("reinforce", "1"), ("ppo", "1")])
def test_every_loss_over_ranks(tmp_path, both, triples, model, loss, prompts):
    """Of whole groups on each rank, where the mean over them is to be the loss; and of a group that ranks share, where
    a loss is a function of its log-probs whatever it is: those with numbers of their own besides."""

    def flags(out, *more):
        fixed = ("--loss", loss, "--prompts-per-step", prompts, "--average-logps", "--beta", "0.5", "--steps", "3")
        return arguments(model, triples, out, *fixed, *more)

    assert_train_alike(both, flags, tmp_path, ())


@needs_peft
@each_way
def test_adapters_over_ranks(tmp_path, both, triples, model, way):
    def flags(out, *more):
        return arguments(model, triples, out, "--lora-rank", "4", "--steps", "4", *more)

    assert_train_alike(both, flags, tmp_path, way)


@pytest.mark.parametrize("more", [("--gradient-checkpointing",), ("--sparse-eps", "1e-3")], ids=lambda more: more[0])
@pytest.mark.parametrize("way", [WAYS["ddp"], WAYS["fsdp"]], ids=["ddp", "fsdp"])
def test_options_over_ranks(tmp_path, both, triples, model, more, way):
    def flags(out, *way):
        return arguments(model, triples, out, "--steps", "4", *more, *way)

    one = assert_train_alike(both, flags, tmp_path, way)
    if more[0] == "--sparse-eps":
        assert curve(tmp_path, "density") == pytest.approx(curve(one, "density"), abs=1e-3)


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

    assert_succeeds(ranks.run(command, flags("whole", "4")))
    assert_succeeds(ranks.run(command, flags("halves", "2")))
    assert_succeeds(ranks.run(command, flags("halves", "4", "--resume")))
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halves")
    assert step_records(tmp_path / "whole") == step_records(tmp_path / "halves")


@each_way
def test_a_run_may_change_its_ranks(tmp_path, both, ragged, way):
    """The checkpoint does not tell on how many it was written."""

    def flags(out, steps, *more):
        return tiny_arguments(ragged, out, "--lr", "1e-3", "--steps", steps, *more)

    alone, ranks = both
    one = alone.run(lambda out: flags(out, "6"))
    assert run.main(flags(tmp_path, "2")) == 0
    assert_succeeds(ranks.run(command, flags(tmp_path, "4", "--resume", *way)))
    assert run.main(flags(tmp_path, "6", "--resume")) == 0
    assert_same_run(one, tmp_path)


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


LORA = ("--lora-rank", "4")


@pytest.mark.parametrize(
    ("way", "adapters"),
    [
        pytest.param(WAYS["ddp"], (), id="ddp-whole"),
        pytest.param(WAYS["fsdp"], LORA, id="fsdp-LoRA", marks=needs_peft),
        pytest.param(WAYS["ddp, vocabulary"], LORA, id="ddp, vocabulary-LoRA", marks=needs_peft),
        pytest.param(WAYS["fsdp, vocabulary"], (), id="fsdp, vocabulary-whole"),
    ],
)
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
    flags = online("out", "low_bytes", "--steps", "1", "--prompts-per-step", "1", "--parallel", "fsdp")
    assert_succeeds(ranks.run(command, flags, str(tmp_path)))
    assert len(curve(tmp_path / "out", "loss")) == 1


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


def logged(out: Path) -> list[list[int]]:
    """The steps in the log, of each start of the run."""
    log, starts = out / "log.jsonl", []
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # a last one may be half written
    for line in map(json.loads, lines):
        if "config" in line:
            starts.append([])
        elif "step" in line:
            starts[-1].append(line["step"])
    return starts


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    while not happened():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def workers(launcher: int) -> list[int]:
    """The process ids of a launcher's children, in the order of their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks through /proc")
def test_torchrun(tmp_path, ragged):
    """One run, as each start of its processes takes longer than all of its steps: one that dies ends the others, those
    started in their place go on from the checkpoint, a signal to torchrun ends all of them with a checkpoint, one
    process finishes the run, and the curve is that of a process which was left alone."""

    def flags(out, steps, *more):
        return tiny_arguments(ragged, out, "--lr", "1e-3", "--checkpoint-every", "3", "--steps", str(steps), *more)

    one, two = tmp_path / "one", tmp_path / "two"
    launched = torchrun(*flags(two, 100_000), restarts=1)
    process = subprocess.Popen(launched, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_until(lambda: any(4 in steps for steps in logged(two)), process)
    first, second = workers(process.pid)
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: len(logged(two)) == 2 and len(logged(two)[1]) >= 2, process)
    assert not Path(f"/proc/{first}").exists()
    kept, others = logged(two)
    assert kept == list(range(1, kept[-1] + 1)) and kept[-1] % 3 == 0 and others[0] == kept[-1] + 1

    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    (folder,) = checkpoint.checkpoints(two)
    stopped_at = checkpoint.load_state(folder)["step"]
    assert stopped_at == logged(two)[1][-1]

    steps = max(10, stopped_at + 2)
    assert run.main(flags(two, steps, "--resume")) == 0
    assert [record["step"] for record in step_records(two)] == list(range(1, steps + 1))
    assert run.main(flags(one, 10)) == 0
    assert_same_curve(one, two)
