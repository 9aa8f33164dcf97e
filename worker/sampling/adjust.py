"""What changes logits before they are compared: bias, penalties, stop tokens that come too early.

In vLLM's order. It matters for the repetition penalty alone, which multiplies or divides by the sign of the logit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..plan import Flags
from .table import Draws


def adjust(logits_sv: Tensor, draws: Draws, tokens: Tensor) -> None:
    """Change `logits_sv` in place. `tokens` [rows, length] are the rows' tokens, of which each holds `positions`."""
    _add(logits_sv, ((row, i, value) for row, bias in enumerate(draws.bias) for i, value in bias.items()))
    if (penalized := draws.penalized).any():
        _penalize(logits_sv, draws, penalized, tokens)
    _add(logits_sv, ((row, i, float("-inf")) for row, banned in enumerate(draws.banned) for i in banned))


def _add(logits_sv: Tensor, entries: Iterable[tuple[int, int, float]]) -> None:
    if found := list(entries):
        rows, ids, values = zip(*found, strict=True)
        at = torch.tensor((rows, ids), device=logits_sv.device)
        logits_sv[at[0], at[1]] += torch.tensor(values, device=logits_sv.device)  # (row, id) pairs are distinct


def _penalize(logits_sv: Tensor, draws: Draws, which: Flags, tokens: Tensor) -> None:
    """Repetition (CTRL, arXiv:1909.05858) over prompt and output; presence and frequency over the output."""
    device = logits_sv.device
    chosen = draws.take(which)
    at = torch.from_numpy(which.nonzero()[0]).to(device)
    logits = logits_sv[at]
    history = tokens[torch.from_numpy(chosen.rows).to(device), : int(chosen.positions.max())].long()
    index = torch.arange(history.shape[1], device=device)
    held = index < torch.from_numpy(chosen.positions).to(device)[:, None]
    output = held & (index >= torch.from_numpy(chosen.num_prompt).to(device)[:, None])
    seen = torch.zeros_like(logits).scatter_add_(1, history, held.float()) > 0
    counts = torch.zeros_like(logits).scatter_add_(1, history, output.float())

    def column(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)[:, None]

    repetition = column(chosen.repetition)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits -= column(chosen.frequency) * counts
    logits -= column(chosen.presence) * (counts > 0)
    logits_sv[at] = logits
