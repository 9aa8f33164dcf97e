"""Draws from softmax(logits) that depend on (logits, seed, position) alone: Gumbel-max over a counter-based generator.

Philox4x32-10 (Salmon et al., SC'11) in integer arithmetic, so that every backend makes the same bits. Key: the seed's
two words. Counter: (token id // 4, position's two words, 0); the four words of a result serve four neighbouring ids.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds. All words are int64 tensors with values in [0, 2**32), broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps into the sign, which the masks take away
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def gumbel(seeds_r: Tensor, positions_r: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [r, vocab_size] float32 for int64 seeds and positions [r].

    -log(-log1p(-u)) with u = (word + 1/2) / 2**32: float32 is densest near 0, which is where the winners are, so the
    race stays fair for tokens far below a probability of 2**-24.
    """
    quads = torch.arange((vocab_size + 3) // 4, device=seeds_r.device)[None]
    seeds, positions = seeds_r[:, None], positions_r[:, None]
    counter = (quads, positions & _WORD, positions >> 32 & _WORD, torch.zeros_like(quads))
    words = torch.stack(philox(counter, (seeds & _WORD, seeds >> 32 & _WORD)), -1).flatten(1)[:, :vocab_size]
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp_max_(1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def gumbel_argmax(logits_rv: Tensor, seeds_r: Tensor, positions_r: Tensor) -> Tensor:
    """One draw per row of softmax(logits): ids [r] int64. Logits are float32; -inf is never drawn."""
    return (logits_rv + gumbel(seeds_r, positions_r, logits_rv.shape[-1])).argmax(-1)
