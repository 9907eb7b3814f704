"""One policy per loss, beta and seed, trained on offline pairs and evaluated as it goes; many at the same time."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel, PreTrainedModel

from copg_kernels import linear_copg_loss, linear_sequence_loss
from copg_kernels.losses import dpo_loss, ipo_loss, raft_loss, rloo_loss, separable
from train.batch import Batch, pack, step_indices
from train.laboratory import evaluate, load_laboratory
from train.model import PAD_ID, head_inputs
from train.optimize import descend
from train.summarize_settings import Settings


@separable
def unregularized_rloo_loss(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, group_size: int
) -> Tensor:
    """RLOO as trainers run it on stored samples: the KL penalty belongs to the sampling policy, here pi_ref, and is 0.

        loss = mean over groups of -(1/k) sum_i (R_i - mean_{j != i} R_j) * logps_i

    ref_logps and beta take no part.
    """
    return rloo_loss(logps, logps.detach(), rewards, beta=beta, group_size=group_size)


class Method(NamedTuple):
    fused_loss: Callable[..., Any]
    has_beta: bool = True
    average_logps: bool = False


METHODS = {
    "CoPG": Method(linear_copg_loss),
    "IPO": Method(functools.partial(linear_sequence_loss, loss=ipo_loss)),
    "DPO": Method(functools.partial(linear_sequence_loss, loss=dpo_loss)),
    "RLOO": Method(functools.partial(linear_sequence_loss, loss=rloo_loss)),
    "RLOO, no beta": Method(functools.partial(linear_sequence_loss, loss=unregularized_rloo_loss), has_beta=False),
    "RAFT": Method(functools.partial(linear_sequence_loss, loss=raft_loss), has_beta=False),
    "CoPG, averaged": Method(linear_copg_loss, average_logps=True),
}


@dataclass(frozen=True)
class Job:
    method: str
    beta: float | None
    seed: int


def run_jobs(folder: Path, jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """The records of all jobs, in the order in which they end."""
    if processes == 1:
        yield from (train_policy(folder, job) for job in tqdm(jobs, "policies"))
        return
    # Forked processes inherit locked thread pools, and CUDA refuses to start in them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(train_policy, folder, job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), "policies", len(futures)):
                yield future.result()
        finally:  # after an error the jobs that have not begun would still be waited for
            pool.shutdown(cancel_futures=True)


def train_policy(folder: Path, job: Job) -> dict[str, Any]:
    """From the reference policy, on the seed's pairs: a point per evaluation, and the last policy on test prompts."""
    lab = load_laboratory(folder)
    settings, groups = lab.settings, lab.offline[job.seed]
    policy = GPT2LMHeadModel.from_pretrained(folder / "reference").to(settings.torch_device)

    def loss_at(step: int) -> Tensor:
        chosen = [groups[i] for i in step_indices(step, len(groups), settings.pairs_per_step, seed=job.seed)]
        return policy_loss(policy, pack(chosen, PAD_ID, settings.torch_device), job, settings)

    points = []
    for step, loss in descend(policy, loss_at, steps=settings.steps, lr=settings.lr, to_zero=False):
        if step % settings.evaluate_every == 0:
            points.append({"step": step, "loss": loss} | evaluate(policy, lab, lab.validation, seed=job.seed))
            policy.train()
    return asdict(job) | {"points": points, "test": evaluate(policy, lab, lab.test, seed=job.seed)}


def policy_loss(policy: PreTrainedModel, batch: Batch, job: Job, settings: Settings) -> Tensor:
    """The method's loss through the fused operator, from hidden states and the head's weight."""
    method = METHODS[job.method]
    ref_logps = batch.ref_logps / batch.cu_seqlens.diff() if method.average_logps else batch.ref_logps
    return method.fused_loss(
        *head_inputs(policy, batch, settings.torch_dtype),
        batch.labels,
        ref_logps,
        batch.rewards,
        beta=1.0 if job.beta is None else job.beta,  # a loss without beta ignores it
        group_size=batch.group_sizes[0],
        cu_seqlens=batch.cu_seqlens,
        average_logps=method.average_logps,
    ).loss
