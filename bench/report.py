"""Results of bench/run.py as Markdown, for the README.

python bench/report.py [results.json]          without a path: the newest under bench/results/; --all: every table
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import ROOT, source_sha256
from bench.suites import CHOSEN, HEADS
from bench.summaries import summaries
from bench.tables import markdown


def report(results: dict[str, Any], present_sha256: str, every_table: bool = True) -> str:
    """The tables with where they come from; says so if copg_kernels/ is no longer what was measured.

    Without `every_table`, those of the heads, and what takes several tables to say.
    """
    origin = results["provenance"]
    found = origin["versions"] | {name: v for name, v in origin["peers"].items() if v != "not installed"}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    lines = [f"{origin['device']}; {versions}; {origin['date'][:10]}; `{origin['command']}`"]
    if origin["source_sha256"] != present_sha256:
        lines += [
            "",
            f"**Out of date**: measured at commit {origin['commit'][:12]}; copg_kernels/ has changed since.",
        ]
    tables = [markdown(table) for table in results["tables"] if every_table or table["about"] in (HEADS, CHOSEN)]
    return "\n\n".join(["\n".join(lines), *tables, *(summary.markdown() for summary in summaries(results))])


def newest(folder: Path) -> Path:
    """The file with the latest date inside: a checkout does not keep file times."""
    files = list(folder.rglob("results.json"))
    if not files:
        sys.exit(f"no results.json under {folder}: run python bench/run.py first")
    return max(files, key=lambda path: json.loads(path.read_text())["provenance"]["date"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="what bench/run.py --json wrote")
    parser.add_argument("--all", action="store_true", help="not only the tables of the heads")
    options = parser.parse_args()
    results_file = options.results or newest(ROOT / "bench" / "results")
    print(report(json.loads(results_file.read_text()), source_sha256(), options.all))
