"""The model on paper: it counts what the operators launch, and it moves where they do."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from bench.costs import OF_ENTRIES, ONE_PER_ROW, RETURNS
from bench.gpus import GPUS
from bench.inputs import SHAPES
from bench.kernel_code import NoRule
from bench.machine_code import parse
from bench.measured_units import measured_units
from bench.predict import HEADS, TARGETS, main
from bench.prediction_tables import verdict
from bench.tile_costs import makespan, tile_operations

ROOT = Path(__file__).resolve().parents[1]
HEAD = ("--heads", "llama-3")
# Predictions, and what was recorded for them, in one process: compiling takes most of the time.
RECORD = """
    import json, pathlib, sys
    from bench import compiled, kernel_code
    from bench.inputs import SHAPES
    from bench.passes import PATHS, TorchOp, passes_of
    from bench.predict import main

    results = {}
    for name, options in json.loads(sys.argv[2]).items():
        results[name] = {path["path"]: path for path in main(options)["heads"][0]["paths"]}
    passes = passes_of(PATHS[-1], SHAPES["llama-3"], "sm_90")
    launches = [one for one in passes if not isinstance(one, TorchOp)]
    results["launches"] = sorted({(one.variant.name, name) for one in launches for name in one.arguments})
    compiled.CUOBJDUMP = pathlib.Path("/nowhere/cuobjdump")
    kernel_code._kernels.clear()
    try:
        main(["--heads", "llama-3", "--paths", "log-probs"])
    except SystemExit as error:
        results["without cuobjdump"] = str(error)
    json.dump(results, open(sys.argv[1], "w"))
"""


def run_without_interpreter(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """In a process of its own, for the interpreter of the other tests replaces the compiler."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(root)
    return subprocess.run([sys.executable, *arguments], env=variables, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("predict")
    (folder / "record.py").write_text(textwrap.dedent(RECORD))
    calls = dict(
        all=[*HEAD],
        twice=[*HEAD, "--tokens", "16384", "--paths", "log-probs", "exact", "frozen"],
        dense=[*HEAD, "--paths", "sparse (rl)", "--density", "0.12"],
        sliced=[*HEAD, "--way", "sliced", "--paths", "log-probs", "exact"],
        narrow=[*HEAD, "--tokens", "16384", "--workspace-bytes", "300000000", "--paths", "exact", "frozen"],
    )
    result = run_without_interpreter(str(folder / "record.py"), str(folder / "found.json"), json.dumps(calls))
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()) | dict(printed=result.stdout)


def test_every_path_is_printed_with_what_it_rests_on(recorded):
    first = recorded["printed"].split("PATH")[0]
    for path in TARGETS:
        assert f"\n{path} " in first and f"\n{path}\n" in first  # its row, and its passes
    assert "Predicted for an H200, not measured" in first
    for number in ("1.7e+09 Hz", "9e+12 or 7e+12 bytes/s", "7.9e+14 FLOP/s"):
        assert number in first


def test_ranges_are_ranges(recorded):
    for path in recorded["all"].values():
        assert 0 < path["units"][0] < path["units"][1]
        for end in (0, 1):
            assert sum(part["units"][end] for part in path["parts"]) == pytest.approx(path["units"][end])


def logps(hidden_states, weight):
    return (hidden_states @ weight.T).log_softmax(1)[:, 0].sum()


# In plain torch, whose products a FlopCounterMode sees; "any gradient" comes when the logits are gone.
RUNS = {
    "log-probs": lambda x, w: logps(x.detach(), w.detach()),
    "exact": lambda x, w: logps(x, w).backward(),
    "frozen": lambda x, w: logps(x, w.detach()).backward(),
    "any gradient": lambda x, w: checkpoint(logps, x, w, use_reentrant=False).backward(),
}


def gemms_of(run) -> float:
    T, V, H = 64, 512, 32
    hidden_states, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        run(hidden_states, weight)
    return counter.get_total_flops() / (2 * T * V * H)


@pytest.mark.parametrize("path", RUNS)
def test_products_are_those_of_the_flop_counter(path, recorded):
    """Kernels' tiles and torch's GEMMs together; the few logits that serve as a reference are not in plain torch."""
    assert recorded["all"][path]["gemms"] == pytest.approx(gemms_of(RUNS[path]), abs=0.002)


def test_twice_the_tokens_take_about_twice_the_time(recorded):
    for path, low, high in (("log-probs", 1.85, 2.15), ("exact", 1.95, 2.4), ("frozen", 1.95, 2.05)):
        for end in (0, 1):
            ratio = recorded["twice"][path]["milliseconds"][end] / recorded["all"][path]["milliseconds"][end]
            assert low < ratio < high


def test_recording_makes_no_copy_that_is_not_there(recorded):
    """Autograd hands a gradient on as it is, unless somebody else holds it: a recorded launch must not."""
    moved = {part["name"]: part["gigabytes"] for part in recorded["all"]["exact"]["parts"] if "torch" in part["name"]}
    assert moved and max(moved.values()) < 0.5  # the head's gradient has 1.05 GB


def test_schedules_decide_as_they_would_there(recorded):
    """A pair of completions beyond the workspace has its logits computed again, where the head is trained."""
    assert recorded["narrow"]["exact"]["gemms"] > recorded["twice"]["exact"]["gemms"] + 0.9
    assert recorded["narrow"]["frozen"]["gemms"] < recorded["twice"]["frozen"]["gemms"] + 0.3


def test_more_entries_kept_take_longer(recorded):
    sparse, dense = recorded["all"]["sparse (rl)"], recorded["dense"]["sparse (rl)"]
    assert dense["units"][0] > sparse["units"][0] + 0.1
    assert dense["gemms"] - 1 == pytest.approx(4 * (sparse["gemms"] - 1), rel=0.05)


def test_the_other_way_is_another_prediction_or_says_that_it_is_none(recorded):
    for path, sliced in recorded["sliced"].items():
        fused = recorded["all"][path]
        assert (sliced["note"] == "") == (sliced["parts"] != fused["parts"])


def test_a_slice_of_the_vocabulary_moves_its_own_share(recorded):
    """Float32 products are read once, and the tile of all tokens and entries is written once, over all slices."""
    (tile,) = (part for part in recorded["sliced"]["exact"]["parts"] if part["name"] == "exp_tile")
    assert tile["launches"] > 1
    assert tile["gigabytes"] == pytest.approx(8192 * 128256 * (4 + 2) / 1e9, rel=0.05)


def test_what_is_known_of_kernels_is_known_of_kernels_that_are_launched(recorded):
    launches = {tuple(launch) for launch in recorded["launches"]}
    assert RETURNS <= launches and ONE_PER_ROW <= launches
    assert set(OF_ENTRIES) <= {argument for _, argument in launches}


def test_a_longer_epilogue_raises_the_prediction(recorded, tmp_path):
    """Sixteen more exponentials of every entry that is stored, planted into a copy of the package."""
    ignored = shutil.ignore_patterns("results", "__pycache__")
    for package in ("copg_kernels", "bench"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    file = tmp_path / "copg_kernels/kernels/head.py"
    source = file.read_text()
    arguments = next(x for x in ast.parse(source).body if getattr(x, "name", "") == "store_part").args
    names = ", ".join(argument.arg for argument in arguments.args)
    planted = f"""
        @jit
        def store_part({ast.unparse(arguments)}):
            for _ in tl.static_range(16):
                value = tl.exp(-tl.abs(value))
            _stored_once({names})
        """
    file.write_text(source.replace("def store_part(", "def _stored_once(") + textwrap.dedent(planted))
    paths = ("log-probs", "exact")
    arguments = ("-m", "bench.predict", *HEAD, "--paths", *paths, "--json", str(tmp_path / "planted.json"))
    result = run_without_interpreter(*arguments, root=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "planted.json").read_text())["heads"][0]["paths"]
    planted_units = {path["path"]: path["units"] for path in found}
    for end in (0, 1):
        assert planted_units["exact"][end] > recorded["all"]["exact"]["units"][end] + 0.1
        assert planted_units["log-probs"][end] == pytest.approx(recorded["all"]["log-probs"]["units"][end])


def test_without_cuobjdump_it_says_so(recorded):
    assert "nothing can be predicted: no cuobjdump at /nowhere/cuobjdump" in recorded["without cuobjdump"]


def test_tokens_that_make_no_pairs_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--tokens", "3000"])
    assert "--tokens must be a multiple of 2048, got 3000" in capsys.readouterr().err


def test_predictions_are_not_written_where_measurements_are(capsys):
    with pytest.raises(SystemExit):
        main(["--json", str(ROOT / "bench/results/h200/results.json")])
    assert "for what was measured" in capsys.readouterr().err


# A kernel of two loops: tiles, and within each the GEMM's. Its end jumps over 0x60, or does not.
SASS = """
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   MOV R1, RZ ;
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/               @P0 BRA 0x70 ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/              @!P2 BRA 0x10 ;
        /*0080*/               @P3 EXIT ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


STREAMING = """
        /*0000*/                   MOV R2, RZ ;
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   STG.E.64 [R2], R4 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
"""


def test_machine_code_is_counted_by_round_and_by_tile():
    code = parse(SASS)
    assert code.loop_count == 3 and code.many_tiles
    assert [tuple(mma) for mma in code.mmas] == [(64, 128, 16, True)]
    # From 0x10 to the loop, two branches, and the exponential in the longer way: eight cycles where it is alone.
    assert code.counts[1] == code.counts[0] + 1
    assert code.longest.alone - code.shortest.alone == 8
    once = parse(SASS.replace("@!P2 BRA 0x10", "NOP"))
    assert not once.many_tiles and once.counts[0] > code.counts[0]
    straight = parse("/*0000*/ LDG.E R0, [R2] ;\n/*0010*/ @P0 EXIT ;\n/*0020*/ STG.E [R2], R0 ;\n/*0030*/ EXIT ;")
    assert straight.loop is None and straight.counts == (4, 4)
    streaming = parse(STREAMING)
    assert streaming.loop == (3, 3) and streaming.moved == 24 and streaming.counts == (3, 3)


def test_the_fullest_sm_has_the_last_tile():
    assert makespan([1] * 9, 4) == 3
    assert makespan([32] * 5 + [4] * 4, 4) == 64  # the short ones fit beside the fifth
    assert makespan([2, 2, 2, 3], 2) == 5


def test_a_kernel_of_another_kind_is_an_error_not_a_guess():
    launch = SimpleNamespace(variant=SimpleNamespace(name="some_product"), arguments=dict(BLOCK=128))
    with pytest.raises(NoRule, match="what the tiles of some_product are"):
        tile_operations(launch, GPUS["h200"], 0.03)


def test_a_measured_run_stands_beside_its_prediction(tmp_path):
    shape = SHAPES["llama-3"]
    row = {"provider": "copg-kernels", "pass": "loss+gradients", "over_floor": 1.1, "units": 3}
    table = dict(shape=shape._asdict(), regime="rl", dtype="bfloat16", rows=[row])
    for folder, device, date in (("old", "NVIDIA H200", "2026-01-01"), ("a100", "NVIDIA A100", "2026-03-01")):
        (tmp_path / folder).mkdir()
        results = dict(provenance=dict(device=device, date=date), tables=[table])
        (tmp_path / folder / "results.json").write_text(json.dumps(results))
    units, where = measured_units("exact", shape, GPUS["h200"].name, tmp_path)
    assert units == pytest.approx(3.3) and where == "old"
    assert measured_units("frozen", shape, "H200", tmp_path) == (None, "not measured")
    assert measured_units("exact", shape._replace(num_tokens=16384), "H200", tmp_path) == (None, "not measured")


def test_the_page_gives_predictions_as_such_and_what_was_measured():
    page = (ROOT / "docs/predictions.md").read_text(encoding="utf-8")
    assert "**No figure on this page is measured.**" in page and "Predicted for an H200, not measured: 20" in page
    shown = set()
    for title, table in re.findall(r"^\*\*([\w.-]+): T=8192 .*\*\*\n\n((?:\|.*\n)+)", page, re.MULTILINE):
        assert "predicted units" in table.splitlines()[0]
        for path, *_, measured in (row.strip("| ").split(" | ") for row in table.splitlines()[2:]):
            units, where = measured_units(path, SHAPES[title], "H200")
            assert measured == (where if units is None else f"{units:.2f} ({where})")
            shown.add((title, path))
    assert shown == {(head, path) for head in HEADS for path in TARGETS}


def test_a_target_within_the_range_is_open():
    assert [verdict(units, 1.1) for units in ((1.0, 1.05), (1.05, 1.2), (1.15, 1.2))] == ["within", "open", "beyond"]
