"""Every test's outcome in a file as soon as there is one, with its traceback where it failed.

    python -m pytest -p bench.log_failures --log-failures tests.txt tests/test_kernels.py

A process that is killed leaves all that was known. The same command then goes on: it passes over each test that has
an outcome in the file. Several processes may write to one file.
"""

from __future__ import annotations

import faulthandler
import re
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

OUTCOMES = ("passed", "failed", "error", "crashed", "skipped", "xfailed")
RUNNING = "running"
# Of one test; kernels compile within it. Then its process ends, and the file says where it was.
TEST_SECONDS = 90.0
GPU_LOST = 70
_RECORD = re.compile(rf"^({'|'.join((RUNNING, *OUTCOMES))}) +(?:[\d.]+ s)? +(\S+\.py.*)$")


def record(outcome: str, nodeid: str, seconds: float | None = None) -> str:
    return f"{outcome:<8}{'' if seconds is None else f'{seconds:.2f} s':>10}  {nodeid}\n"


def read_log(path: Path, file: str) -> dict[str, list[str]]:
    """Tests of `file` by outcome; under RUNNING those that have none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    records = [match.groups() for line in text.splitlines() if (match := _RECORD.match(line))]
    found: dict[str, list[str]] = {outcome: [] for outcome in (*OUTCOMES, RUNNING)}
    for outcome, nodeid in records:
        if nodeid.split("::")[0] == file:
            found[outcome].append(nodeid)
    ended = {nodeid for outcome in OUTCOMES for nodeid in found[outcome]}
    return found | {RUNNING: sorted(set(found[RUNNING]) - ended)}


def append(path: Path, text: str) -> None:
    """In one write, which no other process's comes into the middle of."""
    with path.open("ab", buffering=0) as file:
        file.write(text.encode(errors="backslashreplace"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--log-failures", type=Path, metavar="FILE", help="outcomes and tracebacks as they come")
    parser.addoption("--first-tests", type=int, metavar="N", help="of each file, for a rehearsal")
    parser.addoption("--test-seconds", type=float, default=TEST_SECONDS, help="of one test, then the process ends")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--log-failures"):
        config.pluginmanager.register(Log(path, config.getoption("--test-seconds")))


class Log:
    def __init__(self, path: Path, test_seconds: float) -> None:
        self.path, self.test_seconds, self.passed_over = path, test_seconds, 0
        self.stacks = path.open("ab", buffering=0)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        by_file: dict[str, list[pytest.Item]] = {}
        for item in items:
            by_file.setdefault(item.nodeid.split("::")[0], []).append(item)
        items.clear()
        for file, tests in by_file.items():
            log, tests = read_log(self.path, file), tests[: config.getoption("--first-tests")]
            done = {nodeid for outcome in OUTCOMES for nodeid in log[outcome]}
            items += [item for item in tests if item.nodeid not in done]
            self.passed_over += len(done)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        append(self.path, record(RUNNING, nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome: str = report.outcome
        if outcome == "passed" and report.when != "call":
            return
        if outcome == "failed" and report.when != "call":
            outcome = "error"
        if outcome == "skipped" and hasattr(report, "wasxfail"):
            outcome = "xfailed"
        append(self.path, record(outcome, report.nodeid, report.duration) + _indented(_story(report)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            append(self.path, record("error", report.nodeid) + _indented(report.longreprtext))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        faulthandler.dump_traceback_later(self.test_seconds, exit=True, file=self.stacks)
        result = yield
        faulthandler.cancel_dump_traceback_later()
        if reason := _gpu_lost():
            append(self.path, record("error", item.nodeid) + _indented(f"The GPU no longer answers: {reason}"))
            pytest.exit(f"the GPU no longer answers after {item.nodeid}", GPU_LOST)
        return result

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed_over:
            session.exitstatus = pytest.ExitCode.OK


def _story(report: pytest.TestReport) -> str:
    if report.outcome == "failed":
        return "\n".join([report.longreprtext, *(f"-- {name} --\n{text}" for name, text in report.sections)])
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else ""


def _indented(text: str) -> str:
    """So that no line of it looks like a record."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _gpu_lost() -> str | None:
    """An illegal address ends every later call of its process too, so that no later test would say anything."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
