"""Which tokens may be drawn: min-p, then top-k, then top-p of what is left (vLLM's order).

Every filter is a threshold on a row's logits, so tokens of equal logits are kept or dropped together.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def keep_likely(logits_sv: Tensor, *, min_p_s: Floats, top_k_s: Ints, top_p_s: Floats) -> None:
    """Put -inf, in place, over what the filters drop. Logits are float32, scaled by temperature already.

    Neutral are min-p 0, top-k 0 (or the vocabulary and more) and top-p 1.
    """
    _drop_unlikely(logits_sv, min_p_s)
    vocab_size = logits_sv.shape[1]
    limited = (top_k_s > 0) & (top_k_s < vocab_size)
    # Only a row's likeliest are sorted when top-k says how many matter; the width depends on that row alone.
    widths = np.where(limited, 2 ** np.ceil(np.log2(np.maximum(top_k_s, 1) + 1)), vocab_size)
    widths = np.minimum(widths, vocab_size).astype(np.int64)
    active = limited | (top_p_s < 1.0)
    for width in np.unique(widths[active]).tolist():
        which = (active & (widths == width)).nonzero()[0]
        at = torch.from_numpy(which).to(logits_sv.device)
        logits = logits_sv[at]
        threshold = _threshold(logits, top_k_s[which], top_p_s[which], width)
        logits_sv[at] = logits.masked_fill_(logits < threshold, float("-inf"))


def _drop_unlikely(logits_sv: Tensor, min_p_s: Floats) -> None:
    """min-p: less likely than that share of the likeliest."""
    if (min_p_s > 0.0).any():
        with np.errstate(divide="ignore"):
            share = torch.from_numpy(np.log(min_p_s)).to(logits_sv)
        logits_sv.masked_fill_(logits_sv < logits_sv.amax(-1, keepdim=True) + share[:, None], float("-inf"))


def _threshold(logits_sv: Tensor, top_k_s: Ints, top_p_s: Floats, width: int) -> Tensor:
    """The least logit that stays, [s, 1], given that the `width` largest decide."""
    device = logits_sv.device
    largest = logits_sv.topk(width, -1).values
    top_k = torch.from_numpy(np.where(top_k_s > 0, np.minimum(top_k_s, width), width)).to(device)
    kth = largest.gather(1, top_k[:, None] - 1)
    kept = largest.double().masked_fill_(largest < kth, float("-inf"))
    probabilities = kept.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    top_p = torch.from_numpy(np.where(top_p_s < 1.0, top_p_s, np.inf)).to(device)
    num_kept = ((before < top_p[:, None]) & (kept > float("-inf"))).sum(-1, keepdim=True)
    return largest.gather(1, num_kept.clamp_min(1) - 1)  # a row of NaN keeps none
