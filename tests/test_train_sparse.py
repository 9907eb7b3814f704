"""train/ with sparse gradients: the flag, what it logs, and the experiment that compares what is learned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from tests.test_train import step_records, tiny_arguments, tiny_config, write_colours
from train import run, sparse_learning
from train.config import config_differences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data") / "colours.jsonl")


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in step_records(out)]


# The flag


def test_nothing_dropped_trains_as_exact(colours, tmp_path):
    """After a warm-up long enough that blocks do not overflow: few of the 300 tokens then occur at all."""
    flags = ("--steps", "8", "--sft-steps", "40")
    assert run.main(tiny_arguments(colours, tmp_path / "exact", *flags)) == 0
    assert run.main(tiny_arguments(colours, tmp_path / "sparse", *flags, "--sparse-eps", "1e-30")) == 0
    assert losses(tmp_path / "sparse") == pytest.approx(losses(tmp_path / "exact"), abs=1e-5)


def test_steps_log_what_was_kept(colours, tmp_path):
    assert run.main(tiny_arguments(colours, tmp_path / "sparse", "--steps", "2", "--sparse-eps", "0.02")) == 0
    assert run.main(tiny_arguments(colours, tmp_path / "exact", "--steps", "2")) == 0
    for sparse, exact in zip(step_records(tmp_path / "sparse"), step_records(tmp_path / "exact"), strict=True):
        assert 0 <= sparse["density"] < 1 and 0 < sparse["dropped"] < 1 and sparse["overflow"] == 0
        assert sparse.keys() - exact.keys() == {"density", "dropped", "overflow"}


BAD_FLAGS = {
    "--sparse-eps must be at least 0 and below 1, got 1.0": ["--sparse-eps", "1"],
    "--sparse-eps must be at least 0 and below 1, got -0.1": ["--sparse-eps", "-0.1"],
    "--sparse-eps must be at least 0 and below 1, got nan": ["--sparse-eps", "nan"],
    "--sparse-eps needs --impl fused": ["--sparse-eps", "0.01", "--impl", "reference"],
    "--sparse-eps and --check exclude each other": ["--sparse-eps", "0.01", "--check"],
}


@pytest.mark.parametrize(("message", "flags"), BAD_FLAGS.items(), ids=BAD_FLAGS.keys())
def test_bad_flags(colours, tmp_path, capsys, message, flags):
    with pytest.raises(SystemExit) as error:
        run.main(tiny_arguments(colours, tmp_path / "out", *flags))
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_sparse_eps_is_another_configuration(colours, tmp_path):
    config = tiny_config(colours, tmp_path, "--sparse-eps", "0.01")
    saved = tiny_config(colours, tmp_path).__dict__
    assert config_differences(saved, config) == ["--sparse-eps 0.0 there, 0.01 here"]
    older = {name: value for name, value in saved.items() if name != "sparse_eps"}
    assert config_differences(older, config) == ["--sparse-eps 0.0 there, 0.01 here"]
    assert config_differences(older, tiny_config(colours, tmp_path)) == []


def test_sparse_resume_continues_the_run(colours, tmp_path):
    flags = ("--sparse-eps", "0.01")
    run.main(tiny_arguments(colours, tmp_path / "whole", "--steps", "4", *flags))
    run.main(tiny_arguments(colours, tmp_path / "halves", "--steps", "2", *flags))
    run.main(tiny_arguments(colours, tmp_path / "halves", "--steps", "4", "--resume", *flags))
    assert step_records(tmp_path / "whole") == step_records(tmp_path / "halves")


# The experiment


def experiment(data: Path, out: Path, *more: str) -> list[str]:
    flags = ("--steps", "4", "--evaluate-every", "1", "--seeds", "2", "--sparse-eps", "0.02")
    return tiny_arguments(data, out, *flags, *more)


def test_experiment_end_to_end(colours, tmp_path, capsys):
    assert sparse_learning.main(experiment(colours, tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "sparse-learning.png"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"date", "command", "commit", "source_sha256", "versions"} <= results["provenance"].keys()
    assert [record["seed"] for record in results["runs"]] == [0, 1]
    for record in results["runs"]:
        for variant in ("exact", "sparse"):
            points = record[variant]["points"]
            assert [point["step"] for point in points] == [0, 1, 2, 3, 4] and points[0]["margin"] == 0
        # One start and one batch: the first loss is the same, the first gradients are not.
        first, other = (record[variant]["points"][1] for variant in ("exact", "sparse"))
        assert first["loss"] == pytest.approx(other["loss"], rel=1e-6) and first["grad_norm"] != other["grad_norm"]
        assert 0 < other["dropped"] < 1 and "dropped" not in first
        assert record["exact"]["token_logps"]["middle"] < 0
        assert record["bins"]["most frequent decile"]["least_count"] > record["bins"]["rarest decile"]["most_count"]
    margin = results["summary"]["heldout_margin"]
    assert margin["difference"]["mean"] == pytest.approx(margin["sparse"]["mean"] - margin["exact"]["mean"])
    assert "rarest decile" in capsys.readouterr().out


def test_the_exact_variant_is_the_loop_of_run(colours, tmp_path):
    assert sparse_learning.main(experiment(colours, tmp_path / "out", "--seeds", "1")) == 0
    assert run.main(tiny_arguments(colours, tmp_path / "run", "--steps", "4")) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    points = results["runs"][0]["exact"]["points"]
    assert [point["loss"] for point in points[1:]] == losses(tmp_path / "run")


def test_bins_by_hand():
    """Token i occurs i times, for i below 20; 20 and 21 do not."""
    counts = torch.tensor([*range(20), 0, 0])
    bins = [sparse_learning.BINS[index] for index in sparse_learning.frequency_bins(counts).tolist()]
    assert bins[0] == bins[20] == "never seen" and bins[1] == bins[2] == "rarest decile"
    assert bins[3] == bins[17] == "middle" and bins[18] == bins[19] == "most frequent decile"


def test_spread_over_seeds():
    assert sparse_learning.spread([1.0, 3.0]) == {"mean": 2.0, "sd": math.sqrt(2)}
    assert sparse_learning.spread([1.0, None]) == {"mean": 1.0, "sd": None}
    assert sparse_learning.spread([None]) == {"mean": None, "sd": None}


BAD_EXPERIMENTS = {
    "--seeds must be positive, got 0": ["--seeds", "0"],
    "--evaluate-every must be positive, got -1": ["--evaluate-every", "-1"],
    "--sparse-eps must be above 0 here": ["--sparse-eps", "0"],
    "--resume: this experiment keeps no checkpoint": ["--resume"],
    "--steps must be positive, got 0": ["--steps", "0"],
    "--sparse-eps must be at least 0 and below 1, got 2.0": ["--sparse-eps", "2"],
    "no such data file": ["--data", "missing.jsonl"],
    "--out must name a directory": ["--out", ""],
}


@pytest.mark.parametrize(("message", "flags"), BAD_EXPERIMENTS.items(), ids=BAD_EXPERIMENTS.keys())
def test_bad_experiments(colours, tmp_path, capsys, message, flags):
    with pytest.raises(SystemExit) as error:
        sparse_learning.main(experiment(colours, tmp_path / "out", *flags))
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
