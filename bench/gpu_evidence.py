"""Everything a CUDA machine can say about this library, in one command and under nine minutes.

    make gpu-evidence          the tests on the GPU, then bench/run.py --suite full

Writes bench/results/<gpu>-<date>/: tests.txt, results.json, its plots, and tables.md. Refuses where there is no GPU.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import ROOT, device_name
from bench.report import report

MINUTES = 8.5
TEST_MINUTES = 3.5
# A table that began in time is finished, and fidelity and plots come after the tables.
RESERVE_MINUTES = 0.8


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit(f"make gpu-evidence needs a CUDA GPU, and torch {torch.__version__} sees none")
    start = time.perf_counter()
    folder = evidence_folder(ROOT / "bench" / "results", device_name(torch.device("cuda")), datetime.date.today())
    folder.mkdir(parents=True, exist_ok=True)
    tests_passed = run_tests(folder / "tests.txt")

    from bench import run

    minutes = MINUTES - RESERVE_MINUTES - (time.perf_counter() - start) / 60
    results = run.main(["--suite", "full", "--minutes", f"{minutes:.2f}", "--json", str(folder / "results.json")])
    (folder / "tables.md").write_text(report(results, results["provenance"]["source_sha256"]) + "\n")
    print(f"\nwrote {folder} in {(time.perf_counter() - start) / 60:.1f} minutes; the tests " + verdict(tests_passed))
    return 0 if tests_passed else 1


def run_tests(log: Path) -> bool:
    """The operators compiled for this GPU against the reference; what needs no GPU is left to `make test`."""
    skipped = [f"--ignore-glob=*/test_{name}*" for name in ("bench", "compile", "train")]
    command = [sys.executable, "-m", "pytest", "-q", *skipped, str(ROOT / "tests")]
    with log.open("w") as output:
        try:
            return (
                subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=60 * TEST_MINUTES).returncode
                == 0
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {TEST_MINUTES} minutes\n")
            return False


def verdict(tests_passed: bool) -> str:
    return "passed" if tests_passed else "FAILED or ran out of time: see tests.txt"


def evidence_folder(results: Path, device: str, date: datetime.date) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return results / f"{slug}-{date.isoformat()}"


if __name__ == "__main__":
    sys.exit(main())
