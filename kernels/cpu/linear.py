"""x W^T + b by oneDNN, whose order of the matrix is made once: the signature of `kernels/linear.py`.

Against torch's own product, which reorders a bfloat16 matrix at each call and leaves float32 to MKL, one step of a
135 M-parameter model takes 0.7 (1 row) to 0.97 (2048 rows) of the time in bfloat16, 0.3 to 0.6 in float32 (AMD, 2 cores).
From 2 rows on a row's bits do not depend on how many rows there are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TYPICAL_ROWS = 32  # what the order is chosen for; another number of rows is as quick with it


def is_supported(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch compute such a product."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    product = torch.ops.mkldnn._linear_pointwise.default

    def apply(x: Tensor) -> Tensor:
        result: Tensor = product(x, packed, bias, "none", [], "")
        return result

    return apply
