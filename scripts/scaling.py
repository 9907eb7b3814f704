"""The tables of docs/scaling.md: what the head of a Llama 3 costs at 8, 64 and 1,024 GPUs. Computed, not measured.

    python scripts/scaling.py      prints both tables; tests/test_scaling.py compares them with the document

A ring over n ranks makes each send (n - 1)/n of the bytes for an all-gather or a reduce-scatter, twice that for an
all-reduce. Over nodes of 8 GPUs with a network card each, a ring over all GPUs splits into 8 over the nodes, so that a
card carries an eighth.
"""

from __future__ import annotations

from typing import NamedTuple

GEMM_FLOPS = 790e12  # cuBLAS, bfloat16, on an H200: the rate the cost model assumes
NVLINK, CARD = 450e9, 50e9  # bytes per second and direction: NVLink 4, a 400 Gb/s card per GPU; from data sheets
NODE = 8
TOKENS = 16_384  # per GPU and step
WORKSPACE = 2**30
GPUS = (8, 64, 1024)
LAYOUTS = ("data", "data, weight sharded", "vocabulary x data", "sequence x data")


class Head(NamedTuple):
    """lm_head_weight."""

    name: str
    vocab_size: int
    hidden_size: int

    @property
    def size(self) -> int:
        return self.vocab_size * self.hidden_size


HEADS = (Head("Llama 3 8B", 128_256, 4_096), Head("Llama 3 70B", 128_256, 8_192))


class Cost(NamedTuple):
    """Of one step, per GPU."""

    units: int
    seconds: float  # of the GEMMs
    state_bytes: float  # float32 weight, gradient and two moments
    working_bytes: float  # bfloat16 weight and gradient, float32 sums, what goes with the tokens, the workspace
    nvlink_bytes: float  # sent
    card_bytes: float  # sent

    @property
    def transfer_seconds(self) -> float:
        return self.nvlink_bytes / NVLINK + self.card_bytes / CARD


def cost(head: Head, layout: str, gpus: int, tokens: int = TOKENS) -> Cost:
    """One step with `tokens` per GPU, every layout on the same tokens."""
    if layout == "vocabulary x data":
        return vocabulary_parallel(head, gpus, tokens)
    # A group inside one GPU closes there; the sequence-parallel one waits for the other parts of its completions.
    units = 4 if layout == "sequence x data" else 3
    sharded = layout != "data"
    # float32 sums of dW: over chunks of groups; the recompute schedule writes each row once.
    weight_bytes = (4 if units == 4 else 8) * head.size
    token_bytes = (8 if units == 4 else 6) * tokens * head.hidden_size
    # Sharded: W is gathered in bfloat16, dW reduce-scattered in float32. Otherwise dW is all-reduced in float32.
    moved = (2 + 4 if sharded else 2 * 4) * head.size
    nodes = gpus // NODE
    return Cost(
        units,
        gemm_seconds(head, units, tokens),
        16 * head.size / (gpus if sharded else 1),
        weight_bytes + token_bytes + WORKSPACE,
        moved * (NODE - 1) / NODE,
        moved / NODE * (nodes - 1) / nodes,
    )


def vocabulary_parallel(head: Head, gpus: int, tokens: int) -> Cost:
    """A node shares one head and the tokens of its 8 GPUs; nodes are data-parallel with that shard."""
    T, nodes = NODE * tokens, gpus // NODE
    shard = head.size / NODE
    hidden_bytes, dhidden_bytes, statistics_bytes = 2 * T * head.hidden_size, 4 * T * head.hidden_size, 12 * T
    # Groups close over the node, chunk by chunk: float32 sums of dW, and of dX for the sum over the ranks.
    return Cost(
        3,
        gemm_seconds(head, 3, T) / NODE,
        16 * shard,
        8 * shard + 10 * T * head.hidden_size + WORKSPACE,
        (hidden_bytes + 2 * dhidden_bytes) * (NODE - 1) / NODE + statistics_bytes * (NODE - 1),
        2 * 4 * shard * (nodes - 1) / nodes,
    )


def gemm_seconds(head: Head, units: int, tokens: int) -> float:
    return units * 2 * tokens * head.size / GEMM_FLOPS


def table(head: Head) -> str:
    """Markdown."""
    lines = [
        "| GPUs | layout | units | GEMMs, ms | state, GiB | working, GiB | NVLink, GB | card, GB | transfers, ms |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpus in GPUS:
        for layout in LAYOUTS:
            c = cost(head, layout, gpus)
            lines.append(
                f"| {gpus:,} | {layout} | {c.units} | {1e3 * c.seconds:.0f} | {c.state_bytes / 2**30:.2f} | "
                f"{c.working_bytes / 2**30:.1f} | {c.nvlink_bytes / 1e9:.2f} | {c.card_bytes / 1e9:.2f} | "
                f"{1e3 * c.transfer_seconds:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    for head in HEADS:
        print(f"### {head.name}: V = {head.vocab_size:,}, H = {head.hidden_size:,}\n\n{table(head)}\n")
