"""TRL's own tests of `trl.kernels.ChunkedLogProbFunction`, with ours in its place.

    python scripts/trl_own_tests.py                # those of the installed version, from its source archive
    python scripts/trl_own_tests.py --source DIR   # those of a checkout of TRL

The archive comes from GitHub, by the version's tag: what TRL uploads to PyPI has no tests. The tests of its trainers
are not run, as they download models. Three things differ from a run of its own:

- The tests ask for an accelerator. Without one they run on the CPU, where TRL's function works too.
- What they expect of bfloat16 operands is computed in float32 instead. Their eager code rounds the logits to bfloat16
  and is then off by 6e-3 in the gradients, against float64, where ours is off by the rounding of the result alone.
- test_forward is left out: it counts the rows of TRL's own calls of torch.mm.

Ends with the status of pytest, or with 69 where there is no archive to be had.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ARCHIVE = "https://github.com/huggingface/trl/archive/refs/tags/v{}.tar.gz"
UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h
SELECTED = "TestChunkedLogProbFunction and not test_forward"


class Differences:
    """A plugin of pytest: the first two of the differences above."""

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            for node in item.listchain():
                node.own_markers = [mark for mark in node.own_markers if "accelerator" not in str(mark.kwargs)]
        for test_class in {item.cls for item in items if hasattr(item.cls, "_reference_logprobs_and_entropy")}:
            reference = test_class._reference_logprobs_and_entropy
            test_class._reference_logprobs_and_entropy = in_float32(reference)


def in_float32(reference: Callable) -> Callable:
    """`reference` on float32 copies of its operands; gradients still arrive at the originals."""

    def upcast(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return reference(*map(upcast, args), **{name: upcast(value) for name, value in kwargs.items()})

    return wrapper


def unpack_tests(folder: Path) -> Path:
    """tests/ of TRL's source archive, and nothing else, so that `import trl` finds the installed one."""
    with urllib.request.urlopen(ARCHIVE.format(version("trl")), timeout=60) as response:
        archive = io.BytesIO(response.read())
    with tarfile.open(fileobj=archive) as tar:
        members = [member for member in tar.getmembers() if Path(member.name).parts[1:2] == ("tests",)]
        tar.extractall(folder, members, filter="data")
    return next(folder.iterdir())


def run_tests(source: Path) -> int:
    """Status of pytest."""
    from copg_kernels.integrations.trl import install  # takes seconds, which a missing archive need not cost

    arguments = [str(source / "tests" / "test_kernels.py"), "-k", SELECTED, "-p", "no:cacheprovider", "-rs"]
    with install():
        return pytest.main(arguments, plugins=[Differences()])


def main() -> int:
    parser = argparse.ArgumentParser(description="Run TRL's tests of ChunkedLogProbFunction with that of copg-kernels.")
    parser.add_argument("--source", type=Path, help="a checkout of TRL; default: the archive of the installed version")
    source = parser.parse_args().source
    if source is not None:
        return run_tests(source)
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = unpack_tests(Path(folder))
        except urllib.error.URLError as error:
            print(f"no source archive of TRL {version('trl')}: {error}", file=sys.stderr)
            return UNAVAILABLE
        return run_tests(source)


if __name__ == "__main__":
    sys.exit(main())
