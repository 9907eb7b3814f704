"""What `bench/run.py --suite` measures: tables in the order in which they matter, for the last may be cut off."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.inputs import CPU_SHAPES, MODEL_SHAPES, Shape
from bench.loaders import EAGER, LOADERS, OURS, OURS_SPARSE
from bench.providers import BONUS, FROZEN, LOG_PROBS, TRAINABLE, UPSTREAM

# The pair every comparison needs, with the one whose speed hangs on the regime: it drops negligible tiles.
FEW = (EAGER, "cut-cross-entropy", OURS)
# Those whose entropy has a gradient; a test holds the list to what the providers offer.
WITH_ENTROPY = (
    EAGER,
    "compiled eager",
    "trl",
    "liger scaled CE (CuTe)",
    "liger scaled CE (torch)",
    "verl",
    "unsloth_zoo",
    OURS,
)
MAIN_PASSES = (LOG_PROBS, TRAINABLE, FROZEN)
SCALING = "scaling"
HEADS = "heads"
CHOSEN = "chosen"
FIDELITY = "fidelity"  # no table of timings: bench/fidelity.py


class Job(NamedTuple):
    """One table."""

    about: str  # what is varied
    shape: Shape
    regime: str = "rl"
    passes: tuple[str, ...] = MAIN_PASSES
    providers: tuple[str, ...] = tuple(LOADERS)


def quick(device: torch.device) -> list[Job]:
    """One head: the first of those for this device."""
    return [Job(HEADS, _heads(device)[0])]


def full(device: torch.device) -> list[Job]:
    main, *others = _heads(device)
    varied = (
        main if device.type == "cuda" else CPU_SHAPES[-1]
    )  # a small one, for a CPU takes seconds where a GPU does not
    return [
        Job(HEADS, main, passes=(*MAIN_PASSES, UPSTREAM)),
        *(Job(HEADS, shape) for shape in others),
        *(
            Job("regimes", varied, regime, (TRAINABLE, FROZEN), (*FEW, OURS_SPARSE))  # it hangs on the regime, too
            for regime in ("base", "tuned", "flat")
        ),
        # The same loss without the bonus beside it, which says what the bonus costs.
        Job(BONUS, varied, passes=(TRAINABLE, BONUS), providers=WITH_ENTROPY),
        Job("ignored tokens", varied._replace(ignored=0.5), providers=FEW),
        _long_group(varied),
        *_growing(varied),
        *(Job("group size", varied._replace(group_size=k), passes=(TRAINABLE,), providers=FEW) for k in (4, 8)),
    ]


def tiny(device: torch.device) -> list[Job]:
    """Some tables of a GPU's full suite, in moments on any device: a rehearsal, whose times mean nothing."""
    one_each = {job.about: job for job in full(torch.device("cuda"))}
    chosen = (one_each[about] for about in (HEADS, "regimes", BONUS, "ignored tokens"))
    return [job._replace(shape=_shrunk(job.shape)) for job in chosen]


def title(job: Job) -> str:
    return f"{job.about}, {job.shape.name} {job.regime} T={job.shape.num_tokens}"


def _shrunk(shape: Shape) -> Shape:
    return shape._replace(
        vocab_size=512,
        hidden_size=32,
        num_tokens=shape.num_tokens // 64,
        completion_length=shape.completion_length // 64,
    )


def _heads(device: torch.device) -> tuple[Shape, ...]:
    return MODEL_SHAPES if device.type == "cuda" else CPU_SHAPES


def _long_group(shape: Shape) -> Job:
    """All tokens in one group, and its logits beyond any workspace we would choose by default."""
    longest = shape._replace(num_tokens=4 * shape.num_tokens, completion_length=2 * shape.num_tokens)
    return Job("long group", longest, passes=(TRAINABLE, FROZEN), providers=FEW)


def _growing(shape: Shape) -> list[Job]:
    """Three sizes, 16-fold from the first to the last, around the shape's own."""
    length = shape.completion_length // 4
    sizes = (shape.num_tokens // 8, shape.num_tokens // 2, shape.num_tokens * 2)
    return [
        Job(SCALING, shape._replace(num_tokens=size, completion_length=length), passes=(TRAINABLE,), providers=FEW)
        for size in sizes
    ]


SUITES = {"quick": quick, "full": full, "tiny": tiny}
MINUTES = {"quick": 3.0, "full": 9.0, "tiny": 3.0}
