"""Where a result comes from: the machine, the versions, the command and the exact sources."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from copg_kernels import tuned

ROOT = Path(__file__).resolve().parents[1]


def provenance(device: torch.device) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", _script(), *sys.argv[1:]]),
        "commit": _commit(),
        "source_sha256": source_sha256(),
        "device": device_name(device),
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("torch", "triton")}
        | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
        "peers": _peer_versions(),
        "num_threads": torch.get_num_threads(),
        "tuned": tuned_file(device),
    }


def source_sha256(package: Path = ROOT / "copg_kernels") -> str:
    """One hash of the package's files, names included, in the order of their paths."""
    digest = hashlib.sha256()
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for name, path in sorted((path.relative_to(package).as_posix(), path) for path in files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} CPUs"


def tuned_file(device: torch.device) -> str:
    """Whose settings our kernels run with; not where it lies, which is the user's own affair."""
    name = tuned.device_name(device)
    path = None if name is None else tuned.in_force(name).path
    return "the code's defaults" if path is None else path.name


def _peer_versions() -> dict[str, str]:
    """Of what bench/requirements-peers.txt names, and flash-attn."""
    lines = (ROOT / "bench" / "requirements-peers.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    return {name: _version(name) for name in (*names, "flash-attn")}


def _script() -> str:
    path = Path(sys.argv[0]).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
