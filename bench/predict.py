"""What the compiled kernels are predicted to take on a GPU: a model on paper, to be wrong in public.

    python -m bench.predict                             Llama-3, Qwen3 and Gemma-2-2B heads, 8,192 tokens, an H200
    python -m bench.predict --head 32000 2048 --tokens 4096 --paths exact frozen
    python -m bench.predict --way sliced                logits by cuBLAS, a slice of the vocabulary at a time

No GPU is needed. The operators are recorded at their real shapes (passes.py), their kernels are compiled for the GPU
and read (compiled.py, machine_code.py), and each pass is costed (costs.py) by a visible table of the GPU (gpus.py). One
unit is a GEMM of the head: 2 T V H operations at cuBLAS's rate. Beside the prediction stand the target, and the units
that were measured where bench/results/ has a run on that GPU. All that is assumed is printed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.costs import Cost, cost
from bench.files import write_json
from bench.gpus import GPUS, Gpu, Range
from bench.inputs import SHAPES, Shape
from bench.kernel_code import NoRule
from bench.measured_units import measured_units
from bench.passes import GROUP_SIZE, PATHS, Pass, TorchOp, passes_of
from bench.prediction_tables import markdown, plain
from bench.provenance import ROOT, source_sha256
from copg_kernels.kernels.language import INTERPRETING
from copg_kernels.tuned import WAYS

HEADS = ("llama-3", "qwen3", "gemma-2-2b")
TOKENS, COMPLETION_LENGTH = 8192, 1024
# The most units there should be; "any gradient" is 1.12 x its four GEMMs.
TARGETS = {"log-probs": 1.1, "exact": 3.2, "frozen": 2.2, "any gradient": 4.48, "sparse (rl)": 1.6}
# Share of the softmax in columns of which one of 128 tokens has 2^-14: regime rl, V = 151,936, 1,024 tokens.
DENSITY = 0.0301
DENSITY_FROM = "bench/results/sparse-2cpu-2026-11-20"


class Part(NamedTuple):
    """Equal passes."""

    name: str
    launches: int
    units: Range
    gigabytes: float
    about: str
    l2: Range  # of the units: what the kernel's tiles ask of the L2 takes at least


class Prediction(NamedTuple):
    path: str
    units: Range
    milliseconds: Range
    gemms: float  # matrix products that were counted, in units
    target: float
    measured: float | None
    measured_in: str
    parts: list[Part]
    note: str


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = _parse(argv)
    if INTERPRETING:
        sys.exit("bench.predict compiles kernels: TRITON_INTERPRET must not be set")
    gpu = GPUS[options.gpu]
    assumed = [*gpu.assumptions(), f"density: {options.density} of the softmax (by default {DENSITY_FROM})"]
    results: dict[str, Any] = {"provenance": _origin(), "gpu": gpu.name, "assumptions": assumed, "heads": []}
    try:
        for shape in _shapes(options):
            predictions = predict(shape, gpu, options.paths, options.way, options.density, options.workspace_bytes)
            paths = [one._asdict() | dict(parts=[part._asdict() for part in one.parts]) for one in predictions]
            results["heads"].append(dict(shape=shape._asdict(), way=options.way, paths=paths))
    except (FileNotFoundError, NoRule) as error:  # no cuobjdump, or a kernel of another kind
        sys.exit(f"nothing can be predicted: {error}")
    print(markdown(results) if options.markdown else plain(results))
    if options.json:
        write_json(options.json, results)
    return results


def predict(
    shape: Shape,
    gpu: Gpu,
    paths: Iterable[str] = tuple(TARGETS),
    way: str = "fused",
    density: float = DENSITY,
    workspace_bytes: int | None = None,
) -> list[Prediction]:
    """One per path, by its name."""
    predictions = []
    for path in PATHS:
        if path.name in paths:
            passes = passes_of(path, shape, gpu.target, way, workspace_bytes)
            fused = passes if way == "fused" else passes_of(path, shape, gpu.target, "fused", workspace_bytes)
            is_none = way != "fused" and _names(passes) == _names(fused)
            note = f"the passes of the way fused: {way} changes nothing here" if is_none else ""
            costs = [cost(one, gpu, density) for one in passes]
            predictions.append(_prediction(path.name, shape, costs, gpu, note))
    return predictions


def _prediction(path: str, shape: Shape, costs: list[Cost], gpu: Gpu, note: str) -> Prediction:
    operations = 2 * shape.num_tokens * shape.vocab_size * shape.hidden_size
    unit = operations / gpu.cublas.best
    seconds = _sum(one.seconds for one in costs)
    return Prediction(
        path,
        seconds.times(1 / unit),
        seconds.times(1e3),
        sum(one.operations for one in costs) / operations,
        TARGETS[path],
        *measured_units(path, shape, gpu.name),
        _parts(costs, unit),
        note,
    )


def _parts(costs: list[Cost], unit: float) -> list[Part]:
    """The most expensive first."""
    equal: dict[tuple[str, str], list[Cost]] = {}
    for one in costs:
        equal.setdefault((one.name, one.about), []).append(one)
    return sorted((_part(members, unit) for members in equal.values()), key=lambda part: -part.units.high)


def _part(equal: list[Cost], unit: float) -> Part:
    seconds, l2 = (_sum(ranges).times(1 / unit) for ranges in ([x.seconds for x in equal], [x.l2 for x in equal]))
    first = equal[0]
    return Part(first.name, len(equal), seconds, sum(one.bytes for one in equal) / 1e9, first.about, l2)


def _sum(ranges: Iterable[Range]) -> Range:
    lows, highs = zip(*ranges, strict=True)
    return Range(sum(lows), sum(highs))


def _names(passes: list[Pass]) -> list[tuple]:
    return [tuple(one) if isinstance(one, TorchOp) else (one.variant.name, one.grid) for one in passes]


def _shapes(options: argparse.Namespace) -> list[Shape]:
    shapes = [SHAPES[name] for name in options.heads]
    if options.head:
        vocab_size, hidden_size = options.head
        shapes = [Shape("head", vocab_size, hidden_size, TOKENS, COMPLETION_LENGTH)]
    length = _completion_length(options.tokens)
    return [shape._replace(num_tokens=options.tokens, completion_length=length) for shape in shapes]


def _completion_length(num_tokens: int) -> int:
    return max(1, min(COMPLETION_LENGTH, num_tokens // GROUP_SIZE))


def _origin() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_sha256": source_sha256(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=list(SHAPES), help="by default " + " ".join(HEADS))
    parser.add_argument("--head", nargs=2, type=int, metavar=("V", "H"), help="a head's shape, instead")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in pairs of completions of 1,024 tokens or fewer")
    parser.add_argument("--paths", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--way", default="fused", choices=WAYS, help="how logits are made: see copg_kernels/tuned.py")
    parser.add_argument("--gpu", default="h200", choices=list(GPUS))
    parser.add_argument("--density", type=float, default=DENSITY, help="share of the softmax that is kept")
    parser.add_argument("--workspace-bytes", type=int, help="of the operators; by default theirs")
    parser.add_argument("--markdown", action="store_true", help="the tables alone")
    parser.add_argument("--json", type=Path, help="write all of it there, too")
    options = parser.parse_args(argv)
    group = GROUP_SIZE * _completion_length(options.tokens)
    if options.tokens < 1 or options.tokens % group:
        parser.error(f"--tokens must be a multiple of {group}, got {options.tokens}")
    if options.json and options.json.resolve().is_relative_to(ROOT / "bench" / "results"):
        parser.error("bench/results/ is for what was measured: write predictions elsewhere")
    return options


if __name__ == "__main__":
    main()
