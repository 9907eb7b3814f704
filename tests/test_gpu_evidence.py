"""`make gpu-evidence`: a crash, a hang or the end of the time costs one part, and what was known is on the disk."""

import ast
import datetime
import json
import os
import sys
import time
from functools import partial

import pytest
import torch

from bench import (
    evidence_tables,
    evidence_tests,
    evidence_tune,
    fidelity,
    gpu_evidence,
    loaders,
    measure,
    provenance,
    suites,
)
from bench import parts as parts_module
from bench.evidence_summary import Page, summary
from bench.inputs import Shape
from bench.log_failures import read_log
from bench.parts import CRASHED, FAILED, NOT_RUN, PASSED, RUNNING, STOPPED, TIMED_OUT, Line, Part, Stage, run_parts
from tests.test_bench import CPU, TINY, check_in_process, tiny_table

DIE = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import faulthandler, time; faulthandler.enable(); print('so far', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(parts_module, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(gpu_evidence, "expect_the_worst", lambda: None)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def python(name, code, seconds=30.0, again=(), *arguments):
    return Part(name, (sys.executable, "-S", "-c", code, *arguments), seconds, again)


def by_exit_code(ended):
    how = parts_module.how_it_ended(ended)
    status = TIMED_OUT if ended.timed_out else CRASHED if ended.returncode < 0 else PASSED
    return Line(ended.part.name, FAILED if ended.returncode > 0 else status, how, ended.seconds)


def run(folder, parts, judge=by_exit_code, jobs=1, seconds=30.0, tell=None):
    told = []
    stage = Stage(folder, time.monotonic() + seconds, jobs, {}, judge, tell or told.append)
    run_parts(parts, stage)
    return [line for line in told if line.status not in (RUNNING, "waiting")]


# Parts


def test_what_befalls_one_part_costs_the_others_nothing(tmp_path):
    parts = [
        python("crash", DIE),
        python("hang", HANG, seconds=0.5),
        python("failure", "raise ValueError('planted')"),
        python("fine", "print('done')"),
    ]
    crash, hang, failure, fine = run(tmp_path, parts)
    assert (crash.status, crash.detail) == (CRASHED, "SIGSEGV: so far")
    assert hang.status == TIMED_OUT and 0.5 < hang.seconds < 5
    assert (failure.status, failure.detail) == (FAILED, "exit code 1: ValueError: planted")
    assert fine.status == PASSED and (tmp_path / "fine.txt").read_text() == "done\n"
    printed = (tmp_path / "hang.txt").read_text()
    assert printed.startswith("so far") and "line 1 in <module>" in printed  # and where it was


def test_no_part_begins_when_the_time_is_up_and_none_outlives_it(tmp_path):
    first, second = run(tmp_path, [python("long", HANG), python("late", "")], seconds=0.5)
    assert first.status == TIMED_OUT and first.seconds < 5
    assert second == Line("late", NOT_RUN, "the time was up")


def test_a_crash_is_tried_again_at_once_and_a_hang_last(tmp_path):
    again = ((), ("fine",))
    hang = "import sys; sys.argv[-1] == 'fine' or __import__('time').sleep(60)"
    die = "import os, sys; sys.argv[-1] == 'fine' or os.kill(os.getpid(), 9)"
    parts = [python("hang", hang, 0.3, again[1:]), python("crash", die, 30.0, again), python("fine", "")]
    lines = run(tmp_path, parts)
    names = ["hang", "crash", "crash, again", "crash, again, again", "fine", "hang, again"]
    assert [line.name for line in lines] == names
    assert [line.status for line in lines] == [TIMED_OUT, CRASHED, CRASHED, PASSED, PASSED, PASSED]


def test_a_result_that_cannot_be_read_is_told(tmp_path):
    def judge(ended):
        return {}[ended.part.name]

    lines = run(tmp_path, [python("a", ""), python("b", "")], judge)
    assert [(line.status, line.detail) for line in lines] == [
        (FAILED, f"its result cannot be read: KeyError('{name}')") for name in "ab"
    ]


def test_parts_and_what_they_started_end_with_the_run(tmp_path):
    """As on SIGTERM, which raises SystemExit wherever the run is."""
    file, told = tmp_path / "pids", []
    start = (
        f"import subprocess; child = subprocess.Popen(['sleep', '60']); open({str(file)!r}, 'w').write(str(child.pid))"
    )

    def tell(line):
        told.append(line)
        if line.name == "quick" and line.status == PASSED:
            sys.exit("stopped")

    wait = f"import os, time\nwhile not os.path.getsize({str(file)!r}): time.sleep(0.01)"
    file.touch()
    with pytest.raises(SystemExit):
        run(tmp_path, [python("long", f"{start}; {HANG}"), python("quick", wait)], jobs=2, tell=tell)
    assert (told[-1].name, told[-1].status) == ("long", STOPPED)
    child = int(file.read_text())
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.05)
    raise AssertionError("a grandchild runs on")


def alive(pid):
    """Not counting a process that has ended and that nobody has waited for."""
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Tests


TESTS = """
import os, signal, sys, time, types
from pathlib import Path

LOG = Path({log!r})

def test_wrong():
    planted = 6 * 7
    print("printed before")
    assert planted == 41

def test_reads_the_log():
    assert "planted    = 42" in LOG.read_text() and "printed before" in LOG.read_text()

def test_dies():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs():
    time.sleep(60)

def test_loses_the_gpu():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCompile with")
    sys.modules["torch"] = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    )

def test_last():
    pass
"""


def test_a_file_of_tests_goes_on_after_each_that_took_its_process_along(tmp_path):
    log, file = tmp_path / "tests.txt", tmp_path / "tests" / "test_planted.py"
    file.parent.mkdir()
    file.write_text(TESTS.format(log=str(log)))
    (part,) = evidence_tests.test_parts(log, 30.0, ("--rootdir", str(tmp_path), "--test-seconds", "0.5"))[:1]
    command = (*part.command[:-1], "-c", os.devnull, str(file))
    part = part._replace(name="test_planted.py", command=command, again=((),) * 3)
    lines = run(tmp_path / "parts", [part], partial(evidence_tests.judge, log))

    node = "tests/test_planted.py::test_"
    assert [line.status for line in lines] == [CRASHED, CRASHED, CRASHED, FAILED]
    assert lines[0].detail.startswith(f"1 passed, 1 failed; test_wrong; in {node}dies; SIGSEGV: ")
    assert f"in {node}hangs; exit code 1" in lines[1].detail
    assert "the GPU no longer answers after" in lines[2].detail and "exit code 70" in lines[2].detail
    assert lines[3].detail == "3 passed, 1 failed, 1 error, 2 crashed; test_wrong, test_loses_the_gpu"
    found = read_log(log, "tests/test_planted.py")
    assert found["passed"] == [f"{node}{name}" for name in ("reads_the_log", "loses_the_gpu", "last")]
    text = log.read_text()
    assert "Timeout (0:00:00" in text and "in test_hangs" in text  # its stack
    assert "    The GPU no longer answers: CUDA error: an illegal memory access was encountered\n" in text


def test_a_file_that_cannot_be_imported_fails_with_its_traceback(tmp_path):
    log, file = tmp_path / "tests.txt", tmp_path / "tests" / "test_planted.py"
    file.parent.mkdir()
    file.write_text("import nothing_of_that_name\n")
    (part,) = evidence_tests.test_parts(log, 30.0, ("--rootdir", str(tmp_path)))[:1]
    part = part._replace(name="test_planted.py", command=(*part.command[:-1], "-c", os.devnull, str(file)))
    (line,) = run(tmp_path / "parts", [part], partial(evidence_tests.judge, log))
    assert line.status == FAILED and "1 error" in line.detail
    assert "No module named 'nothing_of_that_name'" in log.read_text()


def test_without_pytest_nothing_counts_as_passed(tmp_path):
    ended = parts_module.Ended(Part("test_kernels.py", (), 1.0), 1, False, 1.0, tmp_path / "printed")
    ended.output.write_text("python: No module named pytest\n")
    line = evidence_tests.judge(tmp_path / "tests.txt", ended)
    assert (line.status, line.detail) == (CRASHED, "exit code 1: python: No module named pytest")


def test_the_files_are_there_and_are_all_that_run_on_a_device():
    folder = provenance.ROOT / "tests"
    files = evidence_tests.FILES
    assert len(set(files)) == len(files) and set(evidence_tests.OPTIONS) <= set(files)
    assert [file for file in files if not (provenance.ROOT / file).is_file()] == []
    on_a_device = {f"tests/{path.name}" for path in folder.glob("test_*.py") if imports_a_device(path)}
    assert on_a_device - set(files) == set(), "bench/evidence_tests.py leaves out tests that run on a GPU"
    everything = {path.name for path in folder.glob("test_*.py")}
    assert {file.removeprefix("tests/") for file in files} | set(evidence_tests.left_out()) == everything


def imports_a_device(path):
    found = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    names = {alias.name for node in found if node.module == "tests.conftest" for alias in node.names}
    return bool(names & {"DEVICE", "BACKENDS"})


# Tables


WRITE = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write(sys.argv[1])"


def table_part(folder, name, only, results):
    file = folder / f"table-{only}.json"
    return python(name, WRITE, 30.0, (), json.dumps(results), "--json", str(file))


@pytest.fixture(scope="module")
def measured_once():
    with pytest.MonkeyPatch.context() as patched:
        return json.dumps(tiny_table(patched, {name: loaders.LOADERS[name] for name in (loaders.EAGER, loaders.OURS)}))


@pytest.fixture
def results(measured_once):
    return {"tables": [json.loads(measured_once)], "skipped": []}


def test_a_table_in_which_ours_is_wrong_has_failed(results, tmp_path):
    (fine,) = run(tmp_path, [table_part(tmp_path, "table 1", 1, results)], evidence_tables.judge)
    assert (fine.status, fine.detail) == (PASSED, "4 of 4 rows")
    peer, *_, ours = results["tables"][0]["rows"]
    peer["status"] = "failed: no kernel"
    (fine,) = run(tmp_path, [table_part(tmp_path, "table 1", 1, results)], evidence_tables.judge)
    assert (fine.status, fine.detail) == (PASSED, "3 of 4 rows")
    ours["status"] = "wrong numbers: dX"
    (bad,) = run(tmp_path, [table_part(tmp_path, "table 1", 1, results)], evidence_tables.judge)
    assert (bad.status, bad.detail) == (FAILED, "2 of 4 rows; copg-kernels: wrong numbers: dX")


def test_tables_come_together_and_those_that_are_missing_are_named(monkeypatch, tmp_path, results):
    jobs = [suites.Job("heads", TINY), suites.Job("regimes", TINY, "flat")]
    monkeypatch.setitem(evidence_tables.SUITES, "full", lambda device: jobs)
    first, fidelity_part, second = evidence_tables.table_parts(tmp_path, "full", 30.0, ("--repeats", "2"))
    assert first.name == "table 1, heads, tiny rl T=48" and fidelity_part.name == "fidelity"
    assert first.again == (("--providers", "eager", "copg-kernels"),)

    (tmp_path / "table-1.json").write_text(json.dumps(results))
    rows = fidelity.measure_fidelity((loaders.OURS,), CPU, Shape("", 64, 16, 32, 8))
    (tmp_path / "table-fidelity.json").write_text(json.dumps({"tables": [], "skipped": [], "fidelity": rows}))
    evidence_tables.merge(tmp_path, [first, fidelity_part, second], provenance.provenance(CPU), "full", "# REHEARSAL")
    merged = json.loads((tmp_path / "results.json").read_text())
    assert list(merged) == ["provenance", "suite", "tables", "skipped", "fidelity"] and merged["fidelity"] == rows
    assert merged["skipped"] == ["regimes, tiny flat T=48"] and merged["tables"] == results["tables"]
    tables = (tmp_path / "tables.md").read_text()
    assert tables.startswith("# REHEARSAL\n") and "| eager | log-probs |" in tables and "fidelity with" in tables


def test_a_table_is_in_the_file_before_the_next_one_begins(monkeypatch, tmp_path):
    pytest.importorskip("tqdm")
    from bench import run as bench_run

    path = tmp_path / "results.json"
    three = [suites.Job("heads", TINY), suites.Job("regimes", TINY, "flat"), suites.Job("regimes", TINY, "base")]
    measure_table = bench_run.measure_table

    def crashing(shape, regime, settings, advance):
        if regime == "base":
            raise RuntimeError("planted")
        return measure_table(shape, regime, settings, advance)

    monkeypatch.setitem(bench_run.SUITES, "full", lambda device: three)
    monkeypatch.setattr(bench_run, "measure_table", crashing)
    monkeypatch.setattr(measure, "check_in_child", check_in_process)
    chosen = ["--suite", "full", "--only", "2", "3", "--device", "cpu", "--providers", loaders.EAGER, "--repeats", "1"]
    with pytest.raises(RuntimeError, match="planted"):
        bench_run.main([*chosen, "--json", str(path)])
    assert [table["regime"] for table in json.loads(path.read_text())["tables"]] == ["flat"]


def test_only_takes_no_tables_of_ones_own(capsys):
    pytest.importorskip("tqdm")
    from bench import run as bench_run

    with pytest.raises(SystemExit):
        bench_run.parse(["--only", "1", "--tokens", "64"])
    assert "--only chooses among a suite's tables" in capsys.readouterr().err


def test_the_rehearsed_suite_is_tiny():
    jobs = suites.tiny(CPU)
    assert [job.about for job in jobs] == ["heads", "regimes", "entropy bonus", "ignored tokens"]
    for job in jobs:
        assert job.shape.num_tokens % (job.shape.completion_length * job.shape.group_size) == 0
        assert job.shape.num_tokens * job.shape.vocab_size <= 2**16


# The whole


def test_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu_evidence.main([])


TUNED = "import sys; open(sys.argv[1], 'w').write('{\"entries\": [{}]}')"


def tune_part(folder, code=TUNED):
    file = str(evidence_tune.file_of(folder))
    return python("tune", code, 30.0, (), file, "--out", file)


def planted(monkeypatch, tests, tables, tune=TUNED):
    monkeypatch.setattr(evidence_tune, "tune_part", lambda folder, seconds, options: tune_part(folder, tune))
    monkeypatch.setattr(evidence_tests, "test_parts", lambda log, seconds, options: tests)
    monkeypatch.setattr(evidence_tables, "table_parts", lambda folder, suite, seconds, options: tables(folder))
    monkeypatch.setattr(evidence_tables, "plot_part", lambda folder, seconds: python("plots", ""))


def test_the_page_is_true_after_every_part_and_says_rehearsal(monkeypatch, tmp_path, capsys, results):
    pages = []
    tell = gpu_evidence.tell

    def told(run, line):
        tell(run, line)
        pages.append((run.folder / "summary.md").read_text())

    monkeypatch.setattr(gpu_evidence, "tell", told)
    monkeypatch.setattr(gpu_evidence, "TEST_JOBS", 1)
    planted(
        monkeypatch,
        [python("test_a.py", DIE), python("test_b.py", "")],
        lambda folder: [table_part(folder, "table 1", 1, results)],
    )
    assert gpu_evidence.main(["--rehearse", "--out", str(tmp_path / "new")]) == 1
    for page in pages:
        assert page.startswith("# REHEARSAL") and "**Not finished**" in page
        assert all(name in page for name in ("| tune |", "| test_a.py |", "| test_b.py |", "| table 1 |", "| plots |"))
    # Each of the two waited, ran, and came to an end.
    after_the_first = next(page for page in pages if "SIGSEGV" in page)
    assert "| test_a.py | **crashed**: SIGSEGV: so far |" in after_the_first
    assert "| test_b.py | waiting |" in after_the_first and "| table 1 | waiting |" in after_the_first

    final = (tmp_path / "new" / "summary.md").read_text()
    origin = provenance.provenance(CPU)
    assert final.startswith("# REHEARSAL") and "1 of 5 parts did not pass, 0 of them not run" in final
    torch_version = f"torch {origin['versions']['torch']}"
    assert all(text in final for text in (origin["source_sha256"], origin["device"], torch_version))
    assert "- command: `" in final and "- date: " in final and "test_gpu_evidence.py" in final
    assert final in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "new").iterdir()}
    assert left == {"summary.md", "tuned.json", "output.txt", "results.json", "tables.md"}
    assert "== test_a.py\nso far\n" in (tmp_path / "new" / "output.txt").read_text()


@pytest.mark.parametrize("tune", [TUNED, DIE])
def test_tables_are_measured_with_what_was_tuned_just_before_or_with_the_defaults(monkeypatch, tmp_path, results, tune):
    """And never with what else was tuned on the machine."""
    monkeypatch.setenv("COPG_TUNED", "elsewhere.json")
    out = tmp_path / "out"
    in_force = str(out / "tuned.json") if tune is TUNED else "off"
    write = f"import os; assert os.environ['COPG_TUNED'] == {in_force!r}; {WRITE}"

    def tables(folder):
        part = table_part(folder, "table 1", 1, results)
        return [part._replace(command=(*part.command[:3], write, *part.command[4:]))]

    planted(monkeypatch, [python("test_a.py", "")], tables, tune)
    assert gpu_evidence.main(["--rehearse", "--out", str(out)]) == (tune is DIE)
    page, file = (out / "summary.md").read_text(), "tuned.json" if tune is TUNED else "the code's defaults"
    assert "| table 1 | passed" in page and f"- settings of its heads: {file}" in page
    assert ("| tune | passed: 1 heads |" if tune is TUNED else "| tune | **crashed**: 0 heads; SIGSEGV") in page
    assert json.loads((out / "results.json").read_text())["provenance"]["tuned"] == file


def test_the_rehearsed_tuning_is_tiny_and_within_its_time(tmp_path):
    part = evidence_tune.tune_part(tmp_path, 120.0, gpu_evidence.REHEARSAL.tune_options)
    options = dict(zip(part.command, part.command[1:], strict=False))
    assert float(options["--minutes"]) * 60 <= 10
    longer = evidence_tune.tune_part(tmp_path, 120.0)
    assert float(longer.command[longer.command.index("--minutes") + 1]) * 60 <= 0.8 * longer.seconds
    assert int(options["--head"]) * int(options["--tokens"]) <= 2**10


def test_only_a_run_of_which_every_part_passed_is_a_success(monkeypatch, tmp_path, results):
    planted(monkeypatch, [python("test_a.py", "")], lambda folder: [table_part(folder, "table 1", 1, results)])
    arguments = ["--rehearse", "--out", str(tmp_path / "out")]
    assert gpu_evidence.main(arguments) == 0
    assert "every part passed" in (tmp_path / "out" / "summary.md").read_text()
    # A second run of the same name leaves the first as it is.
    before = (tmp_path / "out" / "summary.md").read_text()
    assert gpu_evidence.main([*arguments, "--minutes", "0"]) == 1
    assert (tmp_path / "out" / "summary.md").read_text() == before
    assert "4 of 4 parts did not pass, 4 of them not run" in (tmp_path / "out-2" / "summary.md").read_text()


def test_evidence_of_the_same_day_gets_a_folder_of_its_own(tmp_path):
    wanted = gpu_evidence.evidence_folder(tmp_path, "NVIDIA H200", datetime.date(2026, 1, 2))
    for name in ("nvidia-h200-2026-01-02", "nvidia-h200-2026-01-02-2", "nvidia-h200-2026-01-02-3"):
        folder = gpu_evidence.new_folder(wanted)
        assert folder == tmp_path / name and gpu_evidence.new_folder(wanted) == folder  # empty: still free
        (folder / "summary.md").touch()


def test_a_rehearsal_stays_out_of_the_results(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpu_evidence.tempfile, "tempdir", None)
    assert gpu_evidence.default_folder(gpu_evidence.REHEARSAL).parent == tmp_path


def test_evidence_does_not_say_rehearsal():
    page = Page(gpu_evidence.EVIDENCE.heading, provenance.provenance(CPU), ["test_docs.py"])
    text = summary(page, {"a": Line("a", PASSED, "2 passed | 1", 1.0)}, minutes=7.25)
    assert "REHEARSAL" not in text and "Finished after 7.2 minutes: **every part passed**" in text
    assert "| a | passed: 2 passed \\| 1 | 1.0 |" in text and "test_docs.py" in text
