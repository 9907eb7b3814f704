"""The CoPG paper's summarisation experiment at the size of the machine: offline alignment to a learnt reward.

    1. Docstrings of the installed packages, body -> summary line, in four disjoint splits of prompts.
    2. Supervised fine-tuning of a small GPT-2 on the first: the reference policy, and where every run starts.
    3. A Bradley-Terry reward model on preference pairs from the second; its accuracy on pairs from held-out prompts is
       reported, and from then on it is the truth.
    4. Offline pairs from the second split, scored and ranked by the reward model.
    5. CoPG, IPO, DPO, RLOO and RAFT on these pairs over a sweep of beta, with one optimiser and number of steps.
    6. Samples on held-out prompts: reward, KL to the reference, length, words shared with the true line.
    7. CoPG with averaged log-likelihoods beside summed ones, beta scaled by the mean length of the data.

    python train/summarize.py                 # nine minutes on two idle CPU cores
    python train/summarize.py --size small    # one GPU; not run on one yet

--out receives results.json and three figures. Standard errors are over seeds. A seed has prompts, samples and pairings
of its own in the offline data, an order of batches and draws in evaluation; all share one reference policy and one
reward model, so the errors do not say how results vary with those. Rewards are the model's, neither shifted nor scaled.

RLOO off-policy with the regularised reward has the gradient of CoPG (Proposition 2 of the paper), so their curves must
coincide up to rounding: a check. "RLOO, no beta" is what it becomes if the KL penalty is that of the sampling policy.
RAFT has no beta either.

Reference: Flet-Berliac et al., Contrastive Policy Gradient, EMNLP 2024, https://arxiv.org/abs/2406.19185; for 7.
Grinsztajn et al., Averaging log-likelihoods in direct alignment, https://arxiv.org/abs/2406.19188.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

# As a script only this file's folder is on the path; the packages lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import provenance
from train.batch import Group
from train.documents import Document, Splits, read_documents
from train.laboratory import Laboratory, evaluate
from train.log import versions
from train.offline import offline_pairs
from train.policy import draw, fine_tune, new_policy
from train.preferences import preference_pairs
from train.reward_model import accuracy, fit_reward_model, new_reward_model
from train.summarize_report import draw_figures, summarize, table
from train.summarize_settings import SIZES, Settings
from train.sweep import METHODS, Job, run_jobs

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="settings to run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per method and beta (%(default)s)")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS, help="sweep of beta (%(default)s)")
    parser.add_argument("--processes", type=int, help="policies trained at a time (default: by size)")
    parser.add_argument("--out", default="runs/summarize", help="folder of the results (%(default)s)")
    return parser


def validate(options: argparse.Namespace) -> None:
    if options.seeds < 1:
        raise ValueError(f"--seeds must be positive, got {options.seeds}")
    for beta in options.betas:
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"--betas must be positive and finite, got {beta}")
    if len(set(options.betas)) < len(options.betas):
        raise ValueError(f"--betas must differ from each other, got {options.betas}")
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes must be positive, got {options.processes}")
    if not options.out:
        raise ValueError("--out must name a folder")
    if SIZES[options.size].device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--size {options.size} needs a CUDA device, and there is none")


def prepare(
    settings: Settings, tokenizer: Tokenizer, splits: Splits, seeds: Sequence[int]
) -> tuple[Laboratory, dict[str, Any]]:
    """Stages 2 to 4: everything the policies share, and what there is to say about it."""
    reference = new_policy(settings, tokenizer)
    sft_losses = fine_tune(reference, splits.sft, settings)

    def judged(documents: Sequence[Document], seed: int) -> dict[str, list[Group]]:
        samples = draw(reference, documents, settings.judged_samples, settings, seed)
        return preference_pairs(documents, samples, tokenizer, seed)

    training, heldout = judged(splits.preferences, 1), judged(splits.validation + splits.test, 2)
    reward_model = new_reward_model(reference)
    reward_losses = fit_reward_model(reward_model, training, settings)

    offline = {seed: offline_pairs(splits.preferences, reference, reward_model, settings, seed) for seed in seeds}
    record = {
        "prompts": {name: len(documents) for name, documents in splits._asdict().items()},
        "vocab_size": tokenizer.get_vocab_size(),
        "parameters": reference.num_parameters(),
        "sft_losses": sft_losses,
        "reward_model": {
            "losses": reward_losses,
            "training_pairs": {kind: len(pairs) for kind, pairs in training.items()},
            "heldout_pairs": {kind: len(pairs) for kind, pairs in heldout.items()},
            "heldout_accuracy": {kind: accuracy(reward_model, pairs, settings) for kind, pairs in heldout.items()},
        },
        "offline": describe_offline([pair for pairs in offline.values() for pair in pairs]),
    }
    return Laboratory(settings, tokenizer, reference, reward_model, splits.validation, splits.test, offline), record


def describe_offline(pairs: Sequence[Group]) -> dict[str, float]:
    rewards = [reward for pair in pairs for reward in pair.rewards]
    lengths = [len(ids) for pair in pairs for ids in pair.completion_ids]
    return {
        "pairs": len(pairs),
        "mean_reward": statistics.fmean(rewards),
        "sd_reward": statistics.stdev(rewards),
        "mean_gap": statistics.fmean(max(pair.rewards) - min(pair.rewards) for pair in pairs),
        "mean_length": statistics.fmean(lengths),
        "reward_length_correlation": statistics.correlation(rewards, lengths),
    }


def evaluate_reference(lab: Laboratory, seed: int) -> dict[str, Any]:
    """The record of a policy that took no step."""
    points = [{"step": 0} | evaluate(lab.reference, lab, lab.validation, seed)]
    return {"seed": seed, "points": points, "test": evaluate(lab.reference, lab, lab.test, seed)}


def plan(betas: Sequence[float], seeds: Sequence[int], mean_length: float) -> list[Job]:
    """Every method at every beta and seed. Averaging divides log-ratios by the length, so beta is multiplied by it."""
    jobs = []
    for name, method in METHODS.items():
        scale = mean_length if method.average_logps else 1.0
        scaled = [scale * beta for beta in betas] if method.has_beta else [None]
        jobs += [Job(name, beta, seed) for beta in scaled for seed in seeds]
    return jobs


def run(options: argparse.Namespace, tokenizer: Tokenizer, splits: Splits, started: float) -> dict[str, Any]:
    settings, seeds = SIZES[options.size], list(range(options.seeds))
    origin = {name: value for name, value in provenance(settings.torch_device).items() if name != "peers"}
    lab, prepared = prepare(settings, tokenizer, splits, seeds)
    prepared_seconds = time.perf_counter() - started
    jobs = plan(sorted(options.betas), seeds, prepared["offline"]["mean_length"])
    reference = [evaluate_reference(lab, seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        lab.save(Path(folder))
        runs = list(run_jobs(Path(folder), jobs, options.processes or settings.processes))
    return {
        "provenance": origin | {"versions": versions()},
        "size": options.size,
        "seeds": options.seeds,
        "settings": asdict(settings),
        "seconds": {
            "preparation": round(prepared_seconds),
            "total": round(time.perf_counter() - started),
            "processor": round(sum(os.times()[:4])),  # of all processes, children included
        },
        "prepared": prepared,
        "summary": summarize(runs, reference),
        "reference": reference,
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    started, parser = time.perf_counter(), build_parser()
    options = parser.parse_args(argv)
    out = Path(options.out)
    try:
        validate(options)
        tokenizer, splits = read_documents(SIZES[options.size])
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    results = run(options, tokenizer, splits, started)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw_figures(results, out)
    print(table(results["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
