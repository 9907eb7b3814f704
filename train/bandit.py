"""The bandit of the CoPG paper (arXiv 2406.19185): who reaches the optimum from another policy's samples.

As the paper has it: three arms with R = (2.5, 2, 1); 10^4 pairs (y, y') with y from mu1 = (0.1, 0.2, 0.7) and y' from
mu2 = (0.05, 0.05, 0.9); pi_ref uniform, beta = 0.5; Adam, learning rate 1e-3, batches of 512 pairs, 100 epochs; regret
J(pi*) - J(pi) with J(pi) = E_pi[R] - beta KL(pi || pi_ref). The methods are
  1. CoPG, on pairs;
  2. IPO, on preferences drawn with P(y > y') = sigmoid(R(y) - R(y'));
  3. off-policy policy gradient, (R - beta log(pi / pi_ref) - b) grad log pi on both members, without a baseline;
  4. the same with the value baseline b = E_pi[R], exact and without the regulariser.
All losses are those of copg_kernels; an arm is a completion of one token.

What the paper leaves open, and what is done here:
  1. The policy's parameters. Three bare logits move by about 1e-3 per step of Adam, and the 2,000 steps of 100 epochs
     do not bring them to the optimum. A small tanh network (1-64-64-3) with a constant input and a head of zeros is
     there within ten epochs. Both are run and drawn; the verdict is on the network, the bare logits go on to epoch 300.
  2. The last batch of an epoch, of 272 pairs, is kept: 20 steps per epoch.
  3. The seeds. Each has its own pairs, preferences, order of batches and weights; the methods share them.
The dashed lines are no results of training: where the gradient over all pairs, weighted with their probability,
vanishes. For CoPG that is pi* = pi_ref exp(R / beta) / Z, with regret 0.

    python train/bandit.py                  # under two minutes on two CPU cores
    python train/bandit.py --seeds 3 --epochs 20 --out runs/bandit-short

--out receives results.json and regret.png. The exit status is 1 if a method ends away from where it should.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

# As a script only this file's folder is on the path; the packages lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.provenance import provenance
from copg_kernels import copg_loss, losses
from train.three_arms import (
    BETA,
    REWARDS,
    Pairs,
    completions,
    draw_pairs,
    optimum,
    regret,
    rest_point,
    shuffled_batches,
)

LEARNING_RATE = 1e-3
PAPER_EPOCHS = 100


# The methods. Each takes the log-probs of the arms in S runs, (S, 3), and returns the sum of the runs' mean losses.


def copg(arm_logps: Tensor, pairs: Pairs) -> Tensor:
    return len(arm_logps) * copg_loss(*completions(arm_logps, pairs), beta=BETA, group_size=2)


def ipo(arm_logps: Tensor, pairs: Pairs) -> Tensor:
    logps, ref_logps, _ = completions(arm_logps, pairs)
    preferred = torch.stack([pairs.first_preferred, ~pairs.first_preferred], -1).double().flatten()
    return len(arm_logps) * losses.ipo_loss(logps, ref_logps, preferred, beta=BETA)


def policy_gradient(arm_logps: Tensor, pairs: Pairs) -> Tensor:
    return len(arm_logps) * losses.reinforce_loss(*completions(arm_logps, pairs), beta=BETA, group_size=2)


def value_baseline(arm_logps: Tensor, pairs: Pairs) -> Tensor:
    values = (arm_logps.detach().exp() @ REWARDS).repeat_interleave(pairs.arms[0].numel())
    numbers = completions(arm_logps, pairs)
    return len(arm_logps) * losses.reinforce_loss(*numbers, beta=BETA, group_size=2, baseline=values)


METHODS: dict[str, Callable[[Tensor, Pairs], Tensor]] = {
    "CoPG": copg,
    "IPO": ipo,
    "policy gradient, value baseline": value_baseline,
    "policy gradient, no baseline": policy_gradient,
}


def missed(final_regret: dict[str, float], expected: dict[str, float]) -> list[str]:
    """What did not end where the gradient of all pairs vanishes."""
    value, none = "policy gradient, value baseline", "policy gradient, no baseline"
    wanted = {
        "CoPG": (final_regret["CoPG"] < 1e-3, "below 0.001"),
        "IPO": (abs(final_regret["IPO"] - expected["IPO"]) <= 0.01, f"{expected['IPO']:.4f} +- 0.01"),
        value: (abs(final_regret[value] - expected[value]) <= 0.003, f"{expected[value]:.4f} +- 0.003"),
        none: (final_regret[none] > 0.5, "above 0.5"),
    }
    failures = [(name, what) for name, (met, what) in wanted.items() if not met]
    return [f"{name}: final regret {final_regret[name]:.4g}, expected {what}" for name, what in failures]


# Training: all methods and seeds side by side


def bare_logits() -> nn.Module:
    return zero_head(nn.Linear(1, 3, bias=False))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), zero_head(nn.Linear(64, 3)))


def zero_head(head: nn.Linear) -> nn.Linear:
    """Every run starts from the reference policy."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


POLICIES = {"network": network, "bare logits": bare_logits}


def train(build: Callable[[], nn.Module], seeds: Sequence[int], epochs: int) -> Tensor:
    """(methods, seeds, epochs + 1) regret before the first epoch and after each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    data = draw_pairs(generators)
    models = [seeded(build, seed) for _ in METHODS for seed in seeds]
    parameters, _ = torch.func.stack_module_state(models)
    optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE)
    regrets = []
    for epoch in range(epochs + 1):
        with torch.no_grad():
            regrets.append(regret(arm_logps_of(models[0], parameters, len(seeds)).exp()))
        for batch in shuffled_batches(data, generators) if epoch < epochs else ():
            logps = arm_logps_of(models[0], parameters, len(seeds))
            loss = torch.stack([method(x, batch) for method, x in zip(METHODS.values(), logps, strict=True)]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.stack(regrets, -1)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def arm_logps_of(model: nn.Module, parameters: dict[str, Tensor], num_seeds: int) -> Tensor:
    """(methods, seeds, 3) float64, of models that share one architecture."""
    logits = torch.vmap(lambda p: torch.func.functional_call(model, p, torch.ones(1)))(parameters)
    return logits.double().log_softmax(-1).view(len(METHODS), num_seeds, 3)


# Output


def summarize(curves: dict[str, Tensor]) -> dict[str, Any]:
    """Per policy and method: mean and standard deviation over seeds by epoch, and the last value of each seed."""
    return {
        policy: {
            name: {"mean": runs.mean(0).tolist(), "sd": runs.std(0).tolist(), "final": runs[:, -1].tolist()}
            for name, runs in zip(METHODS, regrets, strict=True)
        }
        for policy, regrets in curves.items()
    }


def table(results: dict[str, Any]) -> str:
    """After the paper's number of epochs and after the last."""
    columns = [
        (policy, epoch)
        for policy, epochs in results["epochs"].items()
        for epoch in sorted({min(PAPER_EPOCHS, epochs), epochs})
    ]
    lines = [f"{'regret, mean (sd)':34}{'expected':>10}" + "".join(f"{f'{p}, epoch {e}':>26}" for p, e in columns)]
    for name, rest in results["rest_points"].items():
        curves = [(results["regret"][policy][name], epoch) for policy, epoch in columns]
        cells = [f"{curve['mean'][epoch]:.6f} ({curve['sd'][epoch]:.6f})" for curve, epoch in curves]
        lines.append(f"{name:34}{rest['regret']:10.6f}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    figure.suptitle(
        f"Regret of the paper's bandit, {len(results['seeds'])} seeds; bands: standard deviation over seeds; "
        "dashed: where the expected gradient vanishes"
    )
    axes = figure.subplots(2, len(POLICIES), sharex="col")
    for column, (policy, curves) in enumerate(results["regret"].items()):
        for axis, scale in zip(axes[:, column], ("linear", "log"), strict=True):
            plot_regret(axis, curves, results["rest_points"])
            axis.set_yscale(scale)
            axis.set_ylim(*((-0.02, 0.8) if scale == "linear" else (1e-7, 1)))
            axis.axvline(PAPER_EPOCHS, color="gray", linewidth=1, linestyle=":")
        axes[0, column].set_title(f"{policy}, Adam 1e-3 (dotted: the paper's 100 epochs)", fontsize=10)
        axes[1, column].set_xlabel("epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel("regret")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def plot_regret(axis: Any, curves: dict[str, dict], rest_points: dict[str, dict]) -> None:
    for name, curve in curves.items():
        mean, sd = torch.tensor(curve["mean"]), torch.tensor(curve["sd"])
        (line,) = axis.plot(mean.tolist(), label=name)
        axis.fill_between(range(len(mean)), (mean - sd).tolist(), (mean + sd).tolist(), alpha=0.2)
        axis.axhline(rest_points[name]["regret"], color=line.get_color(), linestyle="--", linewidth=1)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="seeds to run, from 0 on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=PAPER_EPOCHS, help="epochs of the network (%(default)s)")
    parser.add_argument("--bare-epochs", type=int, default=300, help="epochs of the bare logits (%(default)s)")
    parser.add_argument("--out", default="runs/bandit", help="directory for results.json and regret.png (%(default)s)")
    arguments = parser.parse_args(argv)
    for flag, least in (("seeds", 2), ("epochs", 1), ("bare_epochs", 1)):
        if getattr(arguments, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}, got {getattr(arguments, flag)}")
    if not arguments.out:
        parser.error("--out must name a directory")
    try:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # The tensors are small: a second thread costs more than it does, and equal runs give equal bits.
    torch.set_num_threads(1)
    started, out = time.perf_counter(), Path(arguments.out)
    rest_points = {name: rest_point(method) for name, method in METHODS.items()}
    epochs = dict(zip(POLICIES, (arguments.epochs, arguments.bare_epochs), strict=True))
    seeds = list(range(arguments.seeds))
    curves = {policy: train(build, seeds, epochs[policy]) for policy, build in POLICIES.items()}
    results: dict[str, Any] = {
        "provenance": {name: x for name, x in provenance(torch.device("cpu")).items() if name != "peers"},
        "seconds": round(time.perf_counter() - started, 1),
        "seeds": seeds,
        "epochs": epochs,
        "optimum": optimum().tolist(),
        "rest_points": {name: {"policy": x.tolist(), "regret": regret(x).item()} for name, x in rest_points.items()},
        "regret": summarize(curves),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, out / "regret.png")
    print(table(results))
    final = {name: curve["mean"][-1] for name, curve in results["regret"]["network"].items()}
    failures = missed(final, {name: x["regret"] for name, x in results["rest_points"].items()})
    print("\n".join(failures) or f"Every method of the network ends where it should; {results['seconds']} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
