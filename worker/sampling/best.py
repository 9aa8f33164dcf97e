"""The likeliest tokens of rows that ask for them, as a beam search does, or how likely the one is that was drawn."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.sampling import likeliest, logprobs_of
from ..plan import Ints


@dataclass(frozen=True, slots=True)
class Best:
    """Of m rows, on the device."""

    ids: Tensor  # [m, most] int64, likeliest first
    logprobs: Tensor  # [m, most] float32
    counts: Ints  # how many each row has asked for; `most` is the largest of them

    def read(self) -> tuple[bytes, bytes]:
        """The columns of `StepResult`. Waits for the device."""
        wanted = np.arange(self.ids.shape[1]) < self.counts[:, None]
        ids, logprobs = self.ids.cpu().numpy(), self.logprobs.cpu().numpy()
        return ids[wanted].astype("<i4").tobytes(), logprobs[wanted].astype("<f4").tobytes()


def best(logits_sv: Tensor, drawn: Tensor, counts: Ints) -> Best | None:
    """`counts` [s] says how many each row asks for; None when all are 0. One is that which was `drawn`, of ids [s]."""
    if not counts.any():
        return None
    at = counts.nonzero()[0]
    asked = counts[at]
    where = torch.from_numpy(at).to(logits_sv.device)
    logits, mine = logits_sv[where], drawn[where]
    ids, logprobs = likeliest(logits, int(asked.max()))
    single = torch.from_numpy(asked == 1).to(logits_sv.device)
    ids[:, 0] = torch.where(single, mine, ids[:, 0])
    logprobs[:, 0] = torch.where(single, logprobs_of(logits, mine), logprobs[:, 0])
    return Best(ids, logprobs, asked)
