"""Matrix products with weights."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [..., i] -> x W^T + b [..., o] for `weight` [o, i] and `bias` [o]; what can be made ready is made ready here, once. The
    weight need not be kept by the caller."""
    return partial(F.linear, weight=weight, bias=bias)
