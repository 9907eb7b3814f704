"""Package metadata and the requirements that depend on the platform. Tool settings are in pyproject.toml.

Each lower bound is the oldest release the tests ran with (constraints/lowest.txt); constraints/tested.txt has
the newest.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="copg-kernels",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "copg_kernels/__init__.py").read_text()).group(1),
    description="Contrastive policy gradient fused with the language-model head, with no logits in memory",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["copg_kernels", "copg_kernels.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        # Triton has wheels for Linux only; elsewhere the torch backend runs the same schedules.
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.3",
    ],
    extras_require={
        "train": [
            "transformers>=5.17",
            "tokenizers>=0.23.1",
            "safetensors>=0.8",
            "datasets>=5.2",
            "peft>=0.21.2",
            "tensorboard>=2.21",
            "tqdm>=4.67",
        ],
        # No bound: it builds against the CUDA and torch it finds, and we have no tested release to name.
        "flash": ["flash-attn"],
        "bench": ["pytest>=8.4", "pytest-benchmark>=5.1", "matplotlib>=3.10", "tqdm>=4.67"],
        # TRL for its own losses, which ours are compared with.
        "test": ["pytest>=8.4", "pytest-xdist>=3.8", "trl>=1.16"],
        # Apart from `test`, so that a machine without a network can run the tests with the packages it has.
        "lint": ["ruff>=0.17.5", "mypy>=2.4.1"],
        # ruff breaks the lines of signatures.
        "docs": ["mkdocs>=1.6.1", "mkdocs-material>=9.8.1", "mkdocstrings[python]>=1.0.8", "ruff>=0.17.5"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
