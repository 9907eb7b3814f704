"""Make the virtual environment the Makefile runs in, and install the project into it (editable).

torch comes first, because what follows depends on its build:
- This Python already has a torch for CUDA or ROCm: the new environment shares its packages, and only what
  they lack is fetched. Where they lack nothing no network is needed. A second copy would be gigabytes, and
  need not match the driver.
- Otherwise the constrained torch is installed. A CUDA build brings its own Triton; any other gets the
  constrained one.
"""

from __future__ import annotations

import argparse
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_FACTS = """
import importlib.metadata, torch
print(importlib.metadata.version("torch"), bool(torch.version.cuda or torch.version.hip))
"""

# pip's own reader of requirements, as nothing else is sure to be there yet.
LACKING = """
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pip._vendor.packaging.requirements import Requirement
extras = ["", *sys.argv[1].split(",")]
for needed in map(Requirement, requires("copg-kernels")):
    if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras):
        continue
    try:
        met = needed.specifier.contains(version(needed.name), prereleases=True)
    except PackageNotFoundError:
        met = False
    if not met:
        print(f"{needed.name}{needed.specifier}")
"""


def torch_facts(python: str) -> tuple[str, bool]:
    """(version of the torch this Python imports, "" for none; whether it is a GPU build)."""
    found = subprocess.run([python, "-c", TORCH_FACTS], capture_output=True, text=True)
    if found.returncode != 0:
        return "", False
    version, is_gpu_build = found.stdout.split()[-2:]
    return version, is_gpu_build == "True"


def create_venv(venv: Path, share_base: bool) -> str:
    """Create or refresh the environment and return its Python."""
    # A shared pip will do; the base may have been built without the means to make another.
    flags = ["--without-pip"] if share_base and find_spec("pip") else []
    if subprocess.run([sys.executable, "-m", "venv", *flags, str(venv)]).returncode != 0:
        sys.exit(f"{sys.executable} could not make {venv}; its message is above")
    python = str(venv / "bin" / "python")
    ask_folder = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run([python, "-c", ask_folder], check=True, capture_output=True, text=True)
    shared = Path(site_packages.stdout.strip()) / "shared_base.pth"
    shared.unlink(missing_ok=True)
    if share_base:
        # Not --system-site-packages: it passes over a base that is itself a virtual environment.
        folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
        shared.write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))
    return python


def pip_install(python: str, *pip_args: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *pip_args]
    if subprocess.run(command).returncode != 0:
        sys.exit("pip could not install what the project needs; its message is above")


def install_what_base_lacks(python: str, extras: str, editable: list[str]) -> None:
    # Without pip's resolver: it would also mend whatever the base is content to leave out.
    pip_install(python, "--no-deps", *editable)
    asked = subprocess.run([python, "-c", LACKING, extras], check=True, capture_output=True, text=True)
    lacking = asked.stdout.split()
    unfit = [requirement for requirement in lacking if requirement.startswith(("torch>", "triton>"))]
    if unfit:
        sys.exit(f"{sys.executable} has a torch for GPUs, but not {' and '.join(unfit)}: set PYTHON= to another")
    if lacking:
        pip_install(python, *lacking)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment and install the project into it.")
    parser.add_argument("venv", type=Path, help="where the environment is, or is to be")
    parser.add_argument("--extras", required=True, help="extras of setup.py, comma-separated")
    parser.add_argument("--constraints", required=True, help="pip constraints, used unless a torch is shared")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (older ones run this file too, and deserve the message)
        sys.exit(f"copg-kernels needs Python 3.11 or newer, this is {sys.version.split()[0]}: set PYTHON=")

    base_torch, share_base = torch_facts(sys.executable)
    python = create_venv(args.venv, share_base)
    # No isolation: the build then takes the setuptools that torch requires, and fetches nothing.
    editable = ["--no-build-isolation", "--editable", f"{ROOT}[{args.extras}]"]
    if share_base:
        print(f"sharing the packages of {sys.executable}: it has torch {base_torch} for GPUs", flush=True)
        install_what_base_lacks(python, args.extras, editable)
        return
    pip_install(python, "torch", "--constraint", args.constraints)
    _, is_gpu_build = torch_facts(python)
    triton = [] if is_gpu_build else ["--constraint", str(ROOT / "constraints" / "triton-cpu.txt")]
    pip_install(python, *editable, "--constraint", args.constraints, *triton)


if __name__ == "__main__":
    main()
