"""`copg_kernels.tune`: what it finds is right before it is fast, and operators believe no file unread."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

import copg_kernels
from copg_kernels import checks, linear_logps, tune, tuned
from copg_kernels.kernels import blocks as table
from copg_kernels.kernels.blocks import BLOCKS, head_blocks, vocab_block
from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.tuned import Settings
from copg_kernels.tuning import file, passes, run, search, timing
from copg_kernels.tuning.heads import HEADS, head_of_model
from copg_kernels.tuning.passes import Head, make_case

if not INTERPRETING:
    pytest.skip("at shapes for the interpreter, whose device these files name", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
CPU, NAME = torch.device("cpu"), tuned.INTERPRETER
V, H = 64, 16
HEAD = Head(torch.float32, V, H)
ENTRY = BLOCKS[NAME, 4]
WIDER = ENTRY._replace(BLOCK_V=2 * ENTRY.BLOCK_V)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path, one_thread):
    """A process that has read nothing yet, and a cache folder with nothing in it."""
    monkeypatch.setattr(tuned, "_in_force", {})
    monkeypatch.delenv("COPG_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def path():
    return file.default_path(NAME)


def entry_of(vocab_size=V, hidden_size=H, dtype="float32", blocks=WIDER, **settings):
    return {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        **Settings(blocks=None if blocks is None else blocks._asdict())._asdict(),
        **settings,
    }


def weight_of(vocab_size=V, hidden_size=H, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)


def token_logps(weight):
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(4, weight.shape[1], generator=generator).to(weight.dtype)
    return linear_logps(hidden_states, weight, torch.arange(4), backend="triton")


# What operators read


LAUNCH = """
import sys
import torch
from triton.runtime.interpreter import GridExecutor
from copg_kernels import linear_logps

execute = GridExecutor.__call__
def launch(self, *args, **kwargs):
    if "BLOCK_V" in kwargs:
        print(kwargs["BLOCK_V"])
    return execute(self, *args, **kwargs)
GridExecutor.__call__ = launch
for V in map(int, sys.argv[1:]):
    linear_logps(torch.randn(2, 16), torch.randn(V, 16), torch.zeros(2, dtype=torch.int64), backend="triton")
"""


def test_operators_of_a_new_process_run_with_the_tuned_blocks_and_other_heads_with_the_codes(path):
    file.write(path, NAME, [entry_of()])
    command = [sys.executable, "-c", LAUNCH, str(V), str(V + 1)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.getcwd())
    assert ended.stdout.split() == [str(WIDER.BLOCK_V), str(ENTRY.BLOCK_V)], ended.stderr
    assert "is ignored" not in ended.stderr


def test_only_this_head_of_this_dtype_is_tuned(path):
    file.write(path, NAME, [entry_of(logps="sliced", workspace_bytes=2**20)])
    settings = tuned.settings_of(weight_of())
    assert settings == Settings("sliced", "fused", WIDER._asdict(), 2**20)
    assert head_blocks(weight_of()) == WIDER
    for other in (weight_of(V + 16), weight_of(V, 32), weight_of(dtype=torch.float16)):
        assert tuned.settings_of(other) == Settings()
        assert head_blocks(other) == BLOCKS[NAME, other.element_size()]


def test_an_irregular_head_keeps_its_own_blocks(path):
    file.write(path, NAME, [entry_of(V, 20)])
    assert head_blocks(weight_of(V, 20)) == table.IRREGULAR[NAME, 4]


def test_slices_of_the_vocabulary_are_multiples_of_every_tile(path):
    assert vocab_block(CPU, torch.float32) == ENTRY.BLOCK_V
    tuned._in_force.clear()
    file.write(path, NAME, [entry_of(), entry_of(V + 16, blocks=ENTRY), entry_of(dtype="float16", blocks=None)])
    assert vocab_block(CPU, torch.float32) == WIDER.BLOCK_V
    assert vocab_block(CPU, torch.float16) == BLOCKS[NAME, 2].BLOCK_V
    with tuned.trying(Settings(blocks=WIDER._replace(BLOCK_V=256)._asdict())):
        assert vocab_block(CPU, torch.float32) == 256
    with tuned.trying(Settings()):
        assert vocab_block(CPU, torch.float32) == ENTRY.BLOCK_V


def test_the_workspace_is_tuned_where_the_caller_names_none_and_the_kernels_run(path):
    file.write(path, NAME, [entry_of(workspace_bytes=2**22)])
    arguments = (torch.empty(4, H), 4)
    assert checks.check_workspace(None, *arguments, "triton", weight_of()) == 2**22
    assert checks.check_workspace(2**21, *arguments, "triton", weight_of()) == 2**21
    assert checks.check_workspace(None, *arguments, "triton", weight_of(V + 16)) == 2**30
    assert checks.check_workspace(None, *arguments, "torch", weight_of()) == 2**27
    tuned._in_force.clear()
    file.write(path, NAME, [entry_of(workspace_bytes=1)])
    least = checks.check_workspace(None, *arguments, "triton", weight_of())
    assert least == checks.least_workspace_bytes(4, H, torch.float32, CPU, "triton") > 1


def test_torch_compile_takes_the_file_as_it_is_and_breaks_no_graph(path):
    file.write(path, NAME, [entry_of(workspace_bytes=2**22)])
    compiled = torch.compile(token_logps_of, fullgraph=True, backend="eager", dynamic=True)
    workspace = torch.compile(workspace_of, fullgraph=True, backend="eager", dynamic=True)
    hidden_states = torch.randn(4, H)
    for weight, expected in ((weight_of(), 2**22), (weight_of(V + 16), 2**30)):
        assert torch.equal(compiled(hidden_states, weight), token_logps_of(hidden_states, weight))
        assert workspace(hidden_states, weight).item() == expected
    assert head_blocks(weight_of()) == WIDER


def token_logps_of(hidden_states, weight):
    return linear_logps(hidden_states, weight, torch.arange(len(hidden_states)), backend="triton")


def workspace_of(hidden_states, weight):
    return torch.full((), checks.check_workspace(None, hidden_states, 4, "triton", weight))


def test_a_file_is_read_once_by_many_threads(monkeypatch, path):
    file.write(path, NAME, [entry_of()])
    read, times = file.read, []
    slowly = lambda *arguments: times.append(1) or time.sleep(0.05) or read(*arguments)
    monkeypatch.setattr(file, "read", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(tuned.settings_of(weight_of()))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 1 and {each.blocks["BLOCK_V"] for each in found} == {WIDER.BLOCK_V}
    file.write(path, NAME, [entry_of(blocks=ENTRY)])  # of a tuning beside this process
    assert tuned.settings_of(weight_of()).blocks == WIDER._asdict()


# Files that are of no use


def whole(**changes):
    return json.dumps(file.origin(NAME) | {"entries": [entry_of()]} | changes)


def with_entry(**changes):
    return whole(entries=[entry_of() | changes])


def with_blocks(**changes):
    return with_entry(blocks=WIDER._asdict() | changes)


UNUSABLE = {
    "empty": ("", "it is no JSON"),
    "truncated": (whole()[:-20], "it is no JSON"),
    "binary": (b"\xff\xfe\x00", "it is no JSON"),
    "a list": ("[]", r"it must be a JSON object, got \[\]"),
    "older": (whole(format=0), "its format is 0, here it is 1"),
    "without a format": (json.dumps({"entries": []}), "its format is None, here it is 1"),
    "another package": (whole(copg_kernels="0.0.1"), "its copg_kernels is '0.0.1', here it is '0.1.0'"),
    "another device": (whole(device="NVIDIA H100"), "its device is 'NVIDIA H100', here it is 'interpreter'"),
    "another triton": (whole(triton="1.0"), "its triton is '1.0', here it is"),
    "another torch": (whole(torch="1.0"), "its torch is '1.0', here it is"),
    "no entries": (whole(entries={}), "its entries must be a list, got {}"),
    "a bare entry": (whole(entries=[1]), "entry 0 must be an object, got 1"),
    "dtype": (with_entry(dtype="float64"), "dtype of entry 0 must be one of .* got 'float64'"),
    "dtype, a list": (with_entry(dtype=[]), r"dtype of entry 0 must be one of .* got \[\]"),
    "vocabulary": (with_entry(vocab_size=0), "vocab_size of entry 0 must be a positive number, got 0"),
    "way": (with_entry(loss="fastest"), "loss of entry 0 must be one of fused, sliced, got 'fastest'"),
    "way, a list": (with_entry(loss=["fused"]), "loss of entry 0 must be one of fused, sliced"),
    "workspace": (with_entry(workspace_bytes=-1), "workspace_bytes of entry 0 must be null or a positive number"),
    "workspace, true": (with_entry(workspace_bytes=True), "workspace_bytes of entry 0 must be null or a positive"),
    "blocks, a number": (with_entry(blocks=64), "the blocks of entry 0 must have the fields BLOCK_N"),
    "blocks, one missing": (with_entry(blocks={"BLOCK_N": 16}), "the blocks of entry 0 must have the fields BLOCK_N"),
    "blocks, one unknown": (with_blocks(BLOCK_Q=16), "the blocks of entry 0 must have the fields BLOCK_N"),
    "no power of two": (with_blocks(BLOCK_V=48), "BLOCK_V of the blocks of entry 0 must be a power of two.* got 48"),
    "a small tile": (with_blocks(BLOCK_N=8), "BLOCK_N of the blocks of entry 0 must be a power of two.* got 8"),
    "a float": (with_blocks(BLOCK_H=32.0), "BLOCK_H of the blocks of entry 0 must be a power of two.* got 32.0"),
    "a string": (with_blocks(num_warps="4"), "num_warps of the blocks of entry 0 must be a power of two.* got '4'"),
    "no stage": (with_blocks(num_stages=0), "num_stages of the blocks of entry 0 must be a number from 1 to 16"),
    "no split": (with_blocks(tiles_per_split=0), "tiles_per_split of the blocks of entry 0 must be a positive"),
    "no flag": (with_blocks(use_tma="no"), "use_tma of the blocks of entry 0 must be true or false, got 'no'"),
    "TF32": (with_blocks(precision="tf32"), "precision of the blocks of entry 0 must be ieee or tf32x3, got 'tf32'"),
    "registers": (with_blocks(max_registers=300), "max_registers of the blocks of entry 0 must be null or a number"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_is_named_once_and_the_defaults_are_in_force(path, name):
    content, why = UNUSABLE[name]
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=rf"{re.escape(path.name)} is ignored, .*: {why}") as told:
        assert tuned.settings_of(weight_of()) == Settings()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert head_blocks(weight_of()) == ENTRY and vocab_block(CPU, torch.float32) == ENTRY.BLOCK_V


def test_results_beside_an_unusable_file_are_those_of_the_defaults(path):
    expected = token_logps(weight_of())
    tuned._in_force.clear()
    path.parent.mkdir(parents=True)
    path.write_text(whole()[:-20])
    with pytest.warns(UserWarning, match="is ignored"):
        assert torch.equal(token_logps(weight_of()), expected)


def test_a_warning_that_is_an_error_is_raised_once_and_training_goes_on(path):
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is ignored"):
            tuned.settings_of(weight_of())
        assert tuned.settings_of(weight_of()) == Settings()


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_the_variable_turns_it_off(monkeypatch, path, value):
    file.write(path, NAME, [entry_of()])
    monkeypatch.setenv("COPG_TUNED", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert head_blocks(weight_of()) == ENTRY


def test_the_variable_names_another_file(monkeypatch, tmp_path, path):
    file.write(path, NAME, [entry_of(logps="sliced")])
    file.write(tmp_path / "named.json", NAME, [entry_of(loss="sliced")])
    monkeypatch.setenv("COPG_TUNED", str(tmp_path / "named.json"))
    assert tuned.settings_of(weight_of())[:2] == ("fused", "sliced")
    tuned._in_force.clear()
    monkeypatch.setenv("COPG_TUNED", "")
    assert tuned.settings_of(weight_of())[:2] == ("sliced", "fused")


def test_a_named_file_that_is_missing_is_told(monkeypatch, tmp_path, path):
    file.write(path, NAME, [entry_of()])
    monkeypatch.setenv("COPG_TUNED", str(tmp_path / "gone.json"))
    with pytest.warns(UserWarning, match=r"gone\.json is ignored.*it cannot be read \(No such file"):
        assert tuned.settings_of(weight_of()) == Settings()


@pytest.mark.parametrize("named", ["~nobody-of-that-name/tuned.json", "."])
def test_a_name_that_is_no_file_is_told(monkeypatch, named):
    monkeypatch.setenv("COPG_TUNED", named)
    with pytest.warns(UserWarning, match=r"is ignored.*it cannot be read"):
        assert tuned.settings_of(weight_of()) == Settings()


def test_without_a_home_there_is_no_file(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(file.Path, "home", no_home)
    assert tuned.settings_of(weight_of()) == Settings()
    with pytest.raises(ValueError, match="out must be given, as there is no home folder"):
        tune.tune()


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_show_says_what_is_in_force(monkeypatch, tmp_path, path, capsys):
    tune.show()
    assert capsys.readouterr().out == f"interpreter: no file {path}: the code's defaults\n"
    tuned._in_force.clear()
    file.write(path, NAME, [entry_of(loss="sliced", workspace_bytes=2**22)])
    assert tune.main(["--show"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"interpreter: {path}\n  float32 64 x 16: log-probs fused, loss sliced, blocks BLOCK_N=16")
    assert "workspace 4 MiB\n  any other head: the code's defaults\n" in shown
    tuned._in_force.clear()
    monkeypatch.setenv("COPG_TUNED", "off")
    tune.show()
    assert capsys.readouterr().out == "interpreter: COPG_TUNED=off: the code's defaults\n"


# The file as it is written


def test_a_write_that_is_cut_off_leaves_the_file_before_it(monkeypatch, path):
    file.write(path, NAME, [entry_of()])
    before = path.read_text()

    def killed(half, text, **options):
        half.write_bytes(text[:100].encode())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(path), "write_text", killed)
        file.write(path, NAME, [entry_of(V + 16)])
    assert path.read_text() == before and os.listdir(path.parent) == [path.name]


def test_an_entry_takes_the_place_of_its_heads_own_and_of_no_other(path):
    file.write(path, NAME, [entry_of(), entry_of(V + 16), entry_of(dtype="float16")])
    file.write(path, NAME, [entry_of(logps="sliced")])
    entries = file.read(path, NAME)
    found = {(entry.dtype, entry.vocab_size): entry.settings.logps for entry in entries}
    half, single = torch.float16, torch.float32
    assert len(entries) == 3 and found == {(single, V): "sliced", (single, V + 16): "fused", (half, V): "fused"}
    path.write_text(whole(format=0))
    file.write(path, NAME, [entry_of(V + 32)])
    assert [entry.vocab_size for entry in file.read(path, NAME)] == [V + 32]


def write_some(path, first):
    for vocab_size in range(first, first + 20):
        file.write(path, NAME, [entry_of(vocab_size)])


def test_two_processes_that_write_at_once_lose_nothing(path):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_some, args=(path, first)) for first in (100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert {entry.vocab_size for entry in file.read(path, NAME)} == {*range(100, 120), *range(200, 220)}


# What is found


def has(field, value):
    return lambda settings: getattr(settings, field) == value


def is_wider(settings):
    return settings.blocks is not None and settings.blocks["BLOCK_V"] == WIDER.BLOCK_V


@pytest.fixture
def clock(monkeypatch):
    """Seconds by a function of the settings in force, so that the machine has no say; nothing is run for them."""

    def set_to(seconds):
        monkeypatch.setattr(search, "_within", lambda settings, run: settings)
        monkeypatch.setattr(timing, "time_once", lambda settings, device: seconds(settings))

    return set_to


@pytest.fixture(scope="module")
def case():
    return make_case(HEAD, 8, CPU)


def tried_of(case, trials, until=float("inf")):
    found = list(search.improved(case, Settings(), trials, search.Budget(3, until)))
    return (found[-1][0] if found else Settings()), [tried for _, tried in found]


def trial(field, value, names=passes.PASSES):
    return search.Trial(field, value, names, lambda settings: settings._replace(**{field: value}))


def test_from_end_to_end(clock, path, capsys):
    """It writes, operators read, and a file that breaks is survived."""
    clock(lambda settings: 0.5 if is_wider(settings) else 1.0)
    assert tune.main(["--head", str(V), str(H), "--repeats", "3"]) == 0
    printed, progress = capsys.readouterr()
    assert f"float32 {V} x {H} | BLOCK_V" in printed and "| 0.500 | 0.000  | taken" in printed
    assert f"wrote {path}" in printed and "BLOCK_V 64: 0.500 of the time, spread 0.000: taken" in progress
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["blocks"] == WIDER._asdict() and (entry["logps"], entry["loss"]) == ("fused", "fused")
    assert [row["ratio"] for row in entry["measured"]["passes"]] == [0.5] * 4
    fields = {row["field"] for row in entry["measured"]["tried"]}
    assert {"logps", "loss", "workspace_bytes", "tiles_per_split", "BLOCK_N", "BLOCK_V", "BLOCK_H"} <= fields
    assert [row["regime"] for row in entry["measured"]["sparse"]] == ["peaked", "flat"]
    assert entry["measured"]["log_ratio_at_reference"] == 0 and "log-ratio at the reference" in printed

    assert head_blocks(weight_of()) == WIDER
    logps = token_logps(weight_of())
    tuned._in_force.clear()
    path.write_text(path.read_text()[:-100])
    with pytest.warns(UserWarning, match="is ignored"):
        assert head_blocks(weight_of()) == ENTRY
    torch.testing.assert_close(token_logps(weight_of()), logps, rtol=1e-5, atol=1e-5)


def test_a_candidate_with_wrong_numbers_is_named_and_gets_no_time(monkeypatch, clock, case):
    runs = passes.Case.runs

    def planted(self, *arguments):
        found = runs(self, *arguments)
        log_probs = found[passes.LOG_PROBS]
        wrong = lambda: (log_probs()[0] + 0.1 * has("logps", "sliced")(tuned.settings_of(self.weight)),)
        return found | {passes.LOG_PROBS: wrong}

    monkeypatch.setattr(passes.Case, "runs", planted)
    clock(lambda settings: 0.5 if has("logps", "sliced")(settings) else 1.0)
    best, (tried,) = tried_of(case, lambda case, best: [trial("logps", "sliced")])
    assert best == Settings() and tried.ratio is None
    assert tried.verdict == "wrong numbers: log-probs of log-probs are off by 1.0e-01"


@pytest.mark.parametrize("name", [passes.UPSTREAM, passes.TRAINABLE, passes.FROZEN])
def test_each_number_that_a_pass_returns_is_looked_at(case, name):
    returned = case.runs()[name]()
    assert case.wrong(name, returned) is None
    for index, what in enumerate(passes._RETURNED[name]):
        changed = [value + 0.05 * value.abs().max() if i == index else value for i, value in enumerate(returned)]
        assert case.wrong(name, tuple(changed)).startswith(f"{what} of {name} are off by")
        changed[index] = returned[index] * float("nan")
        assert case.wrong(name, tuple(changed)).endswith("nan")


def test_a_candidate_whose_bits_change_is_named(monkeypatch, case):
    runs, noise = passes.Case.runs, iter(range(100))

    def planted(self, *arguments):
        log_probs = runs(self, *arguments)[passes.LOG_PROBS]
        return {passes.LOG_PROBS: lambda: (log_probs()[0] + 1e-5 * next(noise),)}

    monkeypatch.setattr(passes.Case, "runs", planted)
    assert search.checked(case, Settings()) == "wrong numbers: log-probs has other bits when it runs again"


def test_ways_that_part_the_policy_from_its_reference_are_told(monkeypatch, case):
    """Two ways to make the same logits differ in their last bits."""
    assert search.log_ratio_at_reference(case, Settings()) == 0
    op = copg_kernels.copg.linear_copg_op

    def parted(*arguments):
        loss, logps, *rest = op(*arguments)
        return loss, logps + 2.0**-10 * (tuned.settings_of(case.weight).loss == "sliced"), *rest

    monkeypatch.setattr(copg_kernels.copg, "linear_copg_op", parted)
    assert search.log_ratio_at_reference(case, Settings(loss="sliced")) == pytest.approx(2.0**-10, rel=0.1)


def test_a_candidate_that_does_not_run_is_named_and_the_next_one_has_its_turn(monkeypatch, clock, case):
    runs = passes.Case.runs

    def planted(self, *arguments):
        found = runs(self, *arguments)
        return found | {passes.LOG_PROBS: lambda: exhausted(self.weight) or found[passes.LOG_PROBS]()}

    def exhausted(weight):
        if tuned.settings_of(weight).workspace_bytes == 2**20:
            raise RuntimeError("out of resource: shared memory\nand so on")

    monkeypatch.setattr(passes.Case, "runs", planted)
    clock(lambda settings: 0.5 if settings.loss == "sliced" else 1.0)
    best, (first, second) = tried_of(
        case, lambda case, best: [trial("workspace_bytes", 2**20), trial("loss", "sliced")]
    )
    assert first.verdict == "does not run: RuntimeError: out of resource: shared memory" and first.ratio is None
    assert first.value == "1 MiB" and best == Settings(loss="sliced") and second.verdict == search.TAKEN


def test_what_is_within_the_spread_or_next_to_nothing_is_not_taken(monkeypatch):
    def compared(*seconds):
        times = iter([t for pair in seconds for t in pair])
        monkeypatch.setattr(timing, "time_once", lambda run, device: next(times))
        return timing.compare({"a": ("old", "new")}, len(seconds), CPU)["all"]

    # Every second round begins with the new one.
    assert compared((1.0, 0.9), (0.9, 1.0), (1.0, 0.9)).is_faster
    slightly = compared((1.0, 0.99), (0.99, 1.0), (1.0, 0.99))
    assert slightly.spread == 0 and not slightly.is_faster
    noisy = compared((1.0, 0.9), (0.7, 1.0), (1.0, 1.1))
    assert noisy.ratio == pytest.approx(0.9) and noisy.spread == pytest.approx(0.2) and not noisy.is_faster


def test_what_wins_once_by_chance_is_not_taken(monkeypatch, case):
    fast, slow = (timing.Compared(1.0, ratio, ratio, 0.0) for ratio in (0.9, 1.0))
    for found, taken in (([fast, slow], False), ([slow, fast], False), ([fast, fast], True)):
        times = iter(found)
        monkeypatch.setattr(search, "_compare", lambda *given, times=times: {"all": next(times)})
        monkeypatch.setattr(search, "checked", lambda *given: None)
        best, (tried,) = tried_of(case, lambda case, best: [trial("loss", "sliced")])
        assert (best.loss == "sliced") == taken and tried.verdict == (search.TAKEN if taken else search.STAYS)


def test_only_the_passes_of_a_question_decide_it(clock, case):
    asked = []
    clock(lambda settings: asked.append(settings) or 1.0)
    tried_of(case, lambda case, best: [trial("loss", "sliced", passes.PASSES[2:])])
    assert len(asked) == 2 * 2 * 3


def test_what_was_taken_one_by_one_has_to_be_faster_than_the_defaults_together(clock, case):
    clock(lambda settings: 1.0 if settings == Settings() else 1.2)
    plan = run.Plan([HEAD], 8, 3, float("inf"), CPU)
    progress, entry = run._confirmed(plan, HEAD, case, run.Progress(Settings("sliced", "sliced")))
    assert progress.settings == Settings() and (entry["logps"], entry["loss"]) == ("fused", "fused")
    (tried,) = entry["measured"]["tried"]
    assert (tried["field"], tried["verdict"], tried["ratio"]) == ("all of it", search.STAYS, 1.2)
    assert [row["seconds"] for row in entry["measured"]["passes"]] == [1.0] * 4


def test_no_candidate_is_begun_when_the_time_is_up(clock, case):
    clock(lambda settings: 1.0)
    assert tried_of(case, lambda case, best: [trial("loss", "sliced")], until=0.0) == (Settings(), [])


# The command


MEASURED = {"gemm_seconds": 1.0, "log_ratio_at_reference": 0.0, "passes": [], "tried": [], "sparse": []}


def test_a_bound_of_no_time_leaves_a_whole_file(path, capsys):
    assert tune.main(["--minutes", "1e-9"]) == 0
    assert file.read(path, NAME) == ()
    printed, progress = capsys.readouterr()
    assert "float32 64 x 16: nothing found" in printed and "the time is up" in progress


def test_what_was_found_before_an_interrupt_is_kept(monkeypatch, path, capsys):
    def interrupted(plan, say):
        yield HEAD, entry_of() | {"measured": MEASURED}
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "found_entries", interrupted)
    assert tune.main(["--head", str(V), str(H), "--head", "32", "16"]) == 130
    assert [entry.vocab_size for entry in file.read(path, NAME)] == [V]
    printed, progress = capsys.readouterr()
    assert f"float32 {V} x {H}: log-probs fused" in printed and "float32 32 x 16: nothing found" in printed
    assert "what was found before is kept" in progress


def test_a_head_that_is_wrong_with_the_defaults_is_refused_and_the_others_go_on(monkeypatch, clock, path, capsys):
    def checked(case, settings):
        return "wrong numbers: planted" if len(case.weight) == 32 else None

    monkeypatch.setattr(run, "checked", checked)
    monkeypatch.setattr(search, "checked", checked)
    clock(lambda settings: 1.0)
    assert tune.main(["--head", "32", "16", "--head", str(V), str(H)]) == 1
    assert "float32 32 x 16: with the code's defaults, wrong numbers: planted" in capsys.readouterr().err
    (entry,) = file.read(path, NAME)
    assert entry.vocab_size == V and entry.settings == Settings()


def test_a_device_that_broke_ends_the_run_and_keeps_what_was_found(monkeypatch, path, capsys):
    def lost(plan, say):
        yield HEAD, entry_of() | {"measured": MEASURED}
        raise search.Lost("the GPU no longer answers")

    monkeypatch.setattr(tune, "found_entries", lost)
    assert tune.main([]) == 1
    assert "the GPU no longer answers" in capsys.readouterr().err and len(file.read(path, NAME)) == 1


REFUSED = [
    (["--head", "0", "16"], "heads must be pairs of vocabulary entries and hidden size, all above 0"),
    (["--tokens", "12"], "tokens must be a multiple of 8 above 0, got 12"),
    (["--tokens", "0"], "tokens must be a multiple of 8 above 0, got 0"),
    (["--repeats", "2"], "repeats must be at least 3, or there is no spread, got 2"),
    (["--minutes", "0"], "minutes must be above 0, got 0"),
    (["--minutes", "nan"], "minutes must be above 0, got nan"),
    (["--model", "nowhere"], "model must be a folder with a config.json, got nowhere"),
    (["--dtype", "float64"], "invalid choice: 'float64'"),
]


@pytest.mark.parametrize(("arguments", "why"), REFUSED)
def test_what_makes_no_sense_is_refused_in_words(capsys, path, arguments, why):
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2 and why in capsys.readouterr().err and not path.exists()


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tune, "found_entries", None)
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "the file cannot be written" in said and str(tmp_path / "file") in said


def test_nobodys_file_is_written_over(tmp_path, capsys):
    other = tmp_path / "thesis.json"
    other.write_text('{"chapter": 1}')
    with pytest.raises(SystemExit):
        tune.main(["--out", str(other)])
    assert "out must be a new file or one of this command" in capsys.readouterr().err
    assert other.read_text() == '{"chapter": 1}'
    other.write_text(whole(format=0))
    assert tune.main(["--out", str(other), "--minutes", "1e-9"]) == 0 and file.read(other, NAME) == ()


def test_without_a_gpu_it_says_that_it_needs_one(monkeypatch, capsys):
    monkeypatch.setattr(tuned, "INTERPRETING", False)
    assert tuned.settings_of(weight_of()) == Settings()
    assert tune.main([]) == 1
    assert "tuning needs a GPU, and torch" in capsys.readouterr().err
    tune.show()
    assert capsys.readouterr().out == "no kernels run here: nothing is tuned\n"


def test_the_head_of_a_model(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": 7, "hidden_size": 5}))
    assert head_of_model(tmp_path) == (7, 5)
    config.write_text(json.dumps({"text_config": {"vocab_size": 8, "hidden_size": 6}}))
    assert head_of_model(tmp_path) == (8, 6)
    for text in ("{}", "[]", '{"text_config": 1}'):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json must have vocab_size and hidden_size"):
            head_of_model(tmp_path)


def test_the_block_candidates_are_ones_that_a_file_may_have(case):
    for settings in (Settings(), Settings(blocks=WIDER._asdict())):
        for candidate in search.blocks(case, settings):
            changed = candidate.change(settings)
            if changed.blocks is not None:
                file.check_blocks(changed.blocks, "the candidate")
    assert list(search.blocks(case._replace(weight=weight_of(V, 20)), Settings())) == []


def test_the_table_of_every_gpu_is_one_that_a_file_may_have():
    for entry in [*BLOCKS.values(), *table.IRREGULAR.values()]:
        file.check_blocks(entry._asdict(), "the entry")


def test_what_the_page_shows_can_be_run(monkeypatch):
    page = (ROOT / "docs" / "tuning.md").read_text()
    commands = re.findall(r"^python -m copg_kernels\.tune(.*?)(?:#.*)?$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        tune._parser().parse_args(command.split())
    called = []
    monkeypatch.setattr(
        tune, "tune", create_autospec(tune.tune, side_effect=lambda *given, **named: called.append(given))
    )
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(code, {})
    assert called == [([HEADS["llama-3"]],)]


def test_the_heads_are_the_benchmarks():
    from bench.inputs import MODEL_SHAPES

    assert {shape.name: (shape.vocab_size, shape.hidden_size) for shape in MODEL_SHAPES} == HEADS
    assert copg_kernels.__version__ in json.dumps(file.origin(NAME))
