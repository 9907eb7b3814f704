"""Every contestant by the name it has in the tables, in their order: what a user has, peers, ours."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import peers
from bench.providers import (
    Provider,
    load_compiled_eager,
    load_eager,
    load_ours,
    load_ours_sparse,
    load_torch_linear_cross_entropy,
)

EAGER = "eager"
OURS = "copg-kernels"
OURS_SPARSE = "copg-kernels sparse"
LOADERS: dict[str, Callable[[torch.device], Provider]] = {
    EAGER: load_eager,
    "compiled eager": load_compiled_eager,
    "torch linear_cross_entropy": load_torch_linear_cross_entropy,
    "trl": peers.load_trl,
    "liger scaled CE (CuTe)": peers.load_liger_cute,
    "liger scaled CE (torch)": peers.load_liger_torch,
    "liger FLCE": peers.load_liger_flce,
    "verl": peers.load_verl,
    "cut-cross-entropy": peers.load_cce,
    "cut-cross-entropy exact": peers.load_cce_exact,
    "unsloth_zoo": peers.load_unsloth,
    "flash-attn on logits": peers.load_flash_attn,
    "quack (ceiling)": peers.load_quack,
    OURS: load_ours,
    OURS_SPARSE: load_ours_sparse,
}
