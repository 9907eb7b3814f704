"""The compile gate: what the operators launch, compiled for every target, with no GPU present."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
# Bytes of shared memory one block can have (CUDA programming guide, technical specifications; CDNA 3 LDS).
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
HEAD_KERNELS = {"linear_logps_fwd", "exp_tile", "softmax_minus_label"}
PRODUCTS = {"gather_product", "dense_product"}
OTHERS = {"scale_gradient", "scale_rows", "fold_tiles", "merge_splits", "token_statistics", "place_labels", "contrast"}
OTHERS |= {"add_entropy", "count_significant", "fill"}


def run_without_interpreter(*arguments: str) -> str:
    """In a process of its own, because the interpreter of the other tests replaces the compiler."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(ROOT)
    result = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("compile") / "report.json"
    run_without_interpreter("-m", "tests.compile_report", "--json", str(path))
    return json.loads(path.read_text())


def named(row: dict) -> str:
    return "{kernel} {target} {element} ({arguments})".format(**row)


def reads_a_product(row: dict) -> bool:
    """Whether a head kernel takes what a library multiplied."""
    return row["kernel"] in HEAD_KERNELS and "product_ptr=None" not in row["arguments"]


def test_every_kernel_was_compiled_for_every_target(report):
    kernels = HEAD_KERNELS | PRODUCTS | OTHERS
    rows = report["rows"]
    assert {(row["target"], row["kernel"]) for row in rows} == {(t, k) for t in SHARED_LIMIT for k in kernels}
    assert {row["element"] for row in rows if row["kernel"] in HEAD_KERNELS} == {"fp32", "bf16", "fp16"}
    # Both ways to read operands, both directions of a compact tile, with and without a choice of row blocks.
    known = " ".join(named(row) for row in rows if row["target"] == "sm_90")
    arguments = (
        "USE_TMA",
        "EVEN_V",
        "EVEN_H",
        "ROWS_IN_BLOCKS",
        "IN_TILE",
        "HAS_CAP",
        "HAS_SCALE",
        "KEEPS_SLOPE",
        "ADD",
        "AVERAGE",
    )
    for argument in arguments:
        assert f"{argument}=True" in known and f"{argument}=False" in known
    softmax = [row["arguments"] for row in rows if row["kernel"] == "softmax_minus_label"]
    assert {"only_ptr=None" in arguments for arguments in softmax} == {True, False}
    assert {"of_others_ptr=None" in arguments for arguments in softmax} == {True, False}


def test_no_spills(report):
    assert [f"{named(row)}: {row['spills']}" for row in report["rows"] if row["spills"]] == []


def test_shared_memory_fits(report):
    assert [named(row) for row in report["rows"] if row["shared"] > SHARED_LIMIT[row["target"]]] == []
    assert all(
        row["shared"] > 0 for row in report["rows"] if row["kernel"] in HEAD_KERNELS and not reads_a_product(row)
    )


def test_matrix_instructions(report):
    """wgmma on sm_90, tcgen05 on sm_100, mma.sync and MFMA on the others; none where the product is read."""
    multiply = [row for row in report["rows"] if row["kernel"] in HEAD_KERNELS | PRODUCTS]
    assert [named(row) for row in multiply if bool(row["matrix_instructions"]) == reads_a_product(row)] == []
    assert {reads_a_product(row) for row in multiply} == {True, False}


def test_matrix_instructions_read_no_unfenced_copy(report):
    assert [named(row) for row in report["rows"] if row["unfenced"]] == []


def test_batches_of_any_size_run_the_same_compilation(report):
    assert report["of_batches"] == []


def test_a_kernel_that_spills_is_seen(tmp_path):
    """The report reads spills from the size of a thread's stack: a kernel with too few registers has one."""
    script = tmp_path / "spills.py"
    script.write_text(
        textwrap.dedent("""
        import triton, triton.language as tl
        from triton.compiler import ASTSource
        from bench.compiled import read_nvidia
        from bench.recording import TARGETS

        @triton.jit
        def rows(x_ptr, out_ptr, BLOCK: tl.constexpr):
            x = tl.load(x_ptr + tl.arange(0, BLOCK))
            tl.store(out_ptr + tl.arange(0, BLOCK), tl.sort(x) + x)

        source = ASTSource(rows, dict(x_ptr="*fp32", out_ptr="*fp32", BLOCK="constexpr"), {(2,): 4096})
        for registers in (32, 255):
            options = dict(num_warps=4, maxnreg=registers)
            compiled = triton.compile(source, target=TARGETS["sm_90"], options=options)
            print(read_nvidia(compiled)[1])
        """)
    )
    few, enough = map(int, run_without_interpreter(str(script)).split())
    assert few > 0 and enough == 0
