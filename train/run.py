"""Offline contrastive policy gradient (CoPG) on completions with rewards, with a fused language-model head.

What is the paper's algorithm (arXiv 2406.19185), and what is not:
  1. The objective is: groups of k completions per prompt from any source, summed log-probs with EOS, a fixed
     reference policy, no importance weights, no clipping, no value network. k > 2 is the Command A form.
  2. The loss is the unit form Var(R - beta * log-ratio) / (2 beta), whose gradient is minus RLOO's; for pairs
     it is half of the paper's. A learning rate carries over between beta and k, but is not the paper's.
  3. The task is not: without `--data`, prompts are docstring bodies of installed packages, completions are
     summary lines and the reward is the word F1 with the true line. No reward model is trained.
  4. The policy is a two-layer GPT-2 from random weights; a short supervised warm-up on each prompt and its
     best completion makes the reference policy. Its log-probs are computed once, before training.
  5. Evaluation is the reward margin on held-out prompts (log-ratio of the best completion minus that of the
     worst), not sampling: it shows that the policy ranks as the rewards do, not how it writes.
  6. A prompt is run through the transformer once per completion; the shared prefix is not exploited.

    python train/run.py                       # docstrings; under three minutes on two CPU cores
    python train/run.py --check --steps 20    # fused against the float64 reference, every step
    python train/run.py --sparse-eps 2.4e-4   # gradients from a compact softmax
    python train/run.py --data mine.jsonl --out runs/mine
    python train/run.py --data mine.jsonl --out runs/mine --resume

`mine.jsonl` holds a line {"prompt": "...", "completions": ["...", "..."], "rewards": [1.0, 0.2]} per prompt.
`--check` gives |loss_fused - loss_ref| and the largest ||g_fused - g_ref|| / ||g_ref|| over the parameter
tensors; above 1e-5 in float32 the command fails. `--sparse-eps` logs what it kept of each step's softmax
(density, dropped, overflow); train/sparse_learning.py compares what is learned with and without it.

A run directory holds log.jsonl (configuration and versions, then a line per step), checkpoints/ and, for
docstrings, data.jsonl. SIGINT and SIGTERM finish the step, write a checkpoint and leave; `--resume` takes the
same flags and continues bit for bit on a CPU.
"""

from __future__ import annotations

import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

# As a script only this file's folder is on the path; both packages lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.checkpoint import checkpoints
from train.config import Config, build_parser, parse_config
from train.log import open_log, read_steps, versions, write_line
from train.model import head_inputs
from train.objective import head_difference, objective, reward_margin
from train.start import (
    DTYPES,
    Run,
    apply_gradients,
    batches_in_order,
    load_data,
    load_state,
    pack_for,
    policy_logps,
    resume_run,
    save_run,
    start_run,
    step_indices,
)

# The fused head's gradients against the float64 reference, for fp32 operands: what `--check` accepts.
CHECK_TOLERANCE = 1e-5
CHECK_LINE = "step {step}: loss off by {loss_difference:.1e}, gradient by {gradient_difference:.1e} ({worst})"


def heldout_margins(run: Run) -> list[float]:
    """The reward margin on each held-out prompt; zero as long as the policy is the reference."""
    margins: list[float] = []
    for batch in batches_in_order(run, run.heldout_groups):
        margins += reward_margin(policy_logps(run, batch) - batch.ref_logps, batch)
    return margins


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def train_step(run: Run) -> dict[str, float | str]:
    """One CoPG step on the next whole groups; returns its log record."""
    config, started = run.config, time.perf_counter()
    indices = step_indices(run.step, len(run.train_groups), config.prompts_per_step, config.seed)
    batch = pack_for(run, [run.train_groups[i] for i in indices])
    hidden_states, lm_head_weight = head_inputs(run.model, batch, DTYPES[config.dtype])
    record: dict[str, float | str] = {"step": run.step + 1}
    if config.check:
        difference = head_difference(run.model, hidden_states, lm_head_weight, batch, config.beta)
        record |= {
            "loss_difference": difference.loss,
            "gradient_difference": difference.gradient,
            "worst": difference.parameter,
        }
    loss, log_ratios, sparsity = objective(
        config.impl, hidden_states, lm_head_weight, batch, config.beta, config.sparse_eps
    )
    loss.backward()
    grad_norm = apply_gradients(run, config.lr, run.step)
    run.step += 1
    record |= sparsity
    return record | {
        "loss": loss.item(),
        "margin": mean(reward_margin(log_ratios, batch)),
        # Over the data's completions: the KL divergence only where these were sampled from the policy.
        "mean_log_ratio": log_ratios.mean().item(),
        "grad_norm": grad_norm,
        "tokens_per_s": int(batch.attention_mask.sum()) / (time.perf_counter() - started),
        "peak_mib": peak_mib(run.model.device),
    }


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # The peak of the whole process; Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def train(run: Run, log: TextIO) -> None:
    """Steps until config.steps or a signal, with a checkpoint every so often and at the end."""
    config = run.config
    bar = tqdm(initial=run.step, total=config.steps, desc="CoPG")
    with stop_on_signal() as stop, bar:
        while run.step < config.steps and not stop.is_set():
            record = train_step(run)
            write_line(log, record)
            if config.check:
                bar.write(CHECK_LINE.format(**record))
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", margin=f"{record['margin']:.3f}")
            if run.step % config.checkpoint_every == 0:
                save_run(run)
        save_run(run)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that they never cut a step or a checkpoint in two."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but there is no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_verdict(config: Config) -> bool:
    """Prints the largest differences of the logged steps; whether the gradients agree as they must."""
    checked = [record for record in read_steps(Path(config.out) / "log.jsonl") if "worst" in record]
    if not checked:  # a resumed run that had no steps left
        return True
    # A tensor's maximum is NaN when one of them is.
    loss = torch.tensor([record["loss_difference"] for record in checked]).max().item()
    gradient = torch.tensor([record["gradient_difference"] for record in checked]).max().item()
    print(f"largest differences over {len(checked)} steps: loss {loss:.2e}, relative gradient {gradient:.2e}")
    return config.dtype != "float32" or gradient <= CHECK_TOLERANCE


def main(argv: Sequence[str] | None = None) -> int:
    started, parser = time.perf_counter(), build_parser(__doc__)
    try:
        config = parse_config(parser, argv)
        device = pick_device(config.device)
        if not config.resume and checkpoints(Path(config.out)):
            raise ValueError(f"--out: {config.out} holds a run; continue it with --resume or choose another")
        examples, data_digest = load_data(config)
        state = load_state(config, data_digest) if config.resume else None
        resume_step = None if state is None else state["step"]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with open_log(Path(config.out) / "log.jsonl", resume_step) as log:
        write_line(log, {"config": asdict(config), "versions": versions(), "device": str(device)})
        if state is None:
            run = start_run(config, examples, data_digest, device)
        else:
            run = resume_run(config, examples, state, device)
        before = heldout_margins(run)
        train(run, log)
        after = heldout_margins(run)
        write_line(log, {"heldout_margin_before": mean(before), "heldout_margin": mean(after)})
    ranked = mean([margin > 0 for margin in after])
    print(
        f"step {run.step} of {config.steps}, {time.perf_counter() - started:.0f} s, {config.out}\n"
        f"reward margin on {len(after)} held-out prompts: {mean(before):.3f} -> {mean(after):.3f} nats "
        f"(standard error {standard_error(after):.3f}), positive on {ranked:.0%}"
    )
    return 0 if not config.check or check_verdict(config) else 1


if __name__ == "__main__":
    sys.exit(main())
