"""Root-mean-square norm behind the residual add: the signature of `kernels/rms_norm.py`. Computed in float32 and rounded
once, where the reference rounds before it multiplies by the weight."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import rms_norm as reference
from .pool import OWN, Kernel, alike, as_float, bfloats, bits_of, floats, next_task, pieces
from .vectors import LANES, fma, load, splat, store, total, within

COUNT, EACH, WIDTH, X, WEIGHT, EPS, OUT, RESIDUAL, SUM = range(OWN, OWN + 9)


def add_rms_norm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Both are [t, d], contiguous."""
    count, width = delta.shape
    if width < LANES:
        return reference.add_rms_norm(delta, residual, weight, eps)
    out, summed = torch.empty_like(delta), torch.empty_like(delta)
    tasks, each = pieces(count, width)
    KERNELS[delta.dtype][0](
        tasks, count, each, width, delta.data_ptr(), weight.data_ptr(), bits_of(eps), out.data_ptr(),
        residual.data_ptr(), summed.data_ptr(),
    )  # fmt: skip
    return out, summed


@njit(error_model="numpy")
def inverse_rms(x, at, width, eps):
    """Of x[at : at + width]."""
    squares = splat(np.float32(0.0))
    for c in range(0, width - LANES + 1, LANES):
        value = load(x, at + c)
        squares = fma(value, value, squares)
    rest = width % LANES
    if rest > 0:
        value = within(load(x, at + width - LANES), LANES - rest, LANES, np.float32(0.0))
        squares = fma(value, value, squares)
    return np.float32(1.0) / np.sqrt(total(squares) / np.float32(width) + eps)


@njit(error_model="numpy")
def _norm(x, row, args, memory):
    width, weight, out = args[WIDTH], alike(args[WEIGHT], memory), alike(args[OUT], memory)
    scale = splat(inverse_rms(x, row * width, width, as_float(args[EPS])))
    for i in range(0, width, LANES):
        c = min(i, width - LANES)  # the last vector overlaps the one before it
        store(out, row * width + c, load(x, row * width + c) * scale * load(weight, c))


@njit(error_model="numpy")
def _add_norms(args, memory):
    x, residual, summed, width = (
        alike(args[X], memory),
        alike(args[RESIDUAL], memory),
        alike(args[SUM], memory),
        args[WIDTH],
    )
    task = next_task(args)
    while task >= 0:
        for row in range(task * args[EACH], min(args[COUNT], (task + 1) * args[EACH])):
            for i in range(0, width, LANES):
                c = row * width + min(i, width - LANES)
                store(summed, c, load(x, c) + load(residual, c))
            _norm(summed, row, args, memory)
        task = next_task(args)


def _float32(args):
    _add_norms(args, floats(0))


def _bfloat16(args):
    _add_norms(args, bfloats(0))


KERNELS = {torch.float32: (Kernel(_float32),), torch.bfloat16: (Kernel(_bfloat16),)}
