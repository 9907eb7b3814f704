"""What a single tile operation is run on, for bench_kernels.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.inputs import BenchInputs, Shape, make_inputs
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.pack_rows import PackedRows
from copg_kernels.kernels.row_statistics import Partials
from copg_kernels.schedules.forward import forward_width
from copg_kernels.schedules.tile_ops import TileOps, counted_rows, tile_ops
from copg_kernels.schedules.workspace import default_workspace_bytes, kept_elements, slice_width, tile_in


class Tiles(NamedTuple):
    ops: TileOps
    inputs: BenchInputs
    hidden_states: Tensor  # as the backend's operations want them
    head: Head
    rows: PackedRows
    backend: str

    def forward(self) -> Partials:
        width = forward_width(
            self.head, self.rows, default_workspace_bytes(self.backend, self.head.weight), self.backend
        )
        return self.ops.linear_logps_fwd(self.hidden_states, self.head, self.rows, width)

    def kept_workspace(self) -> Tensor:
        """Room for the exponentials of every row and entry."""
        return self.hidden_states.new_empty(
            (kept_elements(len(self.rows.row_index), self.head.weight.shape[0], self.backend),)
        )

    def gradient_tile(self) -> Tensor:
        """An empty tile for one slice of the vocabulary."""
        num_rows, (vocab_size, hidden_size) = len(self.rows.row_index), self.head.weight.shape
        dtype, device = self.hidden_states.dtype, self.hidden_states.device
        budget = default_workspace_bytes(self.backend, self.head.weight)
        width = slice_width(budget, num_rows, (vocab_size, hidden_size), dtype, device, self.backend)
        workspace = self.hidden_states.new_empty((kept_elements(num_rows, width, self.backend),))
        return tile_in(workspace, num_rows, width, self.backend)


@torch.no_grad()
def make_tiles(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> Tiles:
    inputs = make_inputs(shape, "rl", dtype, device)
    head = Head(inputs.lm_head_weight.detach(), None, 1.0, None, 1.0)
    hidden_states, rows = counted_rows(inputs.hidden_states.detach(), inputs.labels, -100, backend)
    return Tiles(tile_ops(backend), inputs, hidden_states, head, rows, backend)
