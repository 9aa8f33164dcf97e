"""Gated activations: the signatures and meanings of `kernels/activation.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import activation as reference
from .pool import OWN, Kernel, alike, bfloats, floats, next_task, pieces
from .vectors import LANES, exp, load, splat, store

COUNT, EACH, WIDTH, X, OUT = range(OWN, OWN + 5)


def silu_mul(x: Tensor) -> Tensor:
    """x is contiguous."""
    count, width = len(x), x.shape[1] // 2
    if width < LANES:
        return reference.silu_mul(x)
    out = x.new_empty(count, width)
    tasks, each = pieces(count, width)
    KERNELS[x.dtype][0](tasks, count, each, width, x.data_ptr(), out.data_ptr())
    return out


@njit(error_model="numpy")
def _silu_mul(args, memory):
    width, x, out = args[WIDTH], alike(args[X], memory), alike(args[OUT], memory)
    one, zero = splat(np.float32(1.0)), splat(np.float32(0.0))
    task = next_task(args)
    while task >= 0:
        for row in range(task * args[EACH], min(args[COUNT], (task + 1) * args[EACH])):
            for i in range(0, width, LANES):
                c = min(i, width - LANES)  # the last vector overlaps the one before it
                gate, up = load(x, 2 * row * width + c), load(x, (2 * row + 1) * width + c)
                store(out, row * width + c, gate / (one + exp(zero - gate)) * up)
        task = next_task(args)


def _float32(args):
    _silu_mul(args, floats(0))


def _bfloat16(args):
    _silu_mul(args, bfloats(0))


KERNELS = {torch.float32: (Kernel(_float32),), torch.bfloat16: (Kernel(_bfloat16),)}
