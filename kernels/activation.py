"""Gated activations."""

import torch
from torch import Tensor


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up for x [t, 2 * w], gate in the first half: [t, w] in x's dtype, computed in float32.

    Written with exp: torch's own silu rounds an element differently in the tail of a vector loop on a CPU, so that a
    row's result would depend on how many rows come before it.
    """
    gate, up = x.float().chunk(2, -1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(x.dtype)
