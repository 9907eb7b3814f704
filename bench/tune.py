"""Which block sizes and which default workspace are fastest on this machine: the figures behind the tables in the code.

    python bench/tune.py blocks          one entry of copg_kernels/kernels/blocks.py; needs a GPU
    python bench/tune.py workspace       the default workspace_bytes; CPU or GPU

Prints every candidate with its ratio to what is in the code now, and the winner. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.inputs import SHAPES, BenchInputs, make_inputs
from bench.providers import FROZEN, TRAINABLE, Provider, bind
from bench.tiles import Tiles, make_tiles
from bench.timing import Rounds, time_alternating
from copg_kernels import linear_copg_loss, linear_logps
from copg_kernels.kernels.blocks import BLOCKS, Blocks, device_kind
from copg_kernels.schedules.workspace import default_workspace_bytes

# One field at a time, from the entry in the table: all combinations would take hours, most of them to fail to compile.
CHOICES: dict[str, tuple[Any, ...]] = {
    "BLOCK_N": (64, 128, 256),
    "BLOCK_V": (64, 128, 256),
    "BLOCK_H": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "tiles_per_split": (16, 32, 64),
    "use_tma": (False, True),
}
WORKSPACE_MIB = (16, 32, 64, 128, 256, 512, 1024)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.what == "blocks" and device.type == "cpu":
        sys.exit("tune.py blocks times compiled kernels and needs a GPU")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    shape = SHAPES[options.shape or ("llama-3" if device.type == "cuda" else "cpu-32k")]
    rounds = Rounds(options.repeats)
    if options.what == "blocks":
        tune_blocks(make_tiles(shape, dtype, device, "triton"), rounds)
    else:
        tune_workspace(make_inputs(shape, "rl", dtype, device), rounds)


def tune_blocks(tiles: Tiles, rounds: Rounds) -> Blocks:
    """Descend along one field after another; each candidate is timed beside the best so far."""
    hidden_states = tiles.inputs.hidden_states
    key = device_kind(hidden_states.device), hidden_states.dtype.itemsize
    best = original = BLOCKS[key]
    for field, value in ((field, value) for field, values in CHOICES.items() for value in values):
        candidate = best._replace(**{field: value})
        if candidate == best:
            continue
        ratio = compare(tiles, key, best, candidate, rounds)
        print(f"{field}={value}: {ratio}", flush=True)
        if isinstance(ratio, float) and ratio < 0.99:
            best = candidate
    if best == original:
        print(f"{key}: {original} stays")
    else:
        print(f"{key}: {best}, {compare(tiles, key, original, best, rounds)} x the time of {original}")
    return best


def compare(tiles: Tiles, key: tuple[str, int], old: Blocks, new: Blocks, rounds: Rounds) -> float | str:
    """Time of the kernels with `new` over their time with `old`: one entry serves all, so their sum decides."""
    cases: dict[tuple[str, str], Callable[[], object]] = {}
    for name, blocks in (("old", old), ("new", new)):
        cases |= {(name, kernel): _with_blocks(key, blocks, run) for kernel, run in kernels(tiles).items()}
    try:
        for run in cases.values():
            run()  # compiles
        timings = time_alternating(cases, rounds, tiles.inputs.hidden_states.device, lambda: None)
    except Exception as failure:  # too much shared memory, or nothing the compiler can do
        return f"does not run ({type(failure).__name__})"
    seconds = {name: sum(timings[name, kernel].median for kernel in kernels(tiles)) for name in ("old", "new")}
    return round(seconds["new"] / seconds["old"], 3)


def kernels(tiles: Tiles) -> dict[str, Callable[[], object]]:
    """Those that read the table: logits to statistics, the tile that stays, and one slice's gradient tile."""
    token_logps, lse = tiles.ops.merge_splits_fwd(tiles.forward(), tiles.rows)
    out = tiles.gradient_tile()
    operands = (tiles.hidden_states, tiles.head, tiles.rows, token_logps, lse, 0, out)
    kept = (*operands[:3], tiles.kept_workspace())
    return {
        "forward": tiles.forward,
        "kept": lambda: tiles.ops.exp_tiles(*kept),
        "tile": lambda: tiles.ops.softmax_minus_label(*operands),
    }


def _with_blocks(key: tuple[str, int], blocks: Blocks, run: Callable[[], object]) -> Callable[[], object]:
    def wrapper() -> object:
        original = BLOCKS[key]
        BLOCKS[key] = blocks
        try:
            return run()
        finally:
            BLOCKS[key] = original

    return wrapper


def tune_workspace(inputs: BenchInputs, rounds: Rounds) -> int:
    """MiB of the fastest budget; the smallest within 1 % of it is the one to choose."""
    device = inputs.hidden_states.device
    present = default_workspace_bytes("triton" if device.type == "cuda" else "torch") // 2**20
    cases: dict[tuple[int, str], Callable[[], object]] = {}
    for mebibytes in sorted({*WORKSPACE_MIB, present}):
        runs = bind(ours_within(mebibytes * 2**20), inputs)
        try:
            for pass_name in (TRAINABLE, FROZEN):
                runs[pass_name]()
        except ValueError as too_small:
            print(f"{mebibytes} MiB: {too_small}")
            continue
        cases |= {(mebibytes, pass_name): runs[pass_name] for pass_name in (TRAINABLE, FROZEN)}
    seconds = {case: timing.median for case, timing in time_alternating(cases, rounds, device, lambda: None).items()}
    sizes = sorted({mebibytes for mebibytes, _ in cases})
    for mebibytes in sizes:
        ratios = (seconds[mebibytes, name] / seconds[present, name] for name in (TRAINABLE, FROZEN))
        print(
            f"{mebibytes:5d} MiB: "
            + ", ".join(f"{n} {r:.3f}" for n, r in zip((TRAINABLE, FROZEN), ratios, strict=True))
        )
    sums = {mebibytes: sum(seconds[mebibytes, name] for name in (TRAINABLE, FROZEN)) for mebibytes in sizes}
    winner = next(mebibytes for mebibytes in sizes if sums[mebibytes] <= 1.01 * min(sums.values()))
    ratio = sums[winner] / sums[present]
    print(f"smallest within 1 % of the fastest: {winner} MiB, {ratio:.3f} x the time of {present} MiB")
    return winner


def ours_within(workspace_bytes: int) -> Provider:
    def loss(inputs: BenchInputs) -> torch.Tensor:
        operands = (inputs.hidden_states, inputs.lm_head_weight, inputs.labels, inputs.ref_logps, inputs.rewards)
        return linear_copg_loss(
            *operands,
            beta=inputs.beta,
            group_size=inputs.group_size,
            cu_seqlens=inputs.cu_seqlens,
            workspace_bytes=workspace_bytes,
        ).loss

    return Provider(lambda inputs: linear_logps(*inputs[:3], workspace_bytes=workspace_bytes), loss)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("blocks", "workspace"))
    parser.add_argument("--shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
