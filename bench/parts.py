"""Parts of one long job, each a process with a time limit: what befalls one costs the others nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.provenance import ROOT

WAITING, RUNNING, PASSED, FAILED, CRASHED = "waiting", "running", "passed", "failed", "crashed"
TIMED_OUT, NOT_RUN, STOPPED = "timed out", "not run", "stopped"
# With less than this left a part is not begun: it would not get through its imports.
LEAST_SECONDS = 5.0
POLL_SECONDS = 0.05
STACK_SECONDS = 3.0
MOST_SAID = 200


class Part(NamedTuple):
    name: str
    command: tuple[str, ...]
    seconds: float  # its own limit, within what is left of the stage's
    # For each further try after a crash or a time-out, what its command gets in addition.
    again: tuple[tuple[str, ...], ...] = ()


class Line(NamedTuple):
    """What there is to say about a part, at any time."""

    name: str
    status: str
    detail: str = ""
    seconds: float | None = None


class Ended(NamedTuple):
    part: Part
    returncode: int
    timed_out: bool
    seconds: float
    output: Path  # what it printed, errors too


class Stage(NamedTuple):
    """How some parts are run."""

    folder: Path  # for what they print
    until: float  # of time.monotonic()
    jobs: int  # so many at a time
    environment: dict[str, str]  # beside what there is
    judge: Callable[[Ended], Line]
    tell: Callable[[Line], object]


class Running(NamedTuple):
    part: Part
    process: subprocess.Popen[bytes]
    began: float
    stop_at: float
    output: Path


def run_parts(parts: list[Part], stage: Stage) -> None:
    """In their order, `stage.jobs` at a time; tells of each when it begins and when it has ended, or why it has not."""
    waiting, running = deque(parts), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < stage.jobs:
                part = waiting.popleft()
                if stage.until - time.monotonic() < LEAST_SECONDS:
                    stage.tell(Line(part.name, NOT_RUN, "the time was up"))
                else:
                    running.append(_begin(part, stage))
                    stage.tell(Line(part.name, RUNNING))
            for each in [each for each in running if _has_ended(each)]:
                running.remove(each)
                _try_again(each.part, _settle(each, stage), waiting, stage)
            time.sleep(POLL_SECONDS)
    finally:
        # Whatever ends this process early ends its parts too.
        for each in running:
            _stop(each.process)
            stage.tell(Line(each.part.name, STOPPED, "with the whole run", time.monotonic() - each.began))


def how_it_ended(ended: Ended) -> str:
    """Its signal or exit code, and the last error it printed, or else its last line."""
    lines = [line for line in ended.output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b|Fatal Python error|ERROR", line)]
    said = (errors or lines or ["nothing printed"])[-1]
    return f"{_name(ended.returncode)}: {said[:MOST_SAID]}"


def _name(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    with suppress(ValueError):
        return signal.Signals(-returncode).name
    return f"signal {-returncode}"


def _begin(part: Part, stage: Stage) -> Running:
    stage.folder.mkdir(parents=True, exist_ok=True)
    output = stage.folder / f"{part.name.replace('/', '-')}.txt"
    with output.open("wb") as file:
        # A process group of its own, so that what it started ends with it.
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment,
            cwd=ROOT,
            process_group=0,
        )
    now = time.monotonic()
    return Running(part, process, now, min(now + part.seconds, stage.until), output)


def _has_ended(each: Running) -> bool:
    return each.process.poll() is not None or time.monotonic() > each.stop_at


def _settle(each: Running, stage: Stage) -> Line:
    seconds = time.monotonic() - each.began
    timed_out = each.process.poll() is None
    returncode = _stop(each.process)
    try:
        line = stage.judge(Ended(each.part, returncode, timed_out, seconds, each.output))
    except Exception as error:  # what cannot be read must not take the parts with it that are still to come
        line = Line(each.part.name, FAILED, f"its result cannot be read: {error!r}", seconds)
    stage.tell(line)
    return line


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Where it is, if its faulthandler is on, and then the end of it and of all that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STACK_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
        process.wait(STACK_SECONDS)
    return -signal.SIGKILL if process.returncode is None else process.returncode


def _try_again(part: Part, line: Line, waiting: deque[Part], stage: Stage) -> None:
    """What crashed goes on at once, for it came first; what took too long after all others had their turn."""
    if line.status not in (CRASHED, TIMED_OUT) or not part.again:
        return
    added, *again = part.again
    another = part._replace(name=f"{part.name}, again", command=(*part.command, *added), again=tuple(again))
    stage.tell(Line(another.name, WAITING))
    waiting.appendleft(another) if line.status == CRASHED else waiting.append(another)
