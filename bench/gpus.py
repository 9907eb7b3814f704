"""What is known of a GPU before anything has run on it: a number a line, and where each is from.

A range where sources differ or a kernel may see either: the favourable end first.
"""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """From the least to the most: seconds, cycles or instructions."""

    low: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)


class Known(NamedTuple):
    value: float | tuple[float, float]
    unit: str
    source: str

    @property
    def best(self) -> float:
        return self.value[0] if isinstance(self.value, tuple) else self.value

    @property
    def worst(self) -> float:
        return self.value[1] if isinstance(self.value, tuple) else self.value


class Gpu(NamedTuple):
    name: str
    target: str  # of bench.recording.TARGETS
    sms: int
    clock: Known
    fma_per_cycle: Known
    cublas: Known
    hbm: Known
    l2: Known
    shared: Known
    shared_bytes: int  # that blocks of one SM have together, 1 KiB of each of them not its own
    registers: int  # of an SM
    latency: Known
    in_flight: Known
    tile_latency: Known
    empty_block: Known
    launch: Known

    @property
    def cublas_share(self) -> float:
        """Of what the tensor cores could do at the clock."""
        return self.cublas.best / (self.sms * 2 * self.fma_per_cycle.best * self.clock.best)

    def assumptions(self) -> list[str]:
        named = {name.replace("_", " "): value for name, value in self._asdict().items() if isinstance(value, Known)}
        return [f"{name}: {_number(known)} {known.unit} ({known.source})" for name, known in named.items()]


def _number(known: Known) -> str:
    if isinstance(known.value, tuple):
        return f"{known.best:.4g} or {known.worst:.4g}"
    return f"{known.value:.4g}"


GPUS = {
    "h200": Gpu(
        name="H200",
        target="sm_90",
        sms=132,  # NVIDIA's data sheet of the H200 SXM, as the three below
        clock=Known(1.70e9, "Hz", "assumed: between the boost clock of 1.98 GHz and what 700 W leave a GEMM"),
        fma_per_cycle=Known(2048, "FMA per SM", "data sheet: 989 TFLOP/s of dense bfloat16 at 1.83 GHz"),
        cublas=Known(790e12, "FLOP/s", "bfloat16 GEMMs of a head's size, reported for H200s; the unit of this table"),
        hbm=Known((4.4e12, 3.9e12), "bytes/s", "92 or 81 % of the data sheet's 4.8e12: what copies reach"),
        l2=Known((9e12, 7e12), "bytes/s", "assumed; no data sheet has it, and public measurements differ"),
        shared=Known(128, "bytes per cycle and SM", "CUDA programming guide: 32 banks of 4 bytes"),
        shared_bytes=233472,  # 228 KiB: CUDA programming guide, technical specifications of 9.0
        registers=65536,
        latency=Known((600, 1000), "cycles", "assumed: a load of a thread from L2 or HBM"),
        in_flight=Known((32, 16), "bytes", "assumed: what a thread of a small launch waits for at a time"),
        tile_latency=Known(
            (1500, 2000), "cycles", "assumed: a block of one tile up to its first operands, and its stores"
        ),
        empty_block=Known((300, 1500), "cycles", "assumed: a block that starts, reads a flag and returns"),
        launch=Known((2e-6, 4e-6), "seconds", "assumed: the least a launch takes on a GPU"),
    )
}
