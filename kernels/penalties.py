"""What changes logits before they are compared, in place.

s rows that sample, v vocabulary, l tokens of the longest row, e entries.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def add_entries(logits_sv: Tensor, rows_e: Ints, ids_e: Ints, values_e: Floats) -> None:
    """Add each value to its row's logit of its id. The pairs (row, id) are distinct."""
    if len(rows_e):
        at = torch.from_numpy(np.stack((rows_e, ids_e))).to(logits_sv.device)
        logits_sv[at[0], at[1]] += torch.from_numpy(values_e).to(logits_sv)


def penalize(
    logits_sv: Tensor,
    tokens_sl: Tensor,
    lengths_s: Ints,
    num_prompt_s: Ints,
    *,
    repetition_s: Floats,
    presence_s: Floats,
    frequency_s: Floats,
) -> None:
    """Repetition (CTRL, arXiv:1909.05858) over prompt and output; presence and frequency over the output.

    Row i holds `lengths[i]` tokens, the first `num_prompt[i]` of them prompt; what stands behind them in `tokens`,
    int32, may be anything in the vocabulary. Neutral are 1, 0 and 0.
    """
    device = logits_sv.device
    history = tokens_sl.long()
    index = torch.arange(history.shape[1], device=device)
    held = index < torch.from_numpy(lengths_s).to(device)[:, None]
    output = held & (index >= torch.from_numpy(num_prompt_s).to(device)[:, None])
    seen = torch.zeros_like(logits_sv).scatter_add_(1, history, held.float()) > 0
    counts = torch.zeros_like(logits_sv).scatter_add_(1, history, output.float())

    def column(values: Floats) -> Tensor:
        return torch.from_numpy(values).to(logits_sv)[:, None]

    repetition = column(repetition_s)
    repeated = torch.where(logits_sv > 0, logits_sv / repetition, logits_sv * repetition)
    logits_sv.copy_(torch.where(seen, repeated, logits_sv))
    logits_sv -= column(frequency_s) * counts
    logits_sv -= column(presence_s) * (counts > 0)
