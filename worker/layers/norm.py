"""Norms."""

from torch import Tensor

from ..backends import Backend
from ..models import spec
from ..parallel import whole
from ..weights import Loader


class RmsNorm:
    def __init__(self, norm: spec.RmsNorm, loader: Loader, backend: Backend, path: str, layer: int, size: int) -> None:
        self.backend = backend
        self.weight = loader.vector(path, layer, [whole(size)])
        self.eps = norm.eps

    def after_add(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum."""
        return self.backend.add_rms_norm(delta, residual, self.weight, self.eps)
