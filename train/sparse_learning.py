"""Whether a policy learns the same from sparse gradients: the same CoPG runs with exact and with sparse ones.

Per seed (split, weights and batches) one supervised warm-up makes the reference policy, with exact gradients. From
there the loop of train/run.py trains one policy with exact and one with sparse gradients, on the same batches. Losses
and log-probs are exact in both, so that only what was learned differs. Measured are
  1. the reward margin on held-out prompts and the training loss, against the step;
  2. the log-probs of the held-out completions' tokens after the last step, in bins of how often a token occurs in the
     training completions. The tokenizer has seen all texts, so some tokens occur in none of them;
  3. density, dropped mass and overflow (share of tokens computed exactly) of every sparse step.
Differences are sparse minus exact within a seed; their spread is the standard deviation over the seeds.

    python train/sparse_learning.py
    python train/sparse_learning.py --seeds 3 --steps 320 --sparse-eps 9.765625e-4 --out runs/sparse-learning

--out receives results.json and sparse-learning.png; no checkpoint is kept. The other flags are those of train/run.py.
A vocabulary larger than the data's words stops there: results.json has the size that was reached.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

# As a script only this file's folder is on the path; the packages lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import provenance
from copg_kernels import linear_logps
from train.config import Config, build_parser, validate
from train.data import Example
from train.log import versions
from train.model import head_inputs
from train.optimizer import make_optimizer
from train.process import pick_device
from train.run import heldout_margins
from train.spread import Policy
from train.start import load_data, start_run
from train.state import DTYPES, Run, batches_in_order
from train.step import mean, train_step

# Where this experiment departs from the defaults of train/run.py. Docstrings end at some 15,000 tokens, where a uniform
# softmax is at 2**-13.9: sparse_eps of 2**-14 keeps a quarter of the columns or overflows, 2**-12 a seventh, and 2**-10
# a twentieth.
SETTINGS: dict[str, Any] = dict(
    vocab_size=32768,
    heldout_prompts=400,
    sft_steps=100,
    steps=320,
    sparse_eps=2.0**-10,
    device="cpu",
    out="runs/sparse-learning",
)
VARIANTS = ("exact", "sparse")
SHARES = ("density", "dropped", "overflow")
BINS = ("never seen", "rarest decile", "middle", "most frequent decile")


@dataclass(frozen=True)
class Experiment:
    config: Config
    seeds: list[int]
    evaluate_every: int


def parse_experiment(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Experiment:
    parser.set_defaults(**SETTINGS)
    parser.add_argument("--seeds", type=int, default=3, help="seeds to run, from --seed on (%(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=80, help="steps between evaluations (%(default)s)")
    values = vars(parser.parse_args(argv))
    seeds, evaluate_every = values.pop("seeds"), values.pop("evaluate_every")
    config = Config(**values)
    validate(config)
    if seeds < 1:
        raise ValueError(f"--seeds must be positive, got {seeds}")
    if evaluate_every < 1:
        raise ValueError(f"--evaluate-every must be positive, got {evaluate_every}")
    if not config.sparse_eps:
        raise ValueError("--sparse-eps must be above 0 here: exact gradients are what it is compared with")
    if config.resume:
        raise ValueError("--resume: this experiment keeps no checkpoint to continue from")
    if not config.out:
        raise ValueError("--out must name a directory")
    return Experiment(config, list(range(config.seed, config.seed + seeds)), evaluate_every)


def run_seed(
    experiment: Experiment, config: Config, examples: list[Example], data_digest: str, device: torch.device
) -> dict[str, Any]:
    """Both variants from the same reference policy, and that policy's log-probs."""
    start = start_run(replace(config, sparse_eps=0.0), examples, data_digest, device)
    counts = training_counts(start)
    bins = frequency_bins(counts)
    record = {
        "seed": config.seed,
        "vocab_size": start.tokenizer.vocab_size,
        "train_prompts": len(start.train_groups),
        "heldout_prompts": len(start.heldout_groups),
        "bins": describe_bins(start, counts, bins),
        "reference": {"token_logps": heldout_token_logps(start, bins)},
    }
    for variant, sparse_eps in zip(VARIANTS, (0.0, config.sparse_eps), strict=True):
        policy = branch(start, sparse_eps)
        points = train_variant(policy, experiment.evaluate_every, f"seed {config.seed}, {variant}")
        record[variant] = {"points": points, "token_logps": heldout_token_logps(policy, bins)}
    return record


def branch(start: Run, sparse_eps: float) -> Run:
    """A run of its own that takes its first CoPG step from where `start` stands."""
    config, model = replace(start.config, sparse_eps=sparse_eps), copy.deepcopy(start.model)
    return replace(start, config=config, policy=Policy(model), optimizer=make_optimizer(config, model))


def train_variant(run: Run, evaluate_every: int, name: str) -> list[dict[str, float]]:
    """A point before the first step and one per evaluate_every steps, with the means over the steps in between."""
    points, steps = [evaluate(run, name)], []
    while run.step < run.config.steps:
        steps.append(train_step(run))
        if run.step % evaluate_every == 0 or run.step == run.config.steps:
            points.append(evaluate(run, name) | step_means(steps))
            steps = []
    return points


def evaluate(run: Run, name: str) -> dict[str, float]:
    margins = heldout_margins(run)
    point = {"step": run.step, "margin": mean(margins), "ranked": mean([margin > 0 for margin in margins])}
    print(f"{name}, step {run.step}: held-out margin {point['margin']:.3f}, positive on {point['ranked']:.0%}")
    return point


def step_means(steps: Sequence[dict]) -> dict[str, float]:
    names = {"loss": "loss", "margin": "training_margin", "grad_norm": "grad_norm"} | {share: share for share in SHARES}
    return {name: mean([step[key] for step in steps]) for key, name in names.items() if key in steps[0]}


# Tokens by their frequency


def training_counts(run: Run) -> Tensor:
    """(V,) how often each token occurs in the training completions."""
    tokens = torch.tensor([token for group in run.train_groups for ids in group.completion_ids for token in ids])
    return torch.bincount(tokens, minlength=run.tokenizer.vocab_size)


def frequency_bins(counts: Tensor) -> Tensor:
    """(V,) counts -> index into BINS; deciles are of the different tokens that occur."""
    deciles = torch.tensor([0.1, 0.9], dtype=torch.double)
    rare, frequent = torch.quantile(counts[counts > 0].double(), deciles)
    bins = torch.full_like(counts, BINS.index("middle"))
    bins[counts >= frequent] = BINS.index("most frequent decile")
    bins[counts <= rare] = BINS.index("rarest decile")
    bins[counts == 0] = BINS.index("never seen")
    return bins


def describe_bins(run: Run, counts: Tensor, bins: Tensor) -> dict[str, dict[str, int]]:
    """Of each bin that is not empty: the range of training counts, and what the held-out completions hold of it."""
    labels = torch.cat([batch.labels for batch in batches_in_order(run, run.heldout_groups)]).cpu()
    found = {}
    for index in bins.unique().tolist():
        members, heldout = counts[bins == index], labels[bins[labels] == index]
        found[BINS[index]] = {
            "least_count": int(members.min()),
            "most_count": int(members.max()),
            "vocabulary": members.numel(),
            "heldout_tokens": heldout.numel(),
            "heldout_vocabulary": heldout.unique().numel(),
        }
    return found


@torch.no_grad()
def heldout_token_logps(run: Run, bins: Tensor) -> dict[str, float | None]:
    """Mean log-prob per bin over the held-out completions' tokens; None where a bin is empty."""
    labels, logps = [], []
    for batch in batches_in_order(run, run.heldout_groups):
        hidden_states, lm_head_weight = head_inputs(run.model, batch, DTYPES[run.config.dtype])
        logps.append(linear_logps(hidden_states, lm_head_weight, batch.labels).double().cpu())
        labels.append(batch.labels.cpu())
    bin_of_token, token_logps = bins[torch.cat(labels)], torch.cat(logps)
    parts = [token_logps[bin_of_token == index] for index in range(len(BINS))]
    return {name: part.mean().item() if part.numel() else None for name, part in zip(BINS, parts, strict=True)}


# Means over seeds


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds, of those that have a value."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
    }


def compared(exact: Sequence[float | None], sparse: Sequence[float | None]) -> dict[str, dict]:
    pairs = zip(exact, sparse, strict=True)
    differences = [None if a is None or b is None else b - a for a, b in pairs]
    return {"exact": spread(exact), "sparse": spread(sparse), "difference": spread(differences)}


def summarize(records: Sequence[dict]) -> dict[str, Any]:
    """What both variants reached, side by side, and what was kept of the softmax."""

    def final(name: str) -> dict[str, dict]:
        return compared(*([record[variant]["points"][-1][name] for record in records] for variant in VARIANTS))

    def logps(policy: str, name: str) -> list[float | None]:
        return [record[policy]["token_logps"][name] for record in records]

    points = [point for record in records for point in record["sparse"]["points"][1:]]
    kept = {share: [point[share] for point in points] for share in SHARES}
    return {
        "heldout_margin": final("margin"),
        "heldout_ranked": final("ranked"),
        "training_margin": final("training_margin"),
        "training_loss": final("loss"),
        "token_logps": {
            name: {"reference": spread(logps("reference", name))}
            | compared(*(logps(variant, name) for variant in VARIANTS))
            for name in BINS
        },
        "sparsity": {
            share: {"mean": mean(values), "least": min(values), "most": max(values)} for share, values in kept.items()
        },
    }


# Output


def table(summary: dict[str, Any]) -> str:
    rows = {name.replace("_", " "): summary[name] for name in ("heldout_margin", "training_margin", "training_loss")}
    rows |= {f"log-prob, {name}": values for name, values in summary["token_logps"].items()}
    lines = [f"{'mean over seeds (sd)':32}" + "".join(f"{name:>20}" for name in (*VARIANTS, "difference"))]
    for name, values in rows.items():
        lines.append(f"{name:32}" + "".join(f"{_text(values[key]):>20}" for key in (*VARIANTS, "difference")))
    for share, values in summary["sparsity"].items():
        lines.append(f"{share}: {values['mean']:.2%} ({values['least']:.2%} to {values['most']:.2%})")
    return "\n".join(lines)


def _text(value: dict[str, float | None]) -> str:
    return " ".join("-" if number is None else f"{number:.4f}" for number in value.values())


def plot(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    runs, token_logps = results["runs"], results["summary"]["token_logps"]
    figure.suptitle(
        f"{len(runs)} seeds, vocabulary {runs[0]['vocab_size']}, sparse_eps {results['config']['sparse_eps']:.3g}; "
        "bands and bars: standard deviation over seeds"
    )
    _plot_variants(axes[0], runs, "margin", "held-out reward margin (nats)")
    _plot_difference(axes[1], runs)
    _plot_variants(axes[2], runs, "loss", "training loss, mean of the steps up to there")
    _plot_token_logps(axes[3], axes[4], token_logps)
    _plot_sparsity(axes[5], runs)
    figure.savefig(path, dpi=100)


def _band(axis: Any, steps: Sequence[float], curves: Sequence[Sequence[float]], label: str) -> None:
    """Mean and standard deviation over seeds, one curve each."""
    values = torch.tensor(curves, dtype=torch.double)
    center, sd = values.mean(0), values.std(0, correction=1) if len(curves) > 1 else torch.zeros(len(steps))
    (line,) = axis.plot(steps, center.tolist(), label=label, marker=".")
    axis.fill_between(steps, (center - sd).tolist(), (center + sd).tolist(), alpha=0.2, color=line.get_color())


def _curves(runs: Sequence[dict], variant: str, name: str) -> tuple[list[float], list[list[float]]]:
    """Steps, and a curve per seed, of the points that have a value."""
    steps = [point["step"] for point in runs[0][variant]["points"] if name in point]
    return steps, [[point[name] for point in run[variant]["points"] if name in point] for run in runs]


def _plot_variants(axis: Any, runs: Sequence[dict], name: str, title: str) -> None:
    for variant in VARIANTS:
        _band(axis, *_curves(runs, variant, name), variant)
    _finish(axis, title, "step")


def _plot_difference(axis: Any, runs: Sequence[dict]) -> None:
    (steps, exact), (_, sparse) = (_curves(runs, variant, "margin") for variant in VARIANTS)
    for run, a, b in zip(runs, exact, sparse, strict=True):
        axis.plot(steps, [y - x for x, y in zip(a, b, strict=True)], marker=".", label=f"seed {run['seed']}")
    axis.axhline(0, color="gray", linewidth=1, zorder=0)
    _finish(axis, "held-out reward margin, sparse - exact", "step")


def _plot_token_logps(axis: Any, difference: Any, token_logps: dict[str, dict]) -> None:
    places = torch.arange(len(BINS)).double()
    for offset, variant in enumerate(("reference", *VARIANTS)):
        _bars(axis, (places + 0.25 * (offset - 1)).tolist(), [bin_[variant] for bin_ in token_logps.values()], variant)
    _bars(difference, places.tolist(), [bin_["difference"] for bin_ in token_logps.values()], "sparse - exact")
    difference.axhline(0, color="gray", linewidth=1)
    for panel in (axis, difference):
        panel.set_xticks(places.tolist(), BINS, fontsize=8)
    _finish(axis, "log-prob of held-out tokens, by frequency in training", "")
    _finish(difference, "the same, sparse - exact", "")


def _bars(axis: Any, places: Sequence[float], values: Sequence[dict[str, float | None]], label: str) -> None:
    heights, errors = ([value[key] or 0.0 for value in values] for key in ("mean", "sd"))
    axis.bar(places, heights, width=0.25, yerr=errors, capsize=3, label=label)


def _plot_sparsity(axis: Any, runs: Sequence[dict]) -> None:
    for share in SHARES:
        steps, curves = _curves(runs, "sparse", share)
        _band(axis, steps, [[100 * value for value in curve] for curve in curves], share)
    _finish(axis, "sparse steps, %", "step")


def _finish(axis: Any, title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> int:
    started, parser = time.perf_counter(), build_parser(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            experiment = parse_experiment(parser, argv)
            device = pick_device(experiment.config.device)
            examples, data_digest = load_data(replace(experiment.config, out=scratch))
            out = Path(experiment.config.out)
            out.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        origin = {name: value for name, value in provenance(device).items() if name != "peers"}
        configs = [replace(experiment.config, seed=s, out=str(Path(scratch, str(s)))) for s in experiment.seeds]
        records = [run_seed(experiment, config, examples, data_digest, device) for config in configs]
    results: dict[str, Any] = {
        "provenance": origin | {"versions": versions()},
        "config": asdict(experiment.config) | {"data_sha256": data_digest},
        "seconds": round(time.perf_counter() - started),
        "summary": summarize(records),
        "runs": records,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, out / "sparse-learning.png")
    print(table(results["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
