"""The benchmark's own promises: inputs as described, wrong providers caught, results with provenance."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    accuracy,
    checks,
    composition,
    loaders,
    measure,
    memory,
    provenance,
    providers,
    report,
    suites,
    tables,
    timing,
)
from bench import inputs as inputs_module
from bench.inputs import MODEL_SHAPES, REGIMES, BenchInputs, Shape, density, make_inputs
from copg_kernels.reference import copg_loss_ref, linear_copg_loss_ref, linear_logps_ref

TINY = Shape("tiny", 331, 32, 48, 6, group_size=4)
CPU = torch.device("cpu")
MIB = 2**20


def tiny_inputs(regime="rl", dtype=torch.float32, seed=0):
    return make_inputs(TINY, regime, dtype, "cpu", seed)


def tiny_table(monkeypatch, loaders, rounds=2, passes=("log-probs", "loss+gradients")):
    monkeypatch.setattr(checks, "LOADERS", loaders)
    monkeypatch.setattr(measure, "check_in_child", check_in_process)
    settings = measure.Settings(CPU, torch.float32, timing.Rounds(rounds), tuple(loaders), passes)
    return {"about": "heads"} | measure.measure_table(TINY, "rl", settings, lambda doing, steps: None)


def check_in_process(file, name, passes):
    """In place of a child process, which would not know a planted provider. No peak."""
    operands, truth = torch.load(file)
    inputs = BenchInputs(*(t.requires_grad_() if i < 2 else t for i, t in enumerate(operands)))
    provider = checks.LOADERS[name](CPU)
    return checks.check(name, provider, inputs, passes, accuracy.Truth(*truth), memory.unweighed)


# Inputs


@pytest.mark.parametrize(("regime", "published"), [("base", 2e-3), ("tuned", 1e-3), ("rl", 3e-4)])
def test_density_is_the_published_one(regime, published):
    inputs = make_inputs(Shape("few rows", 140_000, 64, 64, 32), regime, torch.float32, "cpu")
    assert published / 1.6 < density(inputs, 64) < published * 1.6


@pytest.mark.parametrize("regime", REGIMES)
def test_logits_have_the_stated_distribution(regime):
    # Against the formula itself. Even rows, whose label is the token with the peak.
    shape = Shape("", 4000, 256, 256, 32)
    inputs = make_inputs(shape, regime, torch.float32, "cpu")
    logits = (inputs.hidden_states @ inputs.lm_head_weight.T).detach() * REGIMES[regime]
    logits -= logits.mean(1, keepdim=True)
    popularity = -2.14 * (torch.arange(4000.0) + 1816).log()
    residual = (logits - (popularity - popularity.mean()))[0::2]
    labels = inputs.labels[0::2]
    others = residual.scatter(1, labels.unsqueeze(1), 0.0)
    # The peak of another token adds d / sqrt(H) of noise of its own: 2 % of the variance at H = 256.
    assert others.std() == pytest.approx(2.88, rel=0.05)
    # Averaged over rows, what is left is the rank term, with its slope.
    centered = popularity - popularity.mean()
    slope = logits.mean(0) @ centered / centered.square().sum()
    assert slope.item() == pytest.approx(1.0, abs=0.15)


def test_labels_come_from_before_and_after_the_peak(monkeypatch):
    drawn = []
    sample_labels = inputs_module._sample_labels
    monkeypatch.setattr(
        inputs_module,
        "_sample_labels",
        lambda *arguments: drawn.append(sample_labels(*arguments)) or drawn[-1],
    )
    inputs = make_inputs(Shape("", 1000, 64, 4096, 32), "tuned", torch.float32, "cpu")
    before, after = drawn
    assert torch.equal(inputs.labels[0::2], before[0::2]) and torch.equal(inputs.labels[1::2], after)
    # A label drawn from the softmax it is scored with is calibrated: E[log p(label)] is minus the entropy.
    logits = (inputs.hidden_states @ inputs.lm_head_weight.T).detach()[1::2]
    surprise = logits.log_softmax(-1).gather(1, after.unsqueeze(1)).mean()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert -surprise == pytest.approx(entropy.item(), abs=0.12)


def test_reference_policy_is_close_and_seeds_differ():
    inputs = make_inputs(Shape("", 500, 64, 1024, 4), "tuned", torch.float32, "cpu")
    logps = linear_logps_ref(*inputs[:3]).detach().view(-1, 4).sum(1)
    assert (logps - inputs.ref_logps).std() == pytest.approx(1.0, abs=0.2)
    again, other = tiny_inputs(), tiny_inputs(seed=1)
    assert torch.equal(again.hidden_states, tiny_inputs().hidden_states)
    assert not torch.equal(again.rewards, other.rewards)


def test_shapes_are_whole_groups():
    for shape in MODEL_SHAPES:
        assert shape.num_tokens % (shape.completion_length * shape.group_size) == 0
    with pytest.raises(ValueError, match="num_tokens"):
        make_inputs(TINY._replace(num_tokens=50), "rl", torch.float32, "cpu")


def checked(name, inputs):
    """Rows of a provider that is there, all five passes; skips where it is not."""
    passes = tuple(name for name in providers.PASSES if name != providers.MEAN_CE)
    found, missing = checks.load_providers((name,), CPU)
    if missing:
        pytest.skip(missing[0].status)
    truth = accuracy.exact(inputs, passes)
    return checks.check(name, found[name], inputs, passes, truth, memory.unweighed)


# Checks before timing


def test_truth_is_autograd_through_the_specification(monkeypatch):
    inputs = tiny_inputs()
    operands = [t.detach().double().requires_grad_() for t in inputs[:2]]
    loss = linear_copg_loss_ref(
        *operands,
        inputs.labels,
        inputs.ref_logps.double(),
        inputs.rewards.double(),
        beta=inputs.beta,
        group_size=inputs.group_size,
        cu_seqlens=inputs.cu_seqlens,
    )
    dhidden, dweight = torch.autograd.grad(loss, operands)
    truth = accuracy.exact(inputs, [providers.TRAINABLE, providers.FROZEN, providers.UPSTREAM])
    torch.testing.assert_close(truth.gradients[providers.TRAINABLE], (dhidden, dweight))
    assert truth.gradients[providers.FROZEN][0] is truth.gradients[providers.TRAINABLE][0]
    logps = linear_logps_ref(*operands, inputs.labels)
    upstream = torch.autograd.grad(logps, operands, inputs.dlogps.double())
    torch.testing.assert_close(truth.gradients[providers.UPSTREAM], upstream)


@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_truth_of_the_bonus_is_autograd_through_full_logits(ignored):
    inputs = make_inputs(TINY._replace(ignored=ignored), "rl", torch.float32, "cpu")
    operands = [t.detach().double().requires_grad_() for t in inputs[:2]]
    softmax = torch.distributions.Categorical(logits=operands[0] @ operands[1].T)
    counts = inputs.labels != -100
    token_logps = softmax.log_prob(inputs.labels.where(counts, 0)) * counts
    copg = copg_loss_ref(
        token_logps.view(8, 6).sum(1),
        inputs.ref_logps.double(),
        inputs.rewards.double(),
        beta=inputs.beta,
        group_size=4,
    )
    loss = copg - composition.entropy_coef(inputs) * softmax.entropy()[counts].mean()
    expected = torch.autograd.grad(loss, operands)
    truth = accuracy.exact(inputs, [providers.BONUS])
    torch.testing.assert_close(truth.gradients[providers.BONUS], expected)
    # Neither part is so small beside the other that a mistake in it would pass.
    total, (of_copg, _) = expected[0].norm(), truth.gradients[providers.TRAINABLE]
    assert of_copg.norm() > 0.25 * total and (expected[0] - of_copg).norm() > 0.25 * total


@pytest.mark.parametrize("name", [loaders.EAGER, loaders.OURS, "torch linear_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_providers_pass(name, dtype):
    rows = checked(name, tiny_inputs(dtype=dtype))
    last = "ok" if name in suites.WITH_ENTROPY else checks.NO_ENTROPY
    assert [row.status for row in rows] == ["ok"] * 4 + [last]
    assert rows[1].errors.dweight > 0 and rows[2].errors.dweight is None


# How a provider might get the bonus wrong: what it does to the entropies of the 24 of 48 tokens that count.
WRONG_BONUS = {
    "sign": lambda entropy: -entropy,
    "mean over all tokens": lambda entropy: entropy / 2,
    "none": torch.zeros_like,
}


# The bound of 16-bit operands is half of the gradient: it catches what turns the bonus around.
@pytest.mark.parametrize(
    ("fault", "dtype"), [*((fault, torch.float32) for fault in WRONG_BONUS), ("sign", torch.bfloat16)]
)
def test_wrong_bonus_costs_its_pass_the_time_and_no_other(monkeypatch, fault, dtype):
    def faulty(*operands):
        logps, entropy = providers.eager_logps_and_entropy(*operands)
        return logps, WRONG_BONUS[fault](entropy)

    planted = {"faulty": lambda device: providers.composed(providers.eager_token_logps, faulty)}
    monkeypatch.setattr(checks, "LOADERS", planted)
    *others, row = checked("faulty", make_inputs(TINY._replace(ignored=0.5), "rl", dtype, "cpu"))
    assert [other.status for other in others] == ["ok"] * 4
    assert (row.pass_name, row.status[:13]) == (providers.BONUS, "wrong numbers")


@pytest.mark.parametrize("fault", ["log-probs", "gradients", "nan"])
def test_wrong_provider_is_shown_with_its_error_and_no_time(monkeypatch, fault):
    def faulty(hidden_states, lm_head_weight, labels):
        logps = providers.eager_token_logps(hidden_states, lm_head_weight, labels)
        if fault == "log-probs":
            return logps + 1e-3
        if fault == "nan":
            return logps * torch.nan
        return logps + 1e-3 * (hidden_states - hidden_states.detach()).sum(-1)

    loaders = {"eager": providers.load_eager, "faulty": lambda device: providers.composed(faulty)}
    rows = tiny_table(monkeypatch, loaders)["rows"]
    # Right log-probs keep their time where only the gradients are wrong; wrong ones cost every pass its time.
    num_sound = 3 if fault == "gradients" else 2
    sound, wrong = rows[:num_sound], rows[num_sound:]
    assert all(row["status"] == "ok" and row["seconds"] > 0 for row in sound)
    assert all(row["status"].startswith("wrong numbers") and row["seconds"] is None for row in wrong)
    if fault == "log-probs":
        assert wrong[0]["logps_error"] == pytest.approx(48e-3, rel=1e-2)


def test_provider_that_cannot_run_keeps_its_row(monkeypatch):
    def missing(device):
        raise ImportError("no such library")

    def crashing(*operands):
        raise RuntimeError("no kernel for this GPU\nand a long story")

    loaders = {
        "eager": providers.load_eager,
        "missing": missing,
        "crashing": lambda device: providers.composed(crashing),
    }
    table = tiny_table(monkeypatch, loaders)
    for text in (tables.plain(table), tables.markdown(table)):
        assert "no such library" in text and text.count("missing") == 1
        assert "failed: RuntimeError: no kernel for this GPU" in text and "long story" not in text


# Floor, timing and memory


def test_floor_units_are_the_gemms_of_the_head():
    inputs = tiny_inputs()
    cases = timing.floor_cases(inputs)
    unit = 2 * TINY.num_tokens * TINY.vocab_size * TINY.hidden_size
    for run in cases.values():
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == unit
    assert tuple(cases) == timing.Floor._fields
    floor = timing.Floor(1.0, 10.0, 100.0)
    assert [floor.of(units) for units in (1, 2, 3, 4)] == [1, 11, 111, 112]


def test_rounds_alternate_and_stop_on_time():
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.time_alternating(cases, timing.Rounds(3), CPU, lambda: None)
    assert order == list("abcbcacab")
    assert all(timings[name].rounds == 3 for name in cases)
    cut_off = timing.time_alternating(cases, timing.Rounds(50, seconds=0.0), CPU, lambda: None)
    assert cut_off["a"].rounds == 2  # it had its share
    cut_off = timing.time_alternating(cases, timing.Rounds(50, seconds=1e-9, share=1e12), CPU, lambda: None)
    assert cut_off["a"].rounds == timing.LEAST_ROUNDS


@pytest.mark.skipif(not memory.RESET_MARK.exists(), reason="no high-water mark to reset")
def test_host_peak_counts_what_is_freed_and_not_what_is_returned():
    def run():
        scratch = torch.ones(40 * MIB // 4)
        return (torch.ones(20 * MIB // 4) + scratch[0],)

    _, peak = memory.host_peak(run)
    assert 39 * MIB < peak < 70 * MIB
    assert memory.host_peak(lambda: (torch.ones(30 * MIB // 4),))[1] < 2 * MIB


@pytest.mark.skipif(not memory.RESET_MARK.exists(), reason="no high-water mark to reset")
def test_eager_is_seen_to_hold_the_logits(tmp_path):
    shape = Shape("", 8192, 16, 1024, 16)
    inputs, passes = make_inputs(shape, "flat", torch.float32, "cpu"), ("log-probs", "loss+gradients")
    torch.save((tuple(inputs), tuple(accuracy.exact(inputs, passes))), tmp_path / "inputs.pt")
    rows = checks.check_in_child(tmp_path / "inputs.pt", loaders.EAGER, passes)
    logits = 4 * shape.num_tokens * shape.vocab_size
    assert [(row.pass_name, row.status) for row in rows] == [(name, "ok") for name in passes]
    assert rows[1].errors.dweight > 0
    assert 1.5 * logits < rows[1].peak_bytes < 4 * logits


def test_child_that_dies_leaves_a_row(tmp_path):
    (row,) = checks.check_in_child(tmp_path / "nothing.pt", loaders.EAGER, ("log-probs",))
    assert row.status.startswith("failed, exit status 1: FileNotFoundError")


# Results


def test_source_hash_follows_names_and_contents(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "kernels" / "b.py").write_text("y = 1\n")
    before = provenance.source_sha256(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    assert provenance.source_sha256(tmp_path) == before
    (tmp_path / "kernels" / "b.py").write_text("y = 2\n")
    changed = provenance.source_sha256(tmp_path)
    (tmp_path / "kernels" / "b.py").rename(tmp_path / "kernels" / "c.py")
    assert len({before, changed, provenance.source_sha256(tmp_path)}) == 3


def test_run_writes_json_with_provenance_and_plot(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    from bench import run

    monkeypatch.setitem(run.SHAPES, "tiny", TINY)
    monkeypatch.setattr(measure, "check_in_child", check_in_process)
    path = tmp_path / "new" / "results.json"
    chosen = ["--device", "cpu", "--shapes", "tiny", "--providers", loaders.EAGER, loaders.OURS]
    run.main([*chosen, "--regimes", "rl", "flat", "--repeats", "3", "--json", str(path)])

    results = json.loads(path.read_text())
    origin = results["provenance"]
    assert origin["source_sha256"] == provenance.source_sha256()
    assert {"date", "command", "commit", "device", "versions"} <= set(origin)
    assert {"python", "torch", "triton"} <= set(origin["versions"])
    assert [table["regime"] for table in results["tables"]] == ["rl", "flat"]
    for row in results["tables"][0]["rows"]:
        assert row["seconds"] > 0 and row["over_floor"] > 0
        assert row["units"] == {"log-probs": 1, "loss+gradients": 3, "frozen head": 2}[row["pass"]]
    printed = capsys.readouterr().out
    assert "not measured" in printed and loaders.OURS in printed
    plotted = find_spec("matplotlib") is not None
    assert path.with_suffix(".png").exists() == plotted
    assert path.with_name("results-pareto.png").exists() == plotted


def test_suite_skips_tables_when_late_and_says_so(monkeypatch, tmp_path, capsys):
    pytest.importorskip("tqdm")
    from bench import run

    twice = [suites.Job("heads", TINY), suites.Job("regimes", TINY, "flat")]
    monkeypatch.setitem(run.SUITES, "full", lambda device: twice)
    monkeypatch.setattr(measure, "check_in_child", check_in_process)
    monkeypatch.setattr(run, "measure_fidelity", lambda names, device: {})
    chosen = ["--device", "cpu", "--suite", "full", "--providers", loaders.EAGER, "--repeats", "1"]
    results = run.main([*chosen, "--minutes", "1e-6", "--json", str(tmp_path / "results.json")])
    assert [table["about"] for table in results["tables"]] == ["heads"]
    assert results["skipped"] == ["regimes, tiny flat T=48"]
    assert "time was up: regimes, tiny flat" in capsys.readouterr().out


def test_report_says_when_the_sources_have_changed(monkeypatch):
    results = {
        "provenance": provenance.provenance(CPU),
        "tables": [tiny_table(monkeypatch, {"eager": providers.load_eager})],
    }
    same = report.report(results, results["provenance"]["source_sha256"])
    assert "Out of date" not in same and "| eager | log-probs |" in same
    assert "Out of date" in report.report(results, "0" * 64)


def test_newest_results_by_the_date_inside(tmp_path):
    for name, date in (("a", "2026-02-01"), ("b", "2026-03-01"), ("c", "2026-01-01")):
        (tmp_path / name).mkdir()
        text = json.dumps({"provenance": {"date": date}})
        (tmp_path / name / "results.json").write_text(text)
    assert report.newest(tmp_path) == tmp_path / "b" / "results.json"
    with pytest.raises(SystemExit, match="no results"):
        report.newest(tmp_path / "a" / "nothing")
