"""Compile every kernel for every target with no GPU present, and say what came out.

    python -m tests.compile_report [--targets sm_90,...] [--json FILE]

One row per kernel, block-table entry and epilogue: registers, spills (local-memory loads and stores in the machine
code), shared memory against the device's limit, and which matrix instruction was chosen. tests/test_compile.py asserts
on the same rows. Must run without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from copg_kernels.kernels import (
    compact_tile,
    contrast,
    fold_tiles,
    gather_product,
    merge_splits,
    scale_rows,
    token_entropy,
)
from copg_kernels.kernels.blocks import BLOCKS, GROUP_N
from copg_kernels.kernels.compact_tile import _count_kernel, _fill_kernel
from copg_kernels.kernels.contrast import _contrast_kernel, launch_options
from copg_kernels.kernels.dense_product import _dense_product_kernel
from copg_kernels.kernels.exp_tile import _exp_tile_kernel
from copg_kernels.kernels.fold_tiles import _fold_tiles_kernel
from copg_kernels.kernels.gather_product import _gather_product_kernel
from copg_kernels.kernels.head import compile_options
from copg_kernels.kernels.linear_logps_fwd import _linear_logps_fwd_kernel
from copg_kernels.kernels.merge_splits import _merge_splits_kernel
from copg_kernels.kernels.place_labels import _place_labels_kernel
from copg_kernels.kernels.scale_rows import _scale_rows_kernel
from copg_kernels.kernels.softmax_minus_label import _softmax_minus_label_kernel
from copg_kernels.kernels.token_entropy import _token_entropy_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory one block can have (CUDA programming guide, technical specifications; CDNA 3 LDS).
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
# What a matrix product compiles to: warp-group and tcgen05 instructions where the chip has them.
MATRIX_INSTRUCTION = {
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_HEAD_KERNELS = {
    "linear_logps_fwd": _linear_logps_fwd_kernel,
    "exp_tile": _exp_tile_kernel,
    "softmax_minus_label": _softmax_minus_label_kernel,
}


_NO_ENTROPY = ("softmax_minus_label", "entropy")
_ROW_STRIDES = ("stride_hidden", "stride_weight", "stride_source", "stride_tile")
_SPARSE_KERNELS = {
    "count_significant": _count_kernel,
    "fill_compact": _fill_kernel,
    "gather_product": _gather_product_kernel,
    "dense_product": _dense_product_kernel,
}


class Case(NamedTuple):
    """One compilation."""

    kernel: str
    target: str
    dtype: str
    epilogue: str
    """plain; full: bias, softcap and an H that is no multiple of the block; entropy: full, with its statistics."""


class Row(NamedTuple):
    """What it came out as."""

    case: Case
    registers: int
    spills: int
    shared: int
    matrix_instructions: int


def cases(targets: list[str]) -> Iterator[Case]:
    """Every kernel x target x operand type x epilogue."""
    for target in targets:
        for dtype in _TYPES:
            for kernel in _HEAD_KERNELS:
                for epilogue in ("plain", "full", "entropy"):
                    if (kernel, dtype) != ("exp_tile", "float16") and (kernel, epilogue) != _NO_ENTROPY:
                        yield Case(kernel, target, dtype, epilogue)
            yield Case("scale_rows", target, dtype, "plain")
            yield Case("place_labels", target, dtype, "full")
            if dtype != "float16":
                yield from (Case(kernel, target, dtype, "plain") for kernel in _SPARSE_KERNELS)
        yield from (Case("fold_tiles", target, "float32", epilogue) for epilogue in ("plain", "entropy"))
        yield Case("merge_splits", target, "float32", "plain")
        yield Case("token_entropy", target, "float32", "plain")
        yield Case("contrast", target, "float32", "plain")
        yield Case("contrast", target, "float32", "full")


def compile_case(case: Case) -> Row:
    """Compile one case and read the binary."""
    kernel, signature, constants, options = _specification(case)
    names = kernel.arg_names
    # As at launch: pointers, H and row strides of real tensors are multiples of 16.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, type_ in signature.items()
        if type_.startswith("*")
        or name in ("H", "R", "stride_hidden", "stride_weight", "stride_source", "stride_tile", "stride_i")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=TARGETS[case.target], options=options)
    if case.target.startswith("gfx"):
        return _read_amd(case, compiled)
    return _read_nvidia(case, compiled)


def _specification(case: Case) -> tuple:
    """-> kernel, signature, constants, compile options."""
    element = _TYPES[case.dtype]
    if case.kernel == "scale_rows":
        types = {"source_ptr": f"*{element}", "out_ptr": f"*{element}", "index_ptr": "*i64"}
        return *_signature(_scale_rows_kernel, types, dict(BLOCK_H=scale_rows.BLOCK_H)), {}
    if case.kernel == "merge_splits":
        types = {"position_ptr": "*i64", "num_rows_ptr": "*i64"}
        return *_signature(_merge_splits_kernel, types, dict(BLOCK_T=merge_splits.BLOCK_T)), {}
    if case.kernel == "token_entropy":
        types = {"position_ptr": "*i64", "num_rows_ptr": "*i64"}
        return *_signature(_token_entropy_kernel, types, dict(BLOCK_T=token_entropy.BLOCK_T)), {}
    if case.kernel in _SPARSE_KERNELS:
        return _sparse_specification(case, element)
    if case.kernel == "fold_tiles":
        constants: dict = dict(BLOCK_R=fold_tiles.BLOCK_R, TILES_PER_SPLIT=32)
        if case.epilogue == "plain":
            constants |= dict(tile_weighted_ptr=None, partial_weighted_ptr=None)
        return *_signature(_fold_tiles_kernel, {}, constants), dict(enable_fp_fusion=False)
    if case.kernel == "place_labels":
        types = dict.fromkeys(("row_index_ptr", "labels_ptr", "num_rows_ptr"), "*i64")
        types |= {"tile_ptr": f"*{element}", "redo_ptr": "*i32", "inv_softcap": "fp32", "inv_temperature": "fp32"}
        blocks = BLOCKS[case.target, 4 if element == "fp32" else 2]
        return *_signature(_place_labels_kernel, types, dict(HAS_CAP=True, BLOCK_N=blocks.BLOCK_N)), {}
    if case.kernel == "contrast":
        names = ("position_ptr", "num_rows_ptr")
        types = dict.fromkeys(names, "*i64") | {
            "cu_seqlens_ptr": "*i32",
            "cu_groups_ptr": "*i32",
            "group_losses_ptr": "*fp64",
            "beta": "fp32",
            "beta_rest": "fp32",
        }
        if case.epilogue == "full":
            types |= dict.fromkeys(("ref_logps_ptr", "rewards_ptr"), "*fp64")
        constants = dict(AVERAGE=case.epilogue == "full", BLOCK_T=contrast.BLOCK_T, BLOCK_K=contrast.BLOCK_K)
        return *_signature(_contrast_kernel, types, constants), launch_options(hip=case.target.startswith("gfx"))
    return _head_specification(case, element)


def _head_specification(case: Case, element: str) -> tuple:
    blocks = BLOCKS[case.target, 4 if element == "fp32" else 2]
    full = case.epilogue != "plain"
    constants = dict(
        HAS_BIAS=full, HAS_CAP=full, EVEN_H=not full, USE_TMA=blocks.use_tma, PRECISION=blocks.precision,
        BLOCK_N=blocks.BLOCK_N, BLOCK_V=blocks.BLOCK_V, BLOCK_H=blocks.BLOCK_H, GROUP_N=GROUP_N,
        TILES_PER_SPLIT=blocks.tiles_per_split, TMA_OUT=blocks.use_tma, only_ptr=None,
    )  # fmt: skip
    if not full:
        constants["bias_ptr"] = None
    if case.epilogue != "entropy":
        constants |= dict(partial_weighted_ptr=None, tile_weighted_ptr=None)
    types = {"row_index_ptr": "*i64", "labels_ptr": "*i64", "num_rows_ptr": "*i64"}
    types |= dict.fromkeys(("hidden_ptr", "bias_ptr", "weight", "tile"), f"*{element}")
    if blocks.use_tma:
        types["weight"] = f"tensordesc<{element}[{blocks.BLOCK_V}, {blocks.BLOCK_H}]>"
        types["tile"] = f"tensordesc<{element}[{blocks.BLOCK_N}, {blocks.BLOCK_V // 4}]>"
    types |= dict.fromkeys(("logit_scale", "inv_softcap", "inv_temperature", "tile_scale"), "fp32")
    return *_signature(_HEAD_KERNELS[case.kernel], types, constants), compile_options(blocks)


def _sparse_specification(case: Case, element: str) -> tuple:
    types = dict.fromkeys(("labels_ptr", "num_rows_ptr"), "*i64")
    types |= dict.fromkeys(
        ("counts_ptr", "ends_ptr", "entries_ptr", "offsets_ptr", "order_ptr", "overflow_ptr"), "*i32"
    )
    types |= dict.fromkeys(("tile_ptr", "values_ptr", "source_ptr", "out_ptr"), f"*{element}") | {"eps": "fp32"}
    constants = dict(
        ROWS_IN_BLOCKS=True, ADD=True, PRECISION=BLOCKS[case.target, 4 if element == "fp32" else 2].precision,
        BLOCK=compact_tile.BLOCK, BLOCK_LIST=compact_tile.BLOCK_LIST, BLOCK_K=gather_product.BLOCK_K,
        BLOCK_H=gather_product.BLOCK_H[4 if element == "fp32" else 2],
    )  # fmt: skip
    kernel = _SPARSE_KERNELS[case.kernel]
    is_product = case.kernel.endswith("product")
    options = gather_product.launch_options(hip=case.target.startswith("gfx")) if is_product else {}
    return *_signature(kernel, types, constants), options


def _signature(kernel, types: dict[str, str], constants: dict) -> tuple:
    """Unnamed pointers are float32, unnamed scalars int32."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return kernel, signature, constants


def _read_nvidia(case: Case, compiled) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    return Row(
        case,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=compiled.metadata.shared,
        matrix_instructions=len(re.findall(rf"\b{MATRIX_INSTRUCTION[case.target]}\b", sass)),
    )


def _cuobjdump(*arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _read_amd(case: Case, compiled) -> Row:
    assembly = compiled.asm["amdgcn"]
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    scratch = len(re.findall(r"\bscratch_(?:load|store)", assembly))
    return Row(
        case,
        registers=int(fields["vgpr_count"]),
        spills=int(fields["vgpr_spill_count"]) + scratch,
        shared=compiled.metadata.shared,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTION[case.target], assembly)),
    )


def compile_all(targets: list[str], workers: int = 2) -> list[Row]:
    """All cases, `workers` at a time."""
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_case, cases(targets)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of " + ", ".join(TARGETS))
    parser.add_argument("--json", type=Path, help="write the rows there instead of printing a table")
    arguments = parser.parse_args()
    rows = compile_all(arguments.targets.split(","))
    if arguments.json:
        arguments.json.write_text(json.dumps([row._asdict() | row.case._asdict() for row in rows]))
        return
    print(f"triton {triton.__version__}")
    print(f"{'kernel':22}{'target':8}{'dtype':10}{'epilogue':9}{'regs':>5}{'spills':>7}{'shared':>8}{'matrix':>8}")
    for row in rows:
        case = row.case
        print(
            f"{case.kernel:22}{case.target:8}{case.dtype:10}{case.epilogue:9}"
            f"{row.registers:5}{row.spills:7}{row.shared:8}{row.matrix_instructions:8}"
        )


if __name__ == "__main__":
    sys.exit(main())
