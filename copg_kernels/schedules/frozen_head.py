"""Log-probabilities and their derivative by the hidden states, where the head is frozen: two units of GEMM work.

    u[t] = dlogp[t] / dhidden_states[t] = -slope * sum_v (softmax - onehot)[t, v] weight[v]

A token's upstream gradient is then a factor of its row, so the backward pass has no GEMM left, whatever it is. Tokens
go through in chunks whose logits fit the workspace. Torch backend only, like closed groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copg_kernels.kernels.exp_tile import place_labels_torch
from copg_kernels.kernels.head import Head
from copg_kernels.kernels.merge_splits import merge_splits_fwd_torch
from copg_kernels.schedules.closed_groups import partials_of, tiles_of
from copg_kernels.schedules.tile_ops import accumulation_dtype, counted_rows


def token_logps_and_slopes(
    hidden_states: Tensor, head: Head, labels: Tensor, *, ignore_index: int, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H), (T,) -> per_token_logps (T,), lse (2, T), u (T, H) in the accumulation dtype; 0 where ignored."""
    dtype = accumulation_dtype(hidden_states.dtype)
    num_tokens, V = labels.numel(), head.weight.shape[0]
    max_tokens = max(1, min(num_tokens, workspace_bytes // (V * dtype.itemsize)))
    workspace = hidden_states.new_empty((max_tokens * V,), dtype=dtype)
    per_token_logps = hidden_states.new_empty((num_tokens,), dtype=dtype)
    lse = hidden_states.new_empty((2, num_tokens), dtype=dtype)
    u = hidden_states.new_zeros(hidden_states.shape, dtype=dtype)
    for start in range(0, num_tokens, max_tokens):
        chunk = slice(start, start + max_tokens)
        packed, rows = counted_rows(hidden_states[chunk], labels[chunk], ignore_index, "torch")
        tiles = list(tiles_of(packed, head, rows, workspace))
        per_token_logps[chunk], lse[:, chunk] = merge_splits_fwd_torch(partials_of(tiles, packed), rows)
        logps = per_token_logps[chunk][rows.row_index]
        exact_lse = lse[:, chunk].double().sum(0)[rows.row_index]
        packed_u = torch.zeros_like(packed)
        for tile in tiles:
            factor = place_labels_torch(tile, logps, exact_lse) * -head.slope
            weight = head.weight[tile.start : tile.stop].to(dtype)
            packed_u.add_((tile.tile @ weight).mul_(factor.unsqueeze(1)))
        u[chunk].index_copy_(0, rows.row_index, packed_u)
    return per_token_logps, lse, u
