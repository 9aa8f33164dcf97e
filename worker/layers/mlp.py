"""Feed-forward layers."""

from torch import Tensor

from ...common.errors import ConfigError
from ..backends import Backend
from ..models import spec
from ..weights import Loader
from .linear import ColumnLinear, RowLinear


class GatedMLP:
    def __init__(self, mlp: spec.GatedMLP, loader: Loader, backend: Backend, layer: int, hidden_size: int) -> None:
        width = loader.group.share(mlp.width)
        if not width.mine:
            raise ConfigError(f"--tensor-parallel-size {loader.group.size} is more than the MLP's width of {mlp.width}")
        self.backend = backend
        self.up = ColumnLinear(
            loader, backend, "mlp.up", layer, outputs=[width, width], inputs=hidden_size, bias=mlp.bias
        )
        self.down = RowLinear(loader, backend, "mlp.down", layer, outputs=hidden_size, inputs=width, bias=mlp.bias)

    def __call__(self, x_td: Tensor) -> Tensor:
        return self.down(self.backend.silu_mul(self.up(x_td)))
