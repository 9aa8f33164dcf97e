"""The tensors of one step. t tokens (padding included), r rows that run, s rows that sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends import Backend
from .plan import Columns
from .rows import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    ids_t: Tensor  # int64
    positions_t: Tensor  # int64
    slots_t: Tensor  # int64, where the KV of each token goes: block * block_size + slot
    attention: dict[int | None, Any]  # the backend's own plan, by window
    last_s: Tensor  # int64, index in t of the token whose successor is sampled; padded


def build_batch(rows: Rows, columns: Columns, windows: tuple[int | None, ...], backend: Backend) -> Batch:
    """Of rows to which the plan has been applied. Tokens come in the order of the columns, padding last."""
    ends = columns.counts.cumsum()
    num_tokens = int(ends[-1])
    padding = -num_tokens % backend.row_multiple
    token_rows = np.concatenate((columns.rows.repeat(columns.counts), np.full(padding, rows.null_row)))
    offsets = (columns.starts - (ends - columns.counts)).repeat(columns.counts)
    positions = np.concatenate((np.arange(num_tokens) + offsets, np.zeros(padding, dtype=np.int64)))
    last = (ends - 1)[columns.samples]
    last = np.pad(last, (0, -len(last) % backend.row_multiple))

    device = rows.device
    rows_t, positions_t = torch.from_numpy(np.stack((token_rows, positions))).to(device)
    blocks_t = rows.tables[rows_t, positions_t // rows.block_size].long()
    used = -(-int(columns.ends.max()) // rows.block_size)
    tables = rows.tables[torch.from_numpy(columns.rows).to(device), :used]
    starts, counts = torch.from_numpy(columns.starts), torch.from_numpy(columns.counts)
    return Batch(
        ids_t=rows.tokens[rows_t, positions_t].long(),
        positions_t=positions_t,
        slots_t=blocks_t * rows.block_size + positions_t % rows.block_size,
        attention={
            window: backend.plan_attention(starts, counts, tables, block_size=rows.block_size, window=window)
            for window in windows
        },
        last_s=torch.from_numpy(last).to(device),
    )
