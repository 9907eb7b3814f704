"""Compile what the operators launch, for every target with no GPU present, and say what came out.

    python -m tests.compile_report [--targets sm_90,...] [--all] [--json FILE]

The cases are the launches of tests/calls.py, recorded: see bench/recording.py. One row per compilation: registers,
spills in bytes per thread, shared memory, which matrix instruction was chosen, and unfenced copies.

--all takes minutes per target. Without it float32 is compiled for sm_80 and sm_90 alone, and float16, the plain
epilogue, a cap alone and a hidden size that is no multiple of 16 for sm_90. tests/test_compile.py
asserts on the same rows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from bench.compiled import compiled, cuobjdump, read_nvidia
from bench.recording import TARGETS, Variant, recorded
from copg_kernels import linear_copg_loss
from tests import calls
from tests.calls import ALIGNED, EVEN, FULL, MULTIPLE, ONE, ONE_MORE, PLAIN, PRIME, Call

# What a matrix product compiles to, in PTX or AMD's assembly: warp-group and tcgen05 instructions where there are any.
MATRIX_INSTRUCTION = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "sm_120": r"mma\.sync",
    "gfx942": "v_mfma",
}
# The operators that between them launch the kernels of a head's logits in every form.
HEADS = ["logps", "entropy", "average"]
# With a cap and nothing else: the largest tile has no register to spare.
CAPPED = ["logps", "entropy", "copg", "bonus"]
# What CI compiles in more than one form: the others need registers most in the one form that it compiles anyway.
BEFORE_ALL = [name for name in calls.OPERATORS if name not in ("bonus", "statistics", "frozen statistics")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Row(NamedTuple):
    """What one compilation came out as."""

    target: str
    kernel: str
    element: str
    arguments: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    unfenced: bool
    """A matrix instruction may read a copy that was made in the background before it is visible to it."""


def calls_for(target: str, everything: bool) -> list[Call]:
    """All calls, or those whose compilations take no more than a minute or two."""
    if everything:
        shapes = [EVEN, MULTIPLE, PRIME, ONE, ONE_MORE, ALIGNED]
        single = calls.calls([EVEN], [torch.bfloat16], [dict(bias=True), dict(softcap=6.0)])
        sliced = calls.calls([EVEN, PRIME], DTYPES, [PLAIN, FULL], HEADS, "sliced")
        return [*calls.calls(shapes, DTYPES, [PLAIN, FULL]), *single, *sliced]
    chosen = [*calls.calls([EVEN], [torch.bfloat16], [FULL])]
    chosen += calls.calls([EVEN], [torch.bfloat16], [FULL], HEADS if target == "sm_90" else HEADS[1:], "sliced")
    if target in ("sm_80", "sm_90"):
        chosen += calls.calls([EVEN], [torch.float32], [FULL], BEFORE_ALL)
    if target == "sm_90":
        chosen += calls.calls([EVEN], [torch.bfloat16], [PLAIN], BEFORE_ALL)
        # In a vocabulary that fills no tile, too.
        chosen += calls.calls([EVEN, MULTIPLE], [torch.bfloat16], [dict(softcap=6.0)], CAPPED)
        chosen += calls.calls([EVEN], [torch.float16], [FULL], ["logps", "entropy"])
        chosen += calls.calls([PRIME], [torch.bfloat16], [FULL])
    return chosen


@cache
def variants(target: str, everything: bool) -> dict[tuple, Variant]:
    """Of the launches of these calls."""
    with recorded(target) as found:
        for call in calls_for(target, everything):
            device = torch.device("cpu")
            with calls.room(call):
                calls.run(call, calls.operands(call, device), calls.completions(call, device), "triton")
    return found


def compile_variant(case: tuple[str, bool, tuple]) -> Row:
    """Compile one and read the binary."""
    target, everything, key = case
    variant = variants(target, everything)[key]
    kernel = compiled(variant, target)
    read = _read_amd if target.startswith("gfx") else read_nvidia
    registers, spills, code = read(kernel)
    return Row(
        target,
        variant.name,
        variant.element,
        variant.describe(),
        registers,
        spills,
        kernel.metadata.shared,
        len(re.findall(MATRIX_INSTRUCTION[target], code)),
        target in ("sm_90", "sm_100") and _copies_and_multiplies(code) and _is_unfenced(kernel),
    )


def _read_amd(kernel) -> tuple[int, int, str]:
    assembly = kernel.asm["amdgcn"]
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly))
    scratch = len(re.findall(r"\bscratch_(?:load|store)", assembly))
    return int(fields["vgpr_count"]), int(fields["vgpr_spill_count"]) + scratch, assembly


def _copies_and_multiplies(ptx: str) -> bool:
    return bool(re.search(r"cp\.async\.(?:ca|cg)", ptx) and re.search(r"wgmma\.mma_async|tcgen05\.mma", ptx))


def _is_unfenced(kernel) -> bool:
    """Whether between a background copy and the next matrix instruction no fence makes it visible."""
    pattern = r"\b(LDGSTS|FENCE\.VIEW\.ASYNC|HGMMA|UTC\w*MMA)\b"
    before = ""
    for instruction in re.findall(pattern, cuobjdump("--dump-sass", kernel)):
        if before == "LDGSTS" and instruction.endswith("MMA"):
            return True
        before = instruction
    return False


def compile_all(targets: list[str], everything: bool, workers: int = 2) -> list[Row]:
    """All variants, `workers` at a time."""
    with ProcessPoolExecutor(workers) as pool:
        cases = [(target, everything, key) for target in targets for key in variants(target, everything)]
        return list(pool.map(compile_variant, cases, chunksize=4))


def variants_of_batches(target: str, V: int, H: int, batches: int = 20) -> list[str]:
    """What batches of random sizes compile beyond the first one."""
    first: set[tuple] | None = None
    others: set[tuple] = set()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, dtype=torch.bfloat16)
    for _ in range(batches):
        lengths = torch.randint(1, 40, (2 * int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
        T = int(lengths.sum())
        hidden_states = torch.randn(T, H, dtype=torch.bfloat16).requires_grad_()
        batch = dict(
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
            ref_logps=torch.randn(len(lengths)),
            rewards=torch.randn(len(lengths)),
        )
        with recorded(target) as found:
            labels, leaves = torch.randint(V, (T,)), (hidden_states, weight.requires_grad_())
            for eps, workspace in ((None, None), (2.0**-14, None), (None, 2**16)):
                options = dict(sparse_eps=eps, workspace_bytes=workspace, backend="triton")
                linear_copg_loss(*leaves, labels, **batch, beta=0.1, group_size=2, **options).loss.backward()
        if first is None:
            first = set(found)
        others |= set(found) - first
    return [f"{name}: {specialization}" for name, specialization, _ in others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of " + ", ".join(TARGETS))
    parser.add_argument("--all", action="store_true", help="every recorded launch for every target")
    parser.add_argument("--json", type=Path, help="write the rows there instead of printing a table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    targets = arguments.targets.split(",")
    rows = compile_all(targets, arguments.all)
    if arguments.json:
        of_batches = [name for head in ((272, 128), (275, 31)) for name in variants_of_batches(targets[0], *head)]
        result = dict(rows=[row._asdict() for row in rows], of_batches=of_batches)
        arguments.json.write_text(json.dumps(result))
        return
    print(f"triton {triton.__version__}: {len(rows)} compilations")
    print(f"{'kernel':22}{'target':8}{'type':6}{'regs':>5}{'spills':>7}{'shared':>8}{'matrix':>8}  arguments")
    for row in rows:
        print(
            f"{row.kernel:22}{row.target:8}{row.element:6}{row.registers:5}{row.spills:7}{row.shared:8}"
            f"{row.matrix_instructions:8}  {'UNFENCED ' if row.unfenced else ''}{row.arguments}",
            flush=True,
        )
    print(f"with spills: {sum(row.spills > 0 for row in rows)}; unfenced: {sum(row.unfenced for row in rows)}")


if __name__ == "__main__":
    sys.exit(main())
