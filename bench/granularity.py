"""In which form a softmax's significant entries are best kept: what each form keeps, and what its products cost.

    python bench/granularity.py
    python bench/granularity.py --shape 32000 512 1024 --eps 2^-12

Forms: the union of the significant columns of a block of tokens, for several sizes of block; tiles; single entries
(CSR, by MKL's products); columns that are significant to many tokens, with the other entries apart. The products are
those of the backward pass, dX = P W and dW = P^T X, over the two dense GEMMs of the same operands in the same rounds.
Torch on a CPU; the form the library uses is the union over blocks of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.inputs import REGIMES, Shape, make_inputs
from bench.provenance import ROOT, provenance
from bench.sparse import power_of_two, probability
from bench.summaries import Summary
from bench.timing import Rounds, time_alternating
from copg_kernels.kernels.significant_columns import BLOCK_ROWS

JSON = ROOT / "bench" / "results" / "local" / "granularity.json"
CPU = torch.device("cpu")
SHAPE = (151936, 512, 512)
EPS = 2.0**-14
ROUNDS = Rounds(5, 60.0, share=math.inf)
BLOCKS = (32, 64, BLOCK_ROWS, 256)
TILE = 128
# A column is hot where one token in so many finds it significant.
HOT = (8, 32)
# Entries that share no column with a larger one are small: to be as exact as columns, single ones need a lower eps.
ENTRY_EPS = (1, 1 / 4, 1 / 16, 1 / 64)
HEADER = ("form", "kept", "MiB", "dX error", "dW error", "seconds", "/ 2 GEMMs", "spread")
Pair = tuple[Tensor, Tensor]


class Softmax(NamedTuple):
    """P (T, V), 0 at the label, whose entry has a place of its own; and what P is multiplied with."""

    probabilities: Tensor  # (T, V)
    hidden_states: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (T,)


class Form(NamedTuple):
    name: str
    kept: Tensor  # (T, V) bool
    num_bytes: int  # values in float32 and indices in int32
    products: Callable[[], Pair]


@torch.no_grad()
def make_softmax(shape: Shape, regime: str) -> Softmax:
    inputs = make_inputs(shape, regime, torch.float32, CPU)
    probabilities = (inputs.hidden_states @ inputs.lm_head_weight.T).softmax(1)
    probabilities.scatter_(1, inputs.labels.unsqueeze(1), 0.0)
    return Softmax(probabilities, inputs.hidden_states.detach(), inputs.lm_head_weight.detach(), inputs.labels)


def forms(softmax: Softmax, eps: float) -> list[Callable[[], Form]]:
    sizes = [rows for rows in BLOCKS if rows <= len(softmax.labels)]
    return [
        *(partial(column_union, softmax, eps, rows) for rows in sizes),
        partial(kept_tiles, softmax, eps),
        *(partial(entries, softmax, eps * share) for share in ENTRY_EPS),
        *(partial(hot_columns, softmax, eps, share) for share in HOT),
    ]


def dense_products(softmax: Softmax) -> Pair:
    return softmax.probabilities @ softmax.weight, softmax.probabilities.T @ softmax.hidden_states


def column_union(softmax: Softmax, eps: float, block_rows: int) -> Form:
    blocks, kept = [], torch.zeros_like(softmax.probabilities, dtype=torch.bool)
    for start in range(0, len(softmax.labels), block_rows):
        rows = slice(start, start + block_rows)
        columns = (softmax.probabilities[rows] >= eps).any(0).nonzero().squeeze(1)
        kept[rows, columns] = True
        blocks.append((rows, columns, softmax.probabilities[rows].index_select(1, columns)))

    def products() -> Pair:
        dhidden, dweight = torch.empty_like(softmax.hidden_states), torch.zeros_like(softmax.weight)
        for rows, columns, values in blocks:
            torch.mm(values, softmax.weight.index_select(0, columns), out=dhidden[rows])
            sums = dweight.index_select(0, columns).addmm_(values.T, softmax.hidden_states[rows])
            dweight.index_copy_(0, columns, sums)
        return dhidden, dweight

    num_bytes = 4 * sum(values.numel() + columns.numel() for _, columns, values in blocks)
    return Form(f"columns per {block_rows} tokens", kept, num_bytes, products)


def kept_tiles(softmax: Softmax, eps: float) -> Form:
    tiles, kept = [], torch.zeros_like(softmax.probabilities, dtype=torch.bool)
    for start in range(0, len(softmax.labels), TILE):
        for first in range(0, len(softmax.weight), TILE):
            place = slice(start, start + TILE), slice(first, first + TILE)
            if (softmax.probabilities[place] >= eps).any():
                kept[place] = True
                tiles.append((*place, softmax.probabilities[place].contiguous()))

    def products() -> Pair:
        dhidden, dweight = torch.zeros_like(softmax.hidden_states), torch.zeros_like(softmax.weight)
        for rows, columns, values in tiles:
            dhidden[rows].addmm_(values, softmax.weight[columns])
            dweight[columns].addmm_(values.T, softmax.hidden_states[rows])
        return dhidden, dweight

    return Form(f"{TILE} x {TILE} tiles", kept, 4 * (int(kept.sum()) + 2 * len(tiles)), products)


def entries(softmax: Softmax, eps: float) -> Form:
    kept = softmax.probabilities >= eps
    single = _csr(softmax.probabilities * kept)
    return Form(f"entries, {power_of_two(eps)}", kept, _csr_bytes(single), lambda: _csr_products(single, softmax))


def hot_columns(softmax: Softmax, eps: float, share: int) -> Form:
    """Dense columns, and what is significant elsewhere as single entries."""
    kept = softmax.probabilities >= eps
    hot = kept.sum(0) >= len(softmax.labels) / share
    columns = hot.nonzero().squeeze(1)
    values = softmax.probabilities.index_select(1, columns)
    cold = _csr((softmax.probabilities * kept).masked_fill_(hot, 0.0))

    def products() -> Pair:
        dhidden, dweight = _csr_products(cold, softmax)
        dhidden.addmm_(values, softmax.weight.index_select(0, columns))
        # No entry of a hot column is in `cold`.
        return dhidden, dweight.index_copy_(0, columns, values.T @ softmax.hidden_states)

    num_bytes = 4 * (values.numel() + columns.numel()) + _csr_bytes(cold)
    return Form(f"columns of 1 token in {share}, entries", kept | hot, num_bytes, products)


def _csr(matrix: Tensor) -> Pair:
    """The matrix and its transpose: each product then runs along rows."""
    return matrix.to_sparse_csr(), matrix.T.to_sparse_csr()


def _csr_bytes(pair: Pair) -> int:
    return sum(4 * (2 * m.values().numel() + m.crow_indices().numel()) for m in pair)


def _csr_products(pair: Pair, softmax: Softmax) -> Pair:
    return pair[0] @ softmax.weight, pair[1] @ softmax.hidden_states


def exact_gradients(softmax: Softmax) -> Pair:
    """(P - onehot) W and (P - onehot)^T X: every token's coefficient is 1."""
    dhidden, dweight = dense_products(softmax)
    label_values = softmax.probabilities.sum(1, keepdim=True)
    dhidden -= label_values * softmax.weight[softmax.labels]
    dweight.index_add_(0, softmax.labels, label_values * -softmax.hidden_states)
    return dhidden, dweight


def errors(form: Form, softmax: Softmax, products: Pair, gradients: Pair) -> list[float]:
    """Relative L2 of dX and dW with the dropped mass put back; the form's own products are checked on the way."""
    missing = softmax._replace(probabilities=softmax.probabilities.masked_fill(form.kept, 0.0))
    lost = dense_products(missing)
    for ours, dense, less in zip(form.products(), products, lost, strict=True):
        assert (ours + less - dense).norm() <= 1e-4 * dense.norm(), f"{form.name}: its products are wrong"
    mass, tail = missing.probabilities.sum(1), missing.probabilities.sum(0)
    tail /= tail.sum().clamp_min(torch.finfo(tail.dtype).tiny)
    lost[0].addr_(mass, tail @ softmax.weight, alpha=-1.0)
    lost[1].addr_(tail, mass @ softmax.hidden_states, alpha=-1.0)
    return [(less.norm() / gradient.norm()).item() for less, gradient in zip(lost, gradients, strict=True)]


@torch.no_grad()
def measure(shape: Shape, regime: str, eps: float, advance: Callable[[], object]) -> dict[str, Any]:
    softmax = make_softmax(shape, regime)
    products, gradients = dense_products(softmax), exact_gradients(softmax)
    rows: list[dict[str, Any]] = []
    cases: dict[str, Callable[[], Pair]] = {"": partial(dense_products, softmax)}
    for make_form in forms(softmax, eps):
        form = make_form()
        dhidden_error, dweight_error = errors(form, softmax, products, gradients)
        kept, mib = form.kept.double().mean().item(), form.num_bytes / 2**20
        rows.append(dict(form=form.name, kept=kept, mib=mib, dhidden_error=dhidden_error, dweight_error=dweight_error))
        cases[form.name] = form.products
    timings = time_alternating(cases, ROUNDS, CPU, advance)
    for row in rows:
        timing = timings[row["form"]]
        row |= dict(seconds=timing.median, over_dense=timing.median / timings[""].median, spread=timing.spread)
    shape_of = dict(vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_tokens=shape.num_tokens)
    return dict(regime=regime, eps=eps, shape=shape_of, dense_seconds=timings[""].median, rows=rows)


def summary(table: dict[str, Any]) -> Summary:
    shape = table["shape"]
    title = (
        f"regime {table['regime']}, eps {power_of_two(table['eps'])}: T={shape['num_tokens']} H={shape['hidden_size']} "
        f"V={shape['vocab_size']} float32, two dense GEMMs {table['dense_seconds']:.3g} s"
    )
    formats = dict(
        kept=".2%", mib=".0f", dhidden_error=".1e", dweight_error=".1e", seconds=".3g", over_dense=".2f", spread=".0%"
    )
    rows = [(row["form"], *(format(row[key], spec) for key, spec in formats.items())) for row in table["rows"]]
    return Summary(title, HEADER, rows, [True] * len(rows))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("V", "H", "T"), default=SHAPE)
    parser.add_argument("--eps", type=probability, default=EPS)
    parser.add_argument("--json", type=Path, default=JSON)
    options = parser.parse_args(argv)
    vocab_size, hidden_size, num_tokens = options.shape
    if min(options.shape) < 1 or num_tokens % 2:
        parser.error(f"--shape: sizes are positive and T is even, got {list(options.shape)}")
    shape = Shape("granularity", vocab_size, hidden_size, num_tokens, num_tokens // 2)
    results: dict[str, Any] = {"provenance": provenance(CPU), "tables": []}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(unit="timing", leave=False) as bar:
        for regime in REGIMES:
            results["tables"].append(measure(shape, regime, options.eps, bar.update))
            options.json.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            bar.write(f"\n{summary(results['tables'][-1]).plain()}")
    return results


if __name__ == "__main__":
    main()
