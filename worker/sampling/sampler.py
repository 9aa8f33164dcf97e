"""The next token of each row. Work is done only for the rows that ask for it: an all-greedy step is one argmax."""

import torch
from torch import Tensor

from ...kernels.sampling import gumbel_argmax
from .adjust import adjust
from .filters import keep_likely
from .table import Draws


def sample(logits_sv: Tensor, draws: Draws, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [s] int64, and which rows hold NaN [s] bool (their id is 0); both on the device.

    `logits_sv` float32 is left as it is; `tokens` [rows, length] int32 are the tokens of all rows. Order: bias,
    penalties, stop tokens that come too early, temperature, min-p, top-k, top-p, one draw.
    """
    ids = logits_sv.argmax(-1)
    faulty = logits_sv.gather(1, ids[:, None])[:, 0].isnan()  # argmax takes NaN for the largest
    random = draws.random
    if (touched := draws.adjusted | random).any():
        at = torch.from_numpy(touched.nonzero()[0]).to(logits_sv.device)
        ids[at] = _choose(logits_sv[at], draws.take(touched), tokens)
    return ids.masked_fill_(faulty, 0), faulty


def _choose(logits_sv: Tensor, draws: Draws, tokens: Tensor) -> Tensor:
    adjust(logits_sv, draws, tokens)
    ids = logits_sv.argmax(-1)
    if (random := draws.random).any():
        chosen = draws.take(random)
        device = logits_sv.device
        at = torch.from_numpy(random.nonzero()[0]).to(device)
        scaled = logits_sv[at] / torch.from_numpy(chosen.temperature).to(logits_sv)[:, None]
        keep_likely(scaled, chosen)
        seeds, positions = torch.from_numpy(chosen.seeds).to(device), torch.from_numpy(chosen.positions).to(device)
        ids[at] = gumbel_argmax(scaled, seeds, positions)
    return ids
