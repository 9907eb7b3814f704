"""Time and weigh the CoPG loss of this library beside what a user would write instead.

    python bench/run.py                       the shapes that fit this device, under three minutes
    python bench/run.py --shapes llama-3 gpt2 --regimes rl base --repeats 30 --json elsewhere/results.json

Prints a table per shape and regime, and writes the same as JSON with its provenance, and as a plot beside it.
bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.inputs import REGIMES, SHAPES
from bench.measure import Settings, measure_table, num_steps
from bench.plot import plot
from bench.provenance import ROOT, provenance
from bench.providers import LOADERS
from bench.tables import plain
from bench.timing import Rounds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = {
    "cpu": {"dtype": "float32", "shapes": ("cpu-32k", "cpu-gpt2"), "repeats": 5},
    "cuda": {"dtype": "bfloat16", "shapes": ("llama-3", "gpt2"), "repeats": 20},
}
# What keeps a run without arguments under three minutes on a busy machine: fewer rounds, then fewer tables.
SECONDS_PER_TABLE = 25.0
LAST_START = 110.0


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    device = torch.device(options.device)
    rounds = Rounds(options.repeats, options.seconds)
    settings = Settings(device, DTYPES[options.dtype], rounds, tuple(options.providers), options.seed)
    jobs = [(SHAPES[name], regime) for name in options.shapes for regime in options.regimes]
    results: dict[str, Any] = {"provenance": provenance(device), "tables": [], "skipped": []}
    start = time.perf_counter()
    print(f"{results['provenance']['device']}, torch {torch.__version__}")

    with tqdm(total=len(jobs) * num_steps(settings), unit="step", leave=False) as bar:

        def advance(doing: str, steps: int) -> None:
            bar.set_description(doing, refresh=False)
            bar.update(steps)

        for number, (shape, regime) in enumerate(jobs, 1):
            if results["tables"] and time.perf_counter() - start > options.last_start:
                results["skipped"].append(shape.name)
                continue
            table = measure_table(shape, regime, settings, advance)
            # Rounds that the clock cut off and providers without a time leave steps over.
            bar.update(number * num_steps(settings) - bar.n)
            results["tables"].append(table)
            bar.write(f"\n{plain(table)}")

    for name in results["skipped"]:
        print(f"\n{name} skipped, this machine is slow or busy: run it with --shapes {name}")
    save(results, options.json, options.plot or options.json.with_suffix(".png"))
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--regimes", nargs="+", choices=(*REGIMES, "flat"), default=["rl"])
    parser.add_argument("--providers", nargs="+", choices=LOADERS, metavar="NAME", help="of: " + ", ".join(LOADERS))
    parser.add_argument("--repeats", type=positive, help="rounds of timing; default: 5 on a CPU, 20 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "local" / "results.json")
    parser.add_argument("--plot", type=Path, help="default: the path of --json, ending in .png")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    fill_in(options)
    return options


def fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on the device, or on another option."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.providers = options.providers or list(LOADERS)
    options.seconds = SECONDS_PER_TABLE if options.repeats is None else math.inf
    options.last_start = LAST_START if options.shapes is None else math.inf
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def save(results: dict[str, Any], json_path: Path, plot_path: Path) -> None:
    for path in (json_path, plot_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(f"\nwrote {json_path}")
    try:
        plot(results["tables"], plot_path)
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'copg-kernels[bench]')")
    else:
        print(f"wrote {plot_path}")


if __name__ == "__main__":
    main()
