"""Peers, suites and the scripts around the benchmark: what is refused, what is listed, and what each case is worth."""

import json

import pytest
import torch

from bench import (
    checks,
    fidelity,
    loaders,
    peers,
    provenance,
    providers,
    report,
    suites,
    summaries,
    timing,
)
from bench import tables as tables_module
from bench.inputs import Shape, make_inputs
from copg_kernels.schedules.workspace import default_workspace_bytes
from tests.test_bench import CPU, TINY, checked, tiny_table

CPU_PEERS = ("trl", "liger scaled CE (torch)", "unsloth_zoo")
GPU_PEERS = ("liger scaled CE (CuTe)", "liger FLCE", "verl", "cut-cross-entropy", "cut-cross-entropy exact")


# Peers


@pytest.mark.parametrize("name", CPU_PEERS)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_installed_peer_agrees_with_the_specification(name, ignored):
    rows = checked(name, make_inputs(TINY._replace(ignored=ignored), "rl", torch.float32, "cpu"))
    assert [row.status for row in rows] == ["ok"] * 5


@pytest.mark.parametrize("name", [*CPU_PEERS, *GPU_PEERS, "flash-attn on logits", "quack (ceiling)"])
def test_peer_that_is_not_installed_says_so_in_one_row(monkeypatch, name):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    found, rows = checks.load_providers((name,), CPU)
    assert not found and [(row.pass_name, row.status) for row in rows] == [("all", "not installed")]


@pytest.mark.parametrize("name", [*GPU_PEERS, "flash-attn on logits", "quack (ceiling)"])
def test_peer_for_gpus_says_so_on_a_cpu(monkeypatch, tmp_path, name):
    monkeypatch.setattr(peers, "_installed", lambda module, otherwise="": tmp_path)
    _, rows = checks.load_providers((name,), CPU)
    assert [row.status for row in rows] == ["needs a GPU"]


def test_peer_that_fails_to_import_keeps_its_row(monkeypatch):
    def broken(device):
        raise AttributeError("module 'triton' has no attribute 'gone'")

    monkeypatch.setattr(checks, "LOADERS", {"broken": broken})
    _, rows = checks.load_providers(("broken",), CPU)
    assert rows[0].status == "failed to load: AttributeError: module 'triton' has no attribute 'gone'"


@pytest.mark.parametrize("pass_name", [providers.TRAINABLE, providers.FROZEN, providers.UPSTREAM])
def test_peer_with_a_wrong_gradient_gets_no_time(monkeypatch, pass_name):
    def planted(hidden_states, lm_head_weight, labels):
        return providers.eager_token_logps(hidden_states * 1.0, lm_head_weight, labels) + 0.01 * (
            hidden_states - hidden_states.detach()
        ).sum(-1)

    planted_loaders = {"planted": lambda device: providers.composed(planted)}
    row = tiny_table(monkeypatch, planted_loaders, passes=(pass_name,))["rows"][0]
    assert row["status"].startswith("wrong numbers: dX off by") and row["seconds"] is None
    assert row["dhidden_error"] > 3e-4 and row["peak_bytes"] is None


def test_ceiling_is_a_row_of_its_own_and_checked_as_mean_cross_entropy(monkeypatch):
    def mean_ce(inputs):
        return -providers.eager_token_logps(*inputs[:3]).mean()

    ceiling = {"ceiling": lambda device: providers.Provider(None, mean_ce)}
    (row,) = tiny_table(monkeypatch, ceiling)["rows"]
    assert (row["pass"], row["units"], row["status"]) == (providers.MEAN_CE, 3, "ok")
    wrong = {"ceiling": lambda device: providers.Provider(None, lambda inputs: 2 * mean_ce(inputs))}
    assert tiny_table(monkeypatch, wrong)["rows"][0]["seconds"] is None


def test_requirements_pin_every_peer():
    lines = (provenance.ROOT / "bench" / "requirements-peers.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert len(pinned) == 6 and all("==" in line for line in pinned)
    assert set(provenance.provenance(CPU)["peers"]) == {line.split("==")[0] for line in pinned} | {"flash-attn"}


# Cases


def test_ignored_tokens_count_for_nothing():
    shape = TINY._replace(ignored=0.5)
    inputs = make_inputs(shape, "rl", torch.float32, "cpu")
    assert torch.equal(inputs.counted, (inputs.labels != -100).nonzero().squeeze(1)) and len(inputs.counted) == 24
    ours, eager = (loaders.LOADERS[name](CPU) for name in (loaders.OURS, loaders.EAGER))
    torch.testing.assert_close(ours.loss(inputs), eager.loss(inputs))
    torch.testing.assert_close(ours.bonus_loss(inputs), eager.bonus_loss(inputs))
    torch.testing.assert_close(ours.log_probs(inputs), eager.log_probs(inputs))
    logits = timing.floor_cases(inputs)["logits"]()
    assert logits.shape == (24, shape.vocab_size)


def test_units_of_each_case():
    assert providers.PASSES == {
        "log-probs": 1,
        "loss+gradients": 3,
        "frozen head": 2,
        "any gradient": 4,
        "entropy bonus": 3,
        providers.MEAN_CE: 3,
    }


def test_frozen_head_gets_no_weight_gradient():
    inputs = make_inputs(TINY, "rl", torch.float32, "cpu")
    runs = providers.bind(loaders.LOADERS[loaders.OURS](CPU), inputs)
    (dhidden,) = runs[providers.FROZEN]()
    torch.testing.assert_close(dhidden, runs[providers.TRAINABLE]()[0])
    assert len(runs[providers.UPSTREAM]()) == 2


def test_bonus_is_a_pass_of_those_whose_entropy_has_a_gradient():
    found, missing = checks.load_providers(tuple(loaders.LOADERS), CPU)
    offered = {name for name, provider in found.items() if provider.bonus_loss is not None}
    assert offered == set(suites.WITH_ENTROPY) - {row.provider for row in missing}


def test_provider_without_an_entropy_says_so(monkeypatch):
    named = {name: loaders.LOADERS[name] for name in (loaders.EAGER, "torch linear_cross_entropy")}
    monkeypatch.setitem(named, "ceiling", lambda device: providers.Provider(None, lambda inputs: torch.zeros(())))
    rows = tiny_table(monkeypatch, named, passes=(providers.BONUS,))["rows"]
    assert [(row["provider"], row["status"]) for row in rows] == [
        (loaders.EAGER, "ok"),
        ("torch linear_cross_entropy", checks.NO_ENTROPY),
    ]
    assert rows[0]["over_floor"] > 0 and rows[1]["seconds"] is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_list_what_they_promise(device):
    (quick,) = suites.quick(torch.device(device))
    assert quick.passes == ("log-probs", "loss+gradients", "frozen head")
    assert set(quick.providers) == set(loaders.LOADERS)
    if device == "cpu":
        expected = (2048, 512, 32000, 2, 256)
        shape = quick.shape
        assert expected == (shape.num_tokens, shape.hidden_size, shape.vocab_size, shape.group_size, 256)
    jobs = suites.full(torch.device(device))
    assert providers.UPSTREAM in jobs[0].passes
    (with_bonus,) = (job for job in jobs if providers.BONUS in job.passes)
    assert set(with_bonus.providers) == set(suites.WITH_ENTROPY)
    assert {job.regime for job in jobs} == {"base", "tuned", "rl", "flat"}
    assert {job.shape.group_size for job in jobs} == {2, 4, 8} and {job.shape.ignored for job in jobs} == {0.0, 0.5}
    sizes = [job.shape.num_tokens for job in jobs if job.about == suites.SCALING]
    assert sizes[-1] == 16 * sizes[0]
    longest = max(jobs, key=lambda job: job.shape.completion_length).shape
    assert longest.completion_length * longest.group_size == longest.num_tokens
    backend, itemsize = ("triton", 2) if device == "cuda" else ("torch", 4)
    assert longest.num_tokens * longest.vocab_size * itemsize > default_workspace_bytes(backend)
    for job in jobs:
        assert job.shape.num_tokens % (job.shape.completion_length * job.shape.group_size) == 0
        assert loaders.OURS in job.providers and loaders.EAGER in job.providers


def test_single_purpose_options_replace_the_suite(capsys):
    pytest.importorskip("tqdm")
    from bench import run

    options = run.parse(["--device", "cpu", "--ignored", "0.5", "--group-size", "4", "--passes", "any gradient"])
    (job,) = run.jobs(options)
    assert (job.shape.ignored, job.shape.group_size, job.passes) == (0.5, 4, ("any gradient",))
    assert options.suite is None and run.parse(["--device", "cpu"]).suite == "quick"
    with pytest.raises(SystemExit):
        run.parse(["--suite", "full", "--tokens", "64"])
    assert "--suite chooses its own tokens" in capsys.readouterr().err


# Summaries


def test_fastest_peer_over_ours(monkeypatch):
    table = tiny_table(monkeypatch, {name: loaders.LOADERS[name] for name in (loaders.EAGER, loaders.OURS)})
    for row in table["rows"]:
        row["seconds"] = 3.0 if row["provider"] == loaders.EAGER else 2.0
    expected = "fastest peer / ours: log-probs 1.50 (eager), loss+gradients 1.50 (eager)"
    assert expected in tables_module.plain(table) and expected in tables_module.markdown(table)


def test_fidelity_tells_rounded_logits_from_exact_ones():
    shape = Shape("fidelity", 1024, 64, 2048, 512)
    result = fidelity.measure_fidelity((loaders.EAGER, loaders.OURS, "verl"), CPU, shape)
    eager, ours = ([r for r in result["rows"] if r["provider"] == name][0] for name in (loaders.EAGER, loaders.OURS))
    assert ours["logps_error"] <= 5e-4 and eager["logps_error"] > 20 * ours["logps_error"]
    (summary,) = summaries.summaries({"fidelity": result, "tables": []})
    assert "fidelity with bfloat16 operands" in summary.plain() and "| copg-kernels | measured |" in summary.markdown()


def test_cost_per_token_as_t_grows():
    tables = [
        {
            "about": suites.SCALING,
            "shape": {"num_tokens": size},
            "rows": [{"provider": "eager", "pass": "loss+gradients", "seconds": seconds}],
        }
        for size, seconds in ((1000, 0.01), (16000, 0.32))
    ]
    (summary,) = summaries.summaries({"tables": tables})
    assert summary.rows == [("eager", "loss+gradients", "10.0", "20.0")]
    assert "T=1000" in summary.plain() and "T=16000" in summary.markdown()


def test_report_shows_the_heads_and_all_on_request(monkeypatch):
    table = tiny_table(monkeypatch, {"eager": loaders.LOADERS["eager"]})
    other = table | {"about": "regimes", "regime": "flat"}
    results = {"provenance": provenance.provenance(CPU), "tables": [table, other]}
    assert report.report(results, "", every_table=False).count("| provider |") == 1
    assert report.report(results, "").count("| provider |") == 2


def test_a_fidelity_that_is_no_number_is_a_row_and_not_the_end_of_the_file():
    broken = checks.Checked("peer", "log-probs", "wrong numbers: logps", checks.Errors(logps=float("nan")))
    row = fidelity._row(broken)
    assert row["status"] == "wrong numbers: logps" and row["logps_error"] is None
    json.dumps(row, allow_nan=False)
