"""Which rows count: the labels' positions in a packed order with the ignored ones at the end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedRows(NamedTuple):
    """The counted rows first, in their order, then the ignored ones."""

    row_index: Tensor  # (R,) int64: packed row -> token
    position: Tensor  # (T,) int64: token -> packed row; >= num_rows where the token is ignored
    num_rows: Tensor  # (1,) int64, on the device
    labels: Tensor  # (R,) int64, packed


def pack_rows(labels: Tensor, ignore_index: int, *, exact: bool) -> PackedRows:
    """(T,) labels -> packed order. `exact` cuts it at the number of counted rows, which on a GPU would synchronise.

    Without `exact` R = T and kernels read num_rows on the device.
    """
    counted = labels != ignore_index
    num_before = counted.cumsum(0)
    num_rows = counted.sum().view(1)
    token = torch.arange(labels.numel(), device=labels.device)
    position = torch.where(counted, num_before - 1, num_rows + token - num_before)
    row_index = torch.empty_like(token).scatter_(0, position, token)
    if exact:
        row_index = row_index[: num_rows.item()]
    return PackedRows(row_index, position, num_rows, labels.index_select(0, row_index))
