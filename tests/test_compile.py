"""The compile gate: every kernel and block-table entry, for every target, with no GPU present."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
HEAD_KERNELS = ("linear_logps_fwd", "exp_tile", "softmax_minus_label")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """In a process of its own, because the interpreter of the other tests replaces the compiler."""
    path = tmp_path_factory.mktemp("compile") / "rows.json"
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_report", "--json", str(path)]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(path.read_text())


SPARSE_KERNELS = ("count_significant", "fill_compact", "gather_product", "dense_product")


def named(row: dict) -> str:
    return "{kernel} {target} {dtype} {epilogue}".format(**row)


def test_every_kernel_was_compiled_for_every_target(rows):
    others = ("scale_rows", "fold_tiles", "merge_splits", "token_entropy", "place_labels", "contrast")
    kernels = {*HEAD_KERNELS, *SPARSE_KERNELS, *others}
    assert {(row["target"], row["kernel"]) for row in rows} == {(t, k) for t in SHARED_LIMIT for k in kernels}
    assert {row["dtype"] for row in rows if row["kernel"] in HEAD_KERNELS} == {
        "float32",
        "bfloat16",
        "float16",
    }


def test_no_spills(rows):
    assert [f"{named(row)}: {row['spills']}" for row in rows if row["spills"]] == []


def test_shared_memory_fits(rows):
    assert [named(row) for row in rows if row["shared"] > SHARED_LIMIT[row["target"]]] == []
    assert all(row["shared"] > 0 for row in rows if row["kernel"] in HEAD_KERNELS)


def test_matrix_instructions(rows):
    """HGMMA on sm_90, tcgen05 on sm_100, HMMA and MFMA on the others: see compile_report.MATRIX_INSTRUCTION."""
    multiply = (*HEAD_KERNELS, "gather_product", "dense_product")
    assert [named(row) for row in rows if row["kernel"] in multiply and not row["matrix_instructions"]] == []
