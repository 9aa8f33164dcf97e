"""Which tokens may be drawn: min-p, then top-k, then top-p of what is left (vLLM's order).

Every filter is a threshold on a row's logits, so tokens of equal logits are kept or dropped together.
"""

import numpy as np
import torch
from torch import Tensor

from .table import Draws


def keep_likely(logits_sv: Tensor, draws: Draws) -> None:
    """Put -inf, in place, over what the filters drop. `logits_sv` are scaled by temperature already."""
    _drop_unlikely(logits_sv, draws)
    vocab_size = logits_sv.shape[1]
    limited = (draws.top_k > 0) & (draws.top_k < vocab_size)
    # Only a row's likeliest are sorted when top-k says how many matter; the width depends on that row alone.
    widths = np.where(limited, 2 ** np.ceil(np.log2(np.maximum(draws.top_k, 1) + 1)), vocab_size)
    widths = np.minimum(widths, vocab_size).astype(np.int64)
    active = limited | (draws.top_p < 1.0)
    for width in np.unique(widths[active]):
        which = active & (widths == width)
        at = torch.from_numpy(which.nonzero()[0]).to(logits_sv.device)
        logits = logits_sv[at]
        logits_sv[at] = logits.masked_fill_(logits < _threshold(logits, draws.take(which), int(width)), float("-inf"))


def _drop_unlikely(logits_sv: Tensor, draws: Draws) -> None:
    """min-p: less likely than that share of the likeliest."""
    if (draws.min_p > 0.0).any():
        with np.errstate(divide="ignore"):
            share = torch.from_numpy(np.log(draws.min_p)).to(logits_sv)
        logits_sv.masked_fill_(logits_sv < logits_sv.amax(-1, keepdim=True) + share[:, None], float("-inf"))


def _threshold(logits_sv: Tensor, draws: Draws, width: int) -> Tensor:
    """The least logit that stays, [s, 1], given that the `width` largest decide."""
    device = logits_sv.device
    largest = logits_sv.topk(width, -1).values
    top_k = torch.from_numpy(np.where(draws.top_k > 0, np.minimum(draws.top_k, width), width)).to(device)
    kth = largest.gather(1, top_k[:, None] - 1)
    kept = largest.double().masked_fill_(largest < kth, float("-inf"))
    probabilities = kept.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    top_p = torch.from_numpy(np.where(draws.top_p < 1.0, draws.top_p, np.inf)).to(device)
    num_kept = ((before < top_p[:, None]) & (kept > float("-inf"))).sum(-1, keepdim=True)
    return largest.gather(1, num_kept.clamp_min(1) - 1)  # a row of NaN keeps none
