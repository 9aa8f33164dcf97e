"""Matrices split over the ranks: by output (no exchange), or by input (partial sums are added)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..parallel import Part, whole
from ..weights import Loader


class ColumnLinear:
    """This rank's outputs of x W^T + b, for one or more matrices of the checkpoint stacked."""

    def __init__(
        self, loader: Loader, path: str, layer: int, *, outputs: Sequence[Part], inputs: int, bias: bool
    ) -> None:
        self.weight = loader.matrix(path, layer, outputs, whole(inputs))
        self.bias = loader.vector(path, layer, outputs, "bias") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear:
    """x W^T + b where each rank holds the columns of W that go with its share of x."""

    def __init__(self, loader: Loader, path: str, layer: int, *, outputs: int, inputs: Part, bias: bool) -> None:
        self.group = loader.group
        self.weight = loader.matrix(path, layer, [whole(outputs)], inputs)
        self.bias = loader.vector(path, layer, [whole(outputs)], "bias") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        total = self.group.all_reduce(F.linear(x, self.weight))
        return total if self.bias is None else total + self.bias  # once, not once per rank
