"""Time and weigh the CoPG loss of this library beside what a user would write or install instead.

    python bench/run.py                       the quick suite: one head, every provider, under three minutes
    python bench/run.py --suite full          every head, regime, case and scaling, under nine minutes on one H200
    python bench/run.py --shapes llama-3 gpt2 --regimes rl base --ignored 0.5 --repeats 30
    python bench/run.py --from-run runs/mine  bench/sparse.py on a policy that train/run.py has trained

Prints a table per shape and regime, and writes the same as JSON with its provenance, and as plots beside it.
bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import sparse
from bench.fidelity import measure_fidelity
from bench.files import write_json
from bench.inputs import REGIMES, SHAPES
from bench.loaders import LOADERS
from bench.measure import Settings, measure_table, num_steps
from bench.plot import save_plots
from bench.provenance import ROOT, provenance
from bench.providers import BONUS, FROZEN, LOG_PROBS, TRAINABLE, UPSTREAM
from bench.suites import CHOSEN, FIDELITY, MAIN_PASSES, MINUTES, SUITES, Job, title
from bench.summaries import summaries
from bench.tables import plain
from bench.timing import Rounds

JSON = ROOT / "bench" / "results" / "local" / "results.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_SHAPE = {"cpu": "cpu-32k", "cuda": "llama-3"}
DEFAULT_REPEATS = {"cpu": 5, "cuda": 20}
# What keeps a suite in its time on a busy machine: fewer rounds, then fewer tables.
SECONDS_PER_TABLE = {"cpu": 25.0, "cuda": 10.0}
CHOICES = ("shapes", "regimes", "passes", "ignored", "group_size", "tokens", "completion_length")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    if options.from_run:
        return sparse.main(["--from-run", str(options.from_run), "--json", str(options.json)])
    device = torch.device(options.device)
    results: dict[str, Any] = {"provenance": provenance(device), "suite": options.suite, "tables": [], "skipped": []}
    print(f"{results['provenance']['device']}, torch {torch.__version__}")
    measure_jobs(jobs(options), options, results)
    if options.suite and FIDELITY in (options.only or [FIDELITY]):
        results["fidelity"] = measure_fidelity(tuple(options.providers), device)
    for summary in summaries(results):
        print(f"\n{summary.plain()}")
    for name in results["skipped"]:
        print(f"\nskipped, the time was up: {name}")
    write_json(options.json, results)
    print(f"\nwrote {options.json}")
    if results["tables"] and not options.no_plots:
        draw(results, options.json)
    return results


def measure_jobs(chosen: list[Job], options: argparse.Namespace, results: dict[str, Any]) -> None:
    """A suite starts no table that, taking as long as the one before it, would end too late.

    What is measured is in the file as soon as its table is done: a later one may take the process with it.
    """
    start, last = time.perf_counter(), 0.0
    steps = [num_steps(settings_for(job, options)) for job in chosen]
    with tqdm(total=sum(steps), unit="step", leave=False) as bar:

        def advance(doing: str, done: int) -> None:
            bar.set_description(doing, refresh=False)
            bar.update(done)

        for number, job in enumerate(chosen, 1):
            begin = time.perf_counter()
            if results["tables"] and begin - start + last > 60 * options.minutes:
                results["skipped"].append(title(job))
                continue
            table = {"about": job.about} | measure_table(job.shape, job.regime, settings_for(job, options), advance)
            # Rounds that the clock cut off and providers without a time leave steps over.
            bar.update(sum(steps[:number]) - bar.n)
            results["tables"].append(table)
            write_json(options.json, results)
            last = time.perf_counter() - begin
            bar.write(f"\n{plain(table)}")


def jobs(options: argparse.Namespace) -> list[Job]:
    """The suite's tables, or a table for each combination of what was asked for."""
    if options.suite:
        chosen = SUITES[options.suite](torch.device(options.device))
        if options.only:
            chosen = [job for number, job in enumerate(chosen, 1) if str(number) in options.only]
        return [job._replace(providers=tuple(n for n in job.providers if n in options.providers)) for job in chosen]
    replaced = {
        field: value
        for field, value in (
            ("ignored", options.ignored),
            ("group_size", options.group_size),
            ("num_tokens", options.tokens),
            ("completion_length", options.completion_length),
        )
        if value is not None
    }
    passes = tuple(options.passes or MAIN_PASSES)
    return [
        Job(CHOSEN, SHAPES[name]._replace(**replaced), regime, passes, tuple(options.providers))
        for name in options.shapes or [DEFAULT_SHAPE[options.device]]
        for regime in options.regimes or ["rl"]
    ]


def settings_for(job: Job, options: argparse.Namespace) -> Settings:
    rounds = Rounds(options.repeats, options.seconds)
    return Settings(
        torch.device(options.device), DTYPES[options.dtype], rounds, job.providers, job.passes, options.seed
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=SUITES, help="default: quick, unless something below chooses the tables")
    add("--only", nargs="+", metavar="PART", help=f"of a suite: numbers of its tables, from 1, and {FIDELITY}")
    add("--minutes", type=float, help="time for a suite's tables; default: 3 for quick, 9 for full")
    add("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    add("--regimes", nargs="+", choices=(*REGIMES, "flat"))
    add("--passes", nargs="+", choices=(LOG_PROBS, TRAINABLE, FROZEN, UPSTREAM, BONUS), metavar="PASS")
    add("--ignored", type=float, metavar="SHARE", help="share of tokens with an ignored label")
    add("--group-size", type=positive)
    add("--tokens", type=positive)
    add("--completion-length", type=positive)
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--providers", nargs="+", choices=LOADERS, metavar="NAME", help="of: " + ", ".join(LOADERS))
    add("--repeats", type=positive, help="rounds of timing; default: at most 5 on a CPU, 20 on a GPU")
    add("--seed", type=int, default=0)
    add("--from-run", type=Path, metavar="DIR", help="what bench/sparse.py does with it; takes no option but --json")
    add("--json", type=Path, help="default: results.json (--from-run: sparse.json) in bench/results/local/")
    add("--no-plots", action="store_true")
    options = parser.parse_args(argv)
    if options.from_run:
        others = [name for name, value in vars(options).items() if value != parser.get_default(name)]
        if extra := set(others) - {"from_run", "json"}:
            parser.error(f"--from-run takes no --{min(extra).replace('_', '-')}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    chosen = [name for name in CHOICES if getattr(options, name) is not None]
    if options.suite and chosen:
        parser.error(f"--suite chooses its own {chosen[0].replace('_', '-')}")
    if not chosen:
        options.suite = options.suite or "quick"
    elif options.only:
        parser.error(f"--only chooses among a suite's tables, and --{chosen[0].replace('_', '-')} makes others")
    fill_in(options)
    return options


def fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on the device, or on another option."""
    options.json = options.json or (sparse.JSON if options.from_run else JSON)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or DEFAULT_DTYPE[options.device]
    options.providers = options.providers or list(LOADERS)
    options.seconds = SECONDS_PER_TABLE[options.device] if options.repeats is None else math.inf
    options.repeats = options.repeats or DEFAULT_REPEATS[options.device]
    options.minutes = options.minutes or MINUTES.get(options.suite, math.inf)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def draw(results: dict[str, Any], path: Path) -> None:
    try:
        written = save_plots(results["tables"], path)
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'copg-kernels[bench]')")
    else:
        print("\n".join(f"wrote {plot}" for plot in written))


if __name__ == "__main__":
    main()
