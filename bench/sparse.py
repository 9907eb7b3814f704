"""What sparse_eps leaves out of the softmax, what the gradients lose by it, and what time they gain.

    python bench/sparse.py                                the regimes of inputs.py at V=151936 H=512 T=1024
    python bench/sparse.py --shape 32000 512 2048 --eps 2^-12 2^-14
    python bench/sparse.py --from-run runs/mine           the softmax of a policy that train/run.py has trained

Prints a table per softmax, and writes the same as JSON with its provenance. It measures the torch implementation, on
a CPU. bench/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.accuracy import Errors, Truth, exact, gradient_errors
from bench.inputs import REGIMES, BenchInputs, Shape, make_inputs
from bench.provenance import ROOT, provenance
from bench.providers import UPSTREAM
from bench.summaries import Summary
from bench.tables import number
from bench.timing import Rounds, time_alternating
from copg_kernels import copg_loss, linear_copg_loss, linear_logps, sequence_logps
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.significant_columns import significant_columns_torch
from copg_kernels.schedules.workspace import default_workspace_bytes

JSON = ROOT / "bench" / "results" / "local" / "sparse.json"
CPU = torch.device("cpu")
EPS = (2.0**-10, 2.0**-12, 2.0**-14, 2.0**-16)
# Groups of 2 x 64 tokens of this vocabulary fit the default workspace, so the exact gradients take three GEMMs.
SHAPE = (151936, 512, 1024)
COMPLETION_LENGTH = 64
WORKSPACE = default_workspace_bytes("torch")
# Fewer on a busy machine; nobody sits out, for the row is a ratio.
ROUNDS = Rounds(5, 60.0, share=math.inf)
# What the sparse gradients are set against: tiles of so many tokens and columns are kept or dropped as a whole.
TILE = 128
TILE_EPS = 2.0**-12
HEADER = (
    "gradients",
    "density",
    "dropped",
    "overflow",
    "dX error",
    "uncorrected",
    "dW error",
    "uncorrected",
    "seconds",
    "/ exact",
)


class Case(NamedTuple):
    """One softmax. Completions and groups may be ragged."""

    name: str
    inputs: BenchInputs
    cu_groups: Tensor | None = None  # (G + 1,) int32 instead of inputs.group_size

    @property
    def groups(self) -> dict[str, Any]:
        return dict(group_size=self.inputs.group_size) if self.cu_groups is None else dict(cu_groups=self.cu_groups)

    def coefficients(self) -> Tensor:
        """(T,) gradient of the CoPG loss in the token log-probs."""
        inputs = self.inputs
        operands = (inputs.hidden_states.detach(), inputs.lm_head_weight.detach(), inputs.labels)
        token_logps = linear_logps(*operands).requires_grad_()
        logps = sequence_logps(token_logps, inputs.labels, cu_seqlens=inputs.cu_seqlens)
        loss = copg_loss(
            logps,
            inputs.ref_logps,
            inputs.rewards,
            beta=inputs.beta,
            **self.groups,
        )
        return torch.autograd.grad(loss, token_logps)[0]

    def loss_and_gradients(self, sparse_eps: float | None) -> tuple[Tensor, ...]:
        inputs = self.inputs
        operands = (inputs.hidden_states, inputs.lm_head_weight)
        loss = linear_copg_loss(
            *operands,
            inputs.labels,
            inputs.ref_logps,
            inputs.rewards,
            beta=inputs.beta,
            **self.groups,
            cu_seqlens=inputs.cu_seqlens,
            sparse_eps=sparse_eps,
        ).loss
        return torch.autograd.grad(loss, operands)


class Row(NamedTuple):
    """Errors are relative L2, time is of the loss with its gradients; None: not measured."""

    gradients: str
    dhidden_error: float | None
    dweight_error: float | None
    eps: float | None = None
    density: float | None = None  # share of the softmax's entries that is kept
    dropped: float | None = None  # mass a token loses
    overflow: float | None = None  # share of tokens whose gradients are exact, and count for neither
    uncorrected_dhidden_error: float | None = None  # without the dropped mass put back
    uncorrected_dweight_error: float | None = None
    seconds: float | None = None
    over_exact: float | None = None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    results: dict[str, Any] = {"provenance": provenance(CPU), "tables": []}
    print(f"{results['provenance']['device']}, torch {torch.__version__}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    steps = 2 + len(options.eps) + ROUNDS.most * (1 + len(options.eps))
    with tqdm(total=steps * len(options.cases), unit="step", leave=False) as bar:
        for make_case in options.cases:
            table = measure(make_case(), options.eps, bar.update)
            results["tables"].append(table)
            options.json.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            bar.write(f"\n{summary(table).plain()}")
    print(f"\nwrote {options.json}")
    return results


def measure(case: Case, all_eps: Sequence[float], advance: Callable[[], object]) -> dict[str, Any]:
    """A row for each eps, then those of the two approximations it is set against."""
    inputs = case.inputs._replace(dlogps=case.coefficients())
    truth = exact(inputs, (UPSTREAM,))
    advance()
    rows = []
    for eps in all_eps:
        rows.append(sparse_row(inputs, eps, truth))
        advance()
    rows += reference_rows(inputs, truth)
    advance()
    cases = {eps: partial(case.loss_and_gradients, eps) for eps in (None, *all_eps)}
    timings = time_alternating(cases, ROUNDS, CPU, advance)
    exact_seconds = timings[None].median
    for i, eps in enumerate(all_eps):
        seconds = timings[eps].median
        rows[i] = rows[i]._replace(seconds=seconds, over_exact=seconds / exact_seconds)
    return {
        "name": case.name,
        "vocab_size": len(inputs.lm_head_weight),
        "hidden_size": inputs.hidden_states.shape[1],
        "num_tokens": len(inputs.labels),
        "rounds": timings[None].rounds,
        "exact_seconds": exact_seconds,
        "rows": [row._asdict() for row in rows],
    }


def sparse_row(inputs: BenchInputs, eps: float, truth: Truth) -> Row:
    """With the dropped mass put back, as the library does it, and without."""
    hidden_states, weight, labels = inputs[:3]
    token_logps = linear_logps(hidden_states, weight, labels, sparse_eps=eps, backend="torch")
    gradients = torch.autograd.grad(token_logps, (hidden_states, weight), inputs.dlogps)
    corrected = gradient_errors(UPSTREAM, gradients, truth)
    remove_correction(inputs, eps, *gradients)
    uncorrected = gradient_errors(UPSTREAM, gradients, truth)
    density, dropped, overflow = (share.item() for share in token_logps.sparsity)  # type: ignore[attr-defined]
    name = f"sparse_eps {power_of_two(eps)}"
    return Row(name, *corrected[1:], eps, density, dropped, overflow, *uncorrected[1:])


@torch.no_grad()
def remove_correction(inputs: BenchInputs, eps: float, dhidden: Tensor, dweight: Tensor) -> None:
    """In place: what the gradients would be with a compact softmax whose `dropped` is 0."""
    hidden_states, weight, labels = inputs[:3]
    found = significant_columns_torch(hidden_states, Head(weight, None, 1.0, None, 1.0), labels, eps, WORKSPACE)
    assert found is not None  # only `give_up` makes it None
    _, compact = found
    mass = inputs.dlogps * compact.dropped
    dhidden.addr_(mass, compact.tail @ weight)
    dweight.addr_(compact.tail, mass @ hidden_states)


def reference_rows(inputs: BenchInputs, truth: Truth) -> list[Row]:
    """Of softmax - onehot rounded to bfloat16, and of it without its negligible tiles; TILE tokens at a time."""
    weight, num_tokens = inputs.lm_head_weight.detach(), len(inputs.labels)
    rounded, tiles = _Gradients(weight), _Gradients(weight)
    kept = dropped = 0.0
    operands = (inputs.hidden_states.detach(), inputs.labels, inputs.dlogps)
    for hidden_states, labels, dlogps in zip(*(operand.split(TILE) for operand in operands), strict=True):
        entries = softmax_minus_onehot(hidden_states @ weight.T, labels)
        in_kept_tile = columns_of_kept_tiles(entries)
        kept += in_kept_tile.sum().item() * len(labels)
        dropped += entries[:, ~in_kept_tile].clamp_min(0).sum().item()
        rounded.add(round_to_bfloat16(entries), hidden_states, dlogps)
        tiles.add(entries * in_kept_tile, hidden_states, dlogps)
    name = f"{TILE} x {TILE} tiles {power_of_two(TILE_EPS)}"
    density, dropped = kept / (num_tokens * len(weight)), dropped / num_tokens
    return [
        Row("rounded to bfloat16", *rounded.errors(truth)[1:]),
        Row(name, *tiles.errors(truth)[1:], TILE_EPS, density, dropped),
    ]


class _Gradients:
    """What dX and dW become with other entries in place of softmax - onehot."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.dweight = weight, torch.zeros_like(weight)
        self.dhidden: list[Tensor] = []

    def add(self, entries: Tensor, hidden_states: Tensor, dlogps: Tensor) -> None:
        dlogits = entries * -dlogps.unsqueeze(1)
        self.dhidden.append(dlogits @ self.weight)
        self.dweight.addmm_(dlogits.T, hidden_states)

    def errors(self, truth: Truth) -> Errors:
        return gradient_errors(UPSTREAM, (torch.cat(self.dhidden), self.dweight), truth)


def softmax_minus_onehot(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1).scatter_add_(1, labels.unsqueeze(1), logits.new_full((len(labels), 1), -1.0))


def round_to_bfloat16(entries: Tensor) -> Tensor:
    return entries.bfloat16().to(entries.dtype)


def columns_of_kept_tiles(entries: Tensor) -> Tensor:
    """(rows of one tile, V) -> (V,) bool: a tile stays if any of its entries is at least TILE_EPS in size."""
    vocab_size = entries.shape[1]
    largest = F.pad(entries.abs().amax(0), (0, -vocab_size % TILE)).view(-1, TILE).amax(1)
    return (largest >= TILE_EPS).repeat_interleave(TILE)[:vocab_size]


def summary(table: dict[str, Any]) -> Summary:
    title = (
        f"{table['name']}: T={table['num_tokens']} H={table['hidden_size']} V={table['vocab_size']} float32, "
        f"exact loss+gradients {table['exact_seconds']:.3g} s, median of {table['rounds']}"
    )
    rows = [cells(Row(**row)) for row in table["rows"]]
    return Summary(title, HEADER, rows, [True] * len(rows))


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.gradients,
        number(row.density, ".3%"),
        number(row.dropped, ".2%"),
        number(row.overflow, ".0%"),
        number(row.dhidden_error, ".1e"),
        number(row.uncorrected_dhidden_error, ".1e"),
        number(row.dweight_error, ".1e"),
        number(row.uncorrected_dweight_error, ".1e"),
        number(row.seconds, ".3g"),
        number(row.over_exact, ".2f"),
    )


def power_of_two(eps: float) -> str:
    return f"2^{math.log2(eps):g}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, and as `cases` a function to make each softmax."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", nargs=3, type=int, metavar=("V", "H", "T"), help="default: " + " ".join(map(str, SHAPE)))
    add("--eps", nargs="+", type=probability, default=EPS, help="default: " + " ".join(map(power_of_two, EPS)))
    add("--from-run", type=Path, metavar="DIR", help="the run directory of a policy that train/run.py has trained")
    add("--json", type=Path, default=JSON)
    options = parser.parse_args(argv)
    if options.from_run and options.shape:
        parser.error("--from-run brings its own --shape")
    try:
        options.cases = cases_of_run(options.from_run) if options.from_run else cases_of(options.shape or SHAPE)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    return options


def probability(text: str) -> float:
    """A number, or 2^-14."""
    value = 2.0 ** float(text[2:]) if text.startswith("2^-") else float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a probability in (0, 1), such as 2^-14, got {text}")
    return value


def cases_of(sizes: Sequence[int]) -> list[Callable[[], Case]]:
    """The regimes of inputs.py, in groups of two completions."""
    vocab_size, hidden_size, num_tokens = sizes
    if min(sizes) < 1 or num_tokens % (2 * COMPLETION_LENGTH):
        raise ValueError(f"--shape: sizes are positive, T is a multiple of {2 * COMPLETION_LENGTH}, got {list(sizes)}")
    shape = Shape("sparse", vocab_size, hidden_size, num_tokens, COMPLETION_LENGTH)
    return [partial(case_of, shape, regime) for regime in (*REGIMES, "flat")]


def case_of(shape: Shape, regime: str) -> Case:
    return Case(f"regime {regime}", make_inputs(shape, regime, torch.float32, CPU))


def cases_of_run(run_dir: Path) -> list[Callable[[], Case]]:
    """Its held-out completions, and tokens drawn from its own softmax (temperature 1) in their place."""
    from bench.trained import trained_inputs  # needs what training needs

    inputs, cu_groups = trained_inputs(run_dir)
    drawn = inputs._replace(labels=drawn_labels(inputs))
    return [
        partial(Case, "held-out completions", inputs, cu_groups),
        partial(Case, "tokens drawn at temperature 1", drawn, cu_groups),
    ]


@torch.no_grad()
def drawn_labels(inputs: BenchInputs) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = (rows @ inputs.lm_head_weight.T for rows in inputs.hidden_states.split(TILE))
    return torch.cat([torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1) for z in logits])


if __name__ == "__main__":
    main()
