"""Everything a CUDA machine can say about this library, in one command and under nine minutes.

    make gpu-evidence                          copg_kernels.tune, tests on the GPU, then bench/run.py --suite full
    python bench/gpu_evidence.py --rehearse    every step of it on a CPU, at tiny shapes, in about two minutes

Each file of tests and each table is a process of its own, and on the disk as it happens. bench/results/<gpu>-<date>/
gets summary.md, a line for each part; tuned.json, the settings that the tables were measured with; tests.txt, every
outcome and traceback; output.txt, what the parts printed; results.json, its plots and tables.md. The exit status is 0
if every part ran and passed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import evidence_tables, evidence_tests, evidence_tune
from bench.evidence_summary import Page, summary, told
from bench.files import write_whole
from bench.loaders import EAGER, OURS
from bench.log_failures import append
from bench.parts import PASSED, WAITING, Ended, Line, Stage, run_parts
from bench.provenance import ROOT, device_name, provenance

MINUTES = 8.5
# Of all the minutes: the tuning; it and the tests together; a file of tests, a table; the plots get what is kept back
# for them.
TUNE, TESTS, FILE, TABLE, PLOTS = 0.2, 0.6, 0.35, 0.2, 0.03
# Compiling keeps CPU cores busy and the GPU idle.
TEST_JOBS = min(4, os.cpu_count() or 1)


class Kind(NamedTuple):
    heading: str
    device: str
    suite: str
    environment: dict[str, str]
    test_options: tuple[str, ...] = ()
    table_options: tuple[str, ...] = ()
    table_jobs: int = 1
    tune_options: tuple[str, ...] = ()


EVIDENCE = Kind("# Evidence from a GPU", "cuda", "full", {"TRITON_INTERPRET": "0"})
REHEARSAL = Kind(
    "# REHEARSAL on a CPU: evidence of nothing",
    "cpu",
    "tiny",
    {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
    ("--first-tests", "2"),
    ("--device", "cpu", "--repeats", "2", "--providers", EAGER, OURS),
    table_jobs=2,
    tune_options=("--head", "64", "16", "--tokens", "8", "--repeats", "3", "--minutes", "0.1"),
)


class Run(NamedTuple):
    kind: Kind
    folder: Path
    page: Page
    lines: dict[str, Line]
    began: float
    seconds: float


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    kind = REHEARSAL if options.rehearse else EVIDENCE
    if kind is EVIDENCE and not torch.cuda.is_available():
        sys.exit(
            f"make gpu-evidence needs a CUDA GPU, and torch {torch.__version__} sees none; --rehearse goes without"
        )
    expect_the_worst()
    began = time.monotonic()
    page = Page(kind.heading, provenance(torch.device(kind.device)), evidence_tests.left_out())
    folder = new_folder(options.out.resolve() if options.out else default_folder(kind))
    run = Run(kind, folder, page, {}, began, 60 * options.minutes)
    print(f"{kind.heading}\ninto {folder}\ntests left out: {', '.join(page.left_out)}", flush=True)
    run_everything(run)
    return finish(run)


def expect_the_worst() -> None:
    """Whoever stops this process stops its parts, and none that crashes spends the time on a dump of its memory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def run_everything(run: Run) -> None:
    """What matters most comes first. All parts are on the page from the beginning."""
    kind, log, parts_folder = run.kind, run.folder / "tests.txt", run.folder / "parts"
    tune = evidence_tune.tune_part(run.folder, TUNE * run.seconds, kind.tune_options)
    tests = evidence_tests.test_parts(log, FILE * run.seconds, kind.test_options)
    tables = evidence_tables.table_parts(parts_folder, kind.suite, TABLE * run.seconds, kind.table_options)
    plots = evidence_tables.plot_part(run.folder, PLOTS * run.seconds)
    run.lines.update({part.name: Line(part.name, WAITING) for part in (tune, *tests, *tables, plots)})

    def judge_table(ended: Ended) -> Line:
        evidence_tables.merge(run.folder, tables, run.page.origin, kind.suite, kind.heading)
        return evidence_tables.judge(ended)

    run_parts([tune], stage(run, TUNE, 1, evidence_tune.judge, COPG_TUNED="off"))
    tuned = evidence_tune.file_of(run.folder)
    run.page.origin["tuned"] = tuned.name if tuned.exists() else "the code's defaults"
    threads = str(max(1, (os.cpu_count() or 1) // TEST_JOBS))
    run_parts(tests, stage(run, TESTS, TEST_JOBS, partial(evidence_tests.judge, log), OMP_NUM_THREADS=threads))
    # Not what else was tuned on this machine, which nobody could look up.
    in_force = str(tuned) if tuned.exists() else "off"
    run_parts(tables, stage(run, 1 - PLOTS, kind.table_jobs, judge_table, COPG_TUNED=in_force))
    run_parts([plots], stage(run, 1.0, 1, evidence_tables.judge_plots))


def stage(run: Run, share: float, jobs: int, judge: Callable[[Ended], Line], **environment: str) -> Stage:
    def keep_and_judge(ended: Ended) -> Line:
        append(run.folder / "output.txt", f"== {ended.part.name}\n{ended.output.read_text(errors='replace')}\n")
        return judge(ended)

    until = run.began + share * run.seconds
    environment |= run.kind.environment | {"TQDM_DISABLE": "1"}
    return Stage(run.folder / "parts", until, jobs, environment, keep_and_judge, partial(tell, run))


def tell(run: Run, line: Line) -> None:
    run.lines[line.name] = line
    write_whole(run.folder / "summary.md", summary(run.page, run.lines, minutes=None))
    print(told(line), flush=True)


def finish(run: Run) -> int:
    text = summary(run.page, run.lines, minutes=(time.monotonic() - run.began) / 60)
    write_whole(run.folder / "summary.md", text)
    shutil.rmtree(run.folder / "parts", ignore_errors=True)  # all of it is in the other files by now
    print(f"\n{text}\nwrote {run.folder}")
    return 0 if all(line.status == PASSED for line in run.lines.values()) else 1


def default_folder(kind: Kind) -> Path:
    if kind is REHEARSAL:
        return Path(tempfile.mkdtemp(prefix="gpu-evidence-rehearsal-"))
    return evidence_folder(ROOT / "bench" / "results", device_name(torch.device("cuda")), datetime.date.today())


def evidence_folder(results: Path, device: str, date: datetime.date) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return results / f"{slug}-{date.isoformat()}"


def new_folder(wanted: Path) -> Path:
    """The folder, empty, or the first of -2, -3, ... that is: nothing is written over an earlier run."""
    folder, number = wanted, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, into a temporary folder")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything; default: {MINUTES}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<gpu>-<date>")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
