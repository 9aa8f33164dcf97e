"""The largest logit of each row: the signature of `largest` in `kernels/sampling.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import sampling as reference
from .pool import OWN, Kernel, floats, ints, next_task
from .vectors import LANES, first_equal, larger, load, splat
from .vectors import largest as largest_lane

WIDTH, LOGITS, IDS, TOPS = range(OWN, OWN + 4)


def largest(logits_sv: Tensor) -> tuple[Tensor, Tensor]:
    count, width = logits_sv.shape
    if width < LANES:
        return reference.largest(logits_sv)
    logits_sv = logits_sv.contiguous()
    ids, tops = torch.empty(count, dtype=torch.int64), torch.empty(count)
    _LARGEST(count, width, logits_sv.data_ptr(), ids.data_ptr(), tops.data_ptr())
    return ids, tops.isnan()


@njit(error_model="numpy")
def _first_largest(x, at, width):
    """Its index, and itself: NaN, and an index that means nothing, if there is one."""
    tops = splat(np.float32(-np.inf))
    for i in range(0, width, LANES):
        tops = larger(tops, load(x, at + min(i, width - LANES)))  # the last vector overlaps the one before it
    top = largest_lane(tops)
    for i in range(0, width, LANES):
        c = min(i, width - LANES)
        lane = first_equal(load(x, at + c), top)
        if lane < LANES:
            return c + lane, top
    return 0, top


def _rows(args):
    width, x, ids, tops = args[WIDTH], floats(args[LOGITS]), ints(args[IDS]), floats(args[TOPS])
    task = next_task(args)
    while task >= 0:
        ids[task], tops[task] = _first_largest(x, task * width, width)
        task = next_task(args)


_LARGEST = Kernel(_rows)
KERNELS = {torch.float32: (_LARGEST,), torch.bfloat16: (_LARGEST,)}
