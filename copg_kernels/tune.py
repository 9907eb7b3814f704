"""Finds what is fastest on this GPU, head by head, and keeps it for the processes that come.

    python -m copg_kernels.tune                               the heads of well-known models, in bfloat16
    python -m copg_kernels.tune --head 128256 4096            a head of 128,256 tokens by 4,096
    python -m copg_kernels.tune --model DIR --dtype float16   the head of a model on the disk
    python -m copg_kernels.tune --show                        what is in force, and nothing else

It times both ways to make the logits, the workspace, and the fields of the block table, each beside the best so far in
alternating rounds. A candidate whose numbers are wrong is named and gets no time. What is faster than the code's
defaults goes into one file per device, Triton and torch, which operators of later processes read once.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from copg_kernels import tuned
from copg_kernels.tuning.file import DTYPES, default_path, is_replaceable, write
from copg_kernels.tuning.heads import HEADS, INTERPRETED, head_of_model
from copg_kernels.tuning.passes import COMPLETIONS, Head
from copg_kernels.tuning.run import Plan, Refused, found_entries, named
from copg_kernels.tuning.table import described, table

NUM_TOKENS, INTERPRETED_TOKENS = 8192, 8
REPEATS, LEAST_REPEATS = 9, 3


def tune(
    heads: Iterable[tuple[int, int]] | None = None,
    *,
    dtype: torch.dtype | None = None,
    num_tokens: int | None = None,
    repeats: int = REPEATS,
    minutes: float | None = None,
    out: Path | str | None = None,
) -> Path:
    """Time the candidates of each head on this GPU, and write down what is faster than the code's defaults.

    The file is written after each head, whole at any time; heads of earlier runs stay in it. A process reads it when
    its first operator runs, and keeps what it has read. The table goes to stdout, the progress to stderr.

    Args:
        heads: (vocabulary entries, hidden size) of each; those of well-known models by default.
        dtype: of hidden states and weight; bfloat16 by default.
        num_tokens: of the batch it is timed on, a multiple of 8; 8,192 by default.
        repeats: rounds of timing, at least 3.
        minutes: no candidate is begun after these; None: as long as it takes.
        out: the file; by default the one that operators read, in the user's cache folder.

    Returns:
        The file.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
        RuntimeError: there is no GPU, it broke, or a head does not fit it or is wrong with the code's defaults.
        OSError: the file cannot be written.
    """
    device = _device()
    name = tuned.device_name(device)
    if name is None:
        raise RuntimeError(
            f"tuning needs a GPU, and torch {torch.__version__} sees none; TRITON_INTERPRET=1 rehearses it on a CPU"
        )
    plan = _plan(device, name == tuned.INTERPRETER, heads, dtype, num_tokens, repeats, minutes)
    path = _path(name, out)
    write(path, name, [])
    _say(f"tuning for {name}, into {path}")
    found: dict[Head, dict[str, Any]] = {}
    refused: list[str] = []
    try:
        for head, entry in found_entries(plan, _say):
            if isinstance(entry, Refused):
                refused.append(str(entry))
                _say(refused[-1])
            else:
                found[head] = entry
                write(path, name, [entry])
    finally:
        _tell(plan, found, path)
    if refused:
        raise RuntimeError("; ".join(refused))
    return path


def show() -> None:
    """Print what is in force in this process on its current device: the file and its heads, or why there is none."""
    name = tuned.device_name(_device())
    if name is None:
        print("no kernels run here: nothing is tuned")
        return
    found = tuned.in_force(name)
    print(f"{name}: {found.source}")
    for entry in found.entries:
        print(f"  {named(Head(*entry[:3]))}: {described(entry.settings)}")
    if found.entries:
        print("  any other head: the code's defaults")


def main(argv: list[str] | None = None) -> int:
    """The command; 0 where every head was tuned."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.show:
        show()
        return 0
    try:
        heads = [*map(tuple, options.head or ()), *map(head_of_model, options.model or ())]
        tune(
            heads or None,
            dtype=None if options.dtype is None else DTYPES[options.dtype],
            num_tokens=options.tokens,
            repeats=options.repeats,
            minutes=options.minutes,
            out=options.out,
        )
    except (TypeError, ValueError) as refused:
        parser.error(str(refused))
    except OSError as error:
        parser.error(f"the file cannot be written: {error}")
    except RuntimeError as failure:
        _say(f"tune: {failure}")
        return 1
    except KeyboardInterrupt:
        _say("tune: interrupted; what was found before is kept")
        return 130
    return 0


def _plan(
    device: torch.device,
    is_interpreted: bool,
    heads: Iterable[tuple[int, int]] | None,
    dtype: torch.dtype | None,
    num_tokens: int | None,
    repeats: int,
    minutes: float | None,
) -> Plan:
    if dtype is None:
        dtype = torch.float32 if is_interpreted else torch.bfloat16
    if dtype not in DTYPES.values():
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if heads is None:
        heads = [INTERPRETED] if is_interpreted else HEADS.values()
    shapes = [*dict.fromkeys(tuple(head) for head in heads)]
    if not shapes or not all(len(shape) == 2 and all(map(_is_count, shape)) for shape in shapes):
        raise ValueError(f"heads must be pairs of vocabulary entries and hidden size, all above 0, got {shapes}")
    if num_tokens is None:
        num_tokens = INTERPRETED_TOKENS if is_interpreted else NUM_TOKENS
    if not _is_count(num_tokens) or num_tokens % COMPLETIONS:
        raise ValueError(f"tokens must be a multiple of {COMPLETIONS} above 0, got {num_tokens}")
    if not _is_count(repeats) or repeats < LEAST_REPEATS:
        raise ValueError(f"repeats must be at least {LEAST_REPEATS}, or there is no spread, got {repeats}")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    return Plan([Head(dtype, V, H) for V, H in shapes], num_tokens, repeats, until, device)


def _path(device_name: str, out: Path | str | None) -> Path:
    path = default_path(device_name) if out is None else Path(out).expanduser()
    if path is None:
        raise ValueError("out must be given, as there is no home folder and XDG_CACHE_HOME is not set")
    if out is not None and not is_replaceable(path):
        raise ValueError(f"out must be a new file or one of this command, and {path} is neither")
    return path


def _tell(plan: Plan, found: dict[Head, dict[str, Any]], path: Path) -> None:
    if found:
        print(table(found.values()), end="\n\n")
    for head in plan.heads:
        if head in found:
            settings = tuned.Settings(*(found[head][name] for name in tuned.Settings._fields))
            print(f"{named(head)}: {described(settings)}")
        else:
            print(f"{named(head)}: nothing found, so what the file had stays")
    print(f"wrote {path}", flush=True)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m copg_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", nargs=2, type=int, action="append", metavar=("V", "H"), help="may be repeated")
    parser.add_argument(
        "--model", type=Path, action="append", metavar="DIR", help="with a config.json; may be repeated"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--tokens", type=int, metavar="T", help=f"of the batch; default: {NUM_TOKENS}")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds of timing; default: {REPEATS}")
    parser.add_argument("--minutes", type=float, help="no candidate is begun after these; default: as long as it takes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the file that operators read")
    parser.add_argument("--show", action="store_true", help="say what is in force, and tune nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
