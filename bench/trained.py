"""The softmax of a policy that train/run.py has trained, as an input of the benchmark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.inputs import BenchInputs
from train import checkpoint
from train.config import Config
from train.model import head_inputs
from train.start import load_data, resume_run
from train.state import Run, batches_in_order, pack_for


@torch.no_grad()
def trained_inputs(run_dir: Path) -> tuple[BenchInputs, Tensor | None]:
    """Held-out completions under the newest checkpoint in float32, and cu_groups where the groups are ragged.

    Without an upstream gradient; ValueError where the directory is not that of a run.
    """
    run = load_run(run_dir)
    if run.reward is not None:
        raise ValueError(f"{run_dir} was trained online: its held-out prompts have no completions")
    batch = pack_for(run, run.heldout_groups)
    parts = [head_inputs(run.model, part, torch.float32)[0] for part in batches_in_order(run, run.heldout_groups)]
    inputs = BenchInputs(
        hidden_states=torch.cat(parts).requires_grad_(),
        lm_head_weight=run.model.get_output_embeddings().weight.detach().float().clone().requires_grad_(),
        labels=batch.labels,
        ref_logps=batch.ref_logps,
        rewards=batch.rewards,
        cu_seqlens=batch.cu_seqlens,
        dlogps=torch.zeros_like(batch.labels, dtype=torch.float32),
        counted=None,
        group_size=batch.group_sizes[0],
        beta=run.config.beta,
    )
    return inputs, batch.cu_groups


def load_run(run_dir: Path) -> Run:
    folders = checkpoint.checkpoints(run_dir)
    if not folders:
        raise ValueError(f"{run_dir} holds no checkpoint of train/run.py")
    state = checkpoint.load_state(folders[-1])
    config = replace(Config(**state["config"]), out=str(run_dir), resume=True)
    examples, digest = load_data(config)
    if digest != state["data_digest"]:
        raise ValueError(f"the data have changed since {folders[-1]} was written")
    return resume_run(config, examples, state, torch.device("cpu"))
