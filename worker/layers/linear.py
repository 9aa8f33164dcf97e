"""Matrices split over the ranks: by output (no exchange), or by input (partial sums are added)."""

from collections.abc import Sequence

from torch import Tensor

from ..backends import Backend
from ..parallel import Part, whole
from ..weights import Loader


class ColumnLinear:
    """This rank's outputs of x W^T + b, for one or more matrices of the checkpoint stacked."""

    def __init__(
        self,
        loader: Loader,
        backend: Backend,
        path: str,
        layer: int,
        *,
        outputs: Sequence[Part],
        inputs: int,
        bias: bool,
    ) -> None:
        self.apply = backend.linear(
            loader.matrix(path, layer, outputs, whole(inputs)),
            loader.vector(path, layer, outputs, "bias") if bias else None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x)


class RowLinear:
    """x W^T + b where each rank holds the columns of W that go with its share of x."""

    def __init__(
        self, loader: Loader, backend: Backend, path: str, layer: int, *, outputs: int, inputs: Part, bias: bool
    ) -> None:
        self.group = loader.group
        self.apply = backend.linear(loader.matrix(path, layer, [whole(outputs)], inputs), None)
        self.bias = loader.vector(path, layer, [whole(outputs)], "bias") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        total = self.group.all_reduce(self.apply(x))
        return total if self.bias is None else total + self.bias  # once, not once per rank
