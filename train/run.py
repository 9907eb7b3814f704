"""Contrastive policy gradient (CoPG) and its kin on completions with rewards, with a fused language-model head.

What is the paper's algorithm (arXiv 2406.19185), and what is not:
  1. The objective is: groups of k completions per prompt from any source, summed log-probs with EOS, a fixed
     reference policy, no importance weights, no clipping, no value network. k > 2 is the Command A form.
  2. The loss is the unit form Var(R - beta * log-ratio) / (2 beta), whose gradient is minus RLOO's; for pairs
     it is half of the paper's. A learning rate carries over between beta and k, but is not the paper's.
  3. The task is not: without `--data`, prompts are docstring bodies of installed packages, completions are
     summary lines and the reward is the word F1 with the true line. No reward model is trained.
  4. Nor is the policy without `--model`: a two-layer GPT-2 from random weights; a short supervised warm-up on each
     prompt and its best completion makes the reference policy. Its log-probs are computed once, before training.
  5. Without `--reward` evaluation is the reward margin on held-out prompts (log-ratio of the best completion minus
     that of the worst), not sampling: it shows that the policy ranks as the rewards do, not how it writes.
  6. A prompt is run through the transformer once per completion; the shared prefix is not exploited.

    python train/run.py                       # docstrings; under three minutes on two CPU cores
    python train/run.py --check --steps 20    # fused against the float64 reference, every step
    python train/run.py --sparse-eps 2.4e-4   # gradients from a compact softmax
    python train/run.py --model DIR --lora-rank 16 --data mine.jsonl --out runs/mine
    python train/run.py --model DIR --data prompts.jsonl --reward mine:reward --loss rloo --out runs/online
    python train/run.py ... --out runs/mine --resume
    torchrun --nproc-per-node 8 train/run.py ... --parallel fsdp

`mine.jsonl` holds a line {"prompt": "...", "completions": ["...", "..."], "rewards": [1.0, 0.2]} per prompt; parquet
with these columns will do. With `--reward module:function` training is online: each step samples `--group-size`
completions per prompt from the policy, and reward(prompt, completions, **row) scores them. docs/training.md tells more.

`--loss` takes another loss of copg_kernels.losses. What they need besides: REINFORCE's baseline is the mean reward of
all steps before, of its own batch in the first; PPO's ratio is to the policy that sampled; REBEL's anchor is that
policy, in place of the reference. Offline nobody knows who sampled, and the reference policy stands in for both.

`--check` gives |loss_fused - loss_ref| and the largest ||g_fused - g_ref|| / ||g_ref|| over the parameter
tensors; above 1e-5 in float32 the command fails. `--sparse-eps` logs what it kept of each step's softmax
(density, dropped, overflow); train/sparse_learning.py compares what is learned with and without it.

A run directory holds log.jsonl (configuration and versions, then a line per step), checkpoints/ and, for
docstrings, data.jsonl; online also reference/, the policy before its first step. A checkpoint is a model for
from_pretrained. SIGINT and SIGTERM finish the step, write a checkpoint and leave; `--resume` takes the same flags and
continues bit for bit on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

# As a script only this file's folder is on the path; both packages lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train import ranks
from train.checkpoint import atomic_folder, checkpoints, save_model
from train.config import Config, build_parser, parse_config
from train.log import open_log, open_tensorboard, read_records, versions, write_line, write_scalars
from train.objective import reward_margin
from train.online import evaluate_samples
from train.pretrained import merge_adapters, without_wrapper
from train.process import pick_device, stop_on_signal
from train.ref_logps import CacheError
from train.scoring import RewardError
from train.start import begin, build_run, load_data, load_state, restore, save_run
from train.state import Run, device_of, flat_ref_logps, policy_logps
from train.step import mean, train_step

# The fused head's gradients against the float64 reference, for fp32 operands: what `--check` accepts.
CHECK_TOLERANCE = 1e-5
ON_THE_BAR = {
    False: ("loss", "margin", "mean_log_ratio", "tokens_per_s", "peak_mib"),
    True: ("loss", "reward", "kl", "entropy", "tokens_per_s", "peak_mib"),  # online
}
Report = Callable[[dict], None]
CHECK_LINE = "step {step}: loss off by {loss_difference:.1e}, gradient by {gradient_difference:.1e} ({worst})"


def heldout_margins(run: Run) -> list[float]:
    """The reward margin on each held-out prompt; zero as long as the policy is the reference."""
    log_ratios = policy_logps(run, run.heldout_groups).cpu() - flat_ref_logps(run.heldout_groups)
    return reward_margin(log_ratios, run.heldout_groups)


def describe(run: Run) -> dict[str, object]:
    """What the log's first line says besides the configuration; printed, too."""
    config, limits = run.config, (run.config.max_prompt_tokens, run.config.max_completion_tokens)
    attention = f"{'packed' if run.is_packed else 'padded'}, {without_wrapper(run.model).config._attn_implementation}"
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    print(
        f"{len(run.train_groups)} + {len(run.heldout_groups)} prompts to train on and held out; cut: "
        f"{run.cut['prompts']} prompts to {limits[0]} tokens, {run.cut['completions']} completions to {limits[1]}\n"
        f"{trained:,} trained parameters; attention: {attention}; loss: {config.loss}, {config.impl}"
    )
    return {"cut": run.cut, "attention": attention, "trained_parameters": trained}


def reporter(log: TextIO | None, writer: Any) -> Report:
    """Where records go: the log, and TensorBoard where that is on; nowhere on other ranks than the first."""

    def report(record: dict) -> None:
        if log is not None:
            write_line(log, record)
        if writer is not None:
            write_scalars(writer, record)
            writer.flush()

    return report


def evaluate(run: Run) -> dict[str, float]:
    """On held-out prompts: samples and their rewards where there is a reward function, else margins of the data."""
    if run.reward is not None:
        return {f"heldout_{name}": value for name, value in evaluate_samples(run).items()}
    margins = heldout_margins(run)
    spread = {"heldout_margin_se": statistics.stdev(margins) / len(margins) ** 0.5} if len(margins) > 1 else {}
    return {"heldout_margin": mean(margins), **spread, "heldout_ranked": mean([margin > 0 for margin in margins])}


def train(run: Run, report: Report) -> None:
    """Steps until config.steps or a signal, with a checkpoint every so often and at the end."""
    config = run.config
    bar = tqdm(initial=run.step, total=config.steps, desc=config.loss, disable=not ranks.is_first())
    with stop_on_signal() as stop, bar:
        # A signal may reach ranks at different steps; they stop at the same.
        while run.step < config.steps and not any(ranks.from_all(stop.is_set())):
            record = train_step(run)
            report(record)
            if config.check:
                bar.write(CHECK_LINE.format(**record))
            bar.update()
            bar.set_postfix({name: f"{record[name]:.4g}" for name in ON_THE_BAR[run.reward is not None]})
            if config.eval_every and run.step % config.eval_every == 0 and run.step < config.steps:
                report({"evaluated_at": run.step} | evaluate(run))
            if run.step % config.checkpoint_every == 0:
                save_run(run)
        save_run(run)


def check_verdict(config: Config) -> bool:
    """Prints the largest differences of the logged steps; whether the gradients agree as they must."""
    checked = read_records(Path(config.out) / "log.jsonl", "worst")
    if not checked:  # a resumed run that had no steps left
        return True
    # A tensor's maximum is NaN when one of them is.
    loss = torch.tensor([record["loss_difference"] for record in checked]).max().item()
    gradient = torch.tensor([record["gradient_difference"] for record in checked]).max().item()
    print(f"largest differences over {len(checked)} steps: loss {loss:.2e}, relative gradient {gradient:.2e}")
    return config.dtype != "float32" or gradient <= CHECK_TOLERANCE


def carry_out(run: Run, state: dict | None, report: Report) -> None:
    """The run from its beginning or its checkpoint to --steps, unless a signal ends it; evaluated before and after."""
    config, out, started = run.config, Path(run.config.out), time.perf_counter()
    if state is None:
        begin(run)
        report({"evaluated_at": 0} | evaluate(run))
    else:
        restore(run, state)
    train(run, report)
    if run.step < config.steps:
        print(f"stopped at step {run.step} of {config.steps}; --resume --out {out} continues")
        return
    report({"evaluated_at": run.step} | evaluate(run))
    if config.save_merged:
        ranks.from_first(lambda: save_merged(run))
    if ranks.is_first():
        print(f"step {run.step} of {config.steps}, {time.perf_counter() - started:.0f} s, {checkpoints(out)[-1]}")
        evaluations = read_records(out / "log.jsonl", "evaluated_at")
        for name, value in evaluations[-1].items():
            if name != "evaluated_at":
                print(f"{name.replace('_', ' ')}: {evaluations[0][name]:.3f} -> {value:.3f}")


def save_merged(run: Run) -> None:
    with atomic_folder(Path(run.config.out) / "merged") as folder:
        save_model(folder, merge_adapters(run.model), run.tokenizer)


def open_run(config: Config, device: torch.device) -> tuple[Run, dict | None]:
    """The run and the state it continues from; ValueError, OSError or RankError where there is none to be had."""
    out = Path(config.out)
    if not config.resume and checkpoints(out):
        raise ValueError(f"--out: {out} holds a run; continue it with --resume or choose another")
    examples, data_digest = load_data(config)
    state = load_state(config, data_digest) if config.resume else None
    return build_run(config, examples, data_digest, device, state), state


def log_and_carry_out(run: Run, state: dict | None, writer: Any) -> None:
    """The first rank keeps the log."""
    config, out = run.config, Path(run.config.out)
    header = {"config": asdict(config), "versions": versions(), "device": str(device_of(run.model)), **describe(run)}
    if not ranks.is_first():
        carry_out(run, state, reporter(None, None))
        return
    out.mkdir(parents=True, exist_ok=True)
    with open_log(out / "log.jsonl", None if state is None else state["step"]) as log:
        write_line(log, header)
        carry_out(run, state, reporter(log, writer))


def run_on_rank(parser: argparse.ArgumentParser, config: Config, device: torch.device) -> int:
    try:
        config = replace(config, out=ranks.from_all(config.out)[0])  # by default it has the time in it
        if ranks.are_restarted() and ranks.from_first(lambda: bool(checkpoints(Path(config.out)))):
            config = replace(config, resume=True)
        run, state = open_run(config, device)
        writer = None
        if config.tensorboard and ranks.is_first():
            writer = open_tensorboard(Path(config.out) / "tensorboard", None if state is None else state["step"])
    except (ValueError, OSError, ranks.RankError) as error:
        parser.error(str(error))
    try:
        log_and_carry_out(run, state, writer)
    # From outside this program; the last checkpoint stands.
    except (RewardError, CacheError, OSError, ranks.RankError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0 if not config.check or check_verdict(config) else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser(__doc__)
    disable_progress_bar()  # that of transformers, for every file it reads or writes
    try:
        config = parse_config(parser, argv)
        device = pick_device(config.device)
    except ValueError as error:
        parser.error(str(error))
    with ranks.joined(device, config.rank_timeout), ranks.quiet_but_first():
        return run_on_rank(parser, config, device)


if __name__ == "__main__":
    sys.exit(main())
