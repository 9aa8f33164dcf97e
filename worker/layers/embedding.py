"""The vocabulary, split over the ranks by rows: ids to vectors, and vectors to logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import ConfigError
from ..backends import Backend
from ..parallel import Part, whole
from ..weights import Loader


def _vocabulary(loader: Loader, path: str, vocab_size: int, hidden_size: int) -> tuple[Part, Tensor]:
    part = loader.group.share(vocab_size)
    if not part.mine:
        raise ConfigError(f"--tensor-parallel-size {loader.group.size} is more than the vocabulary of {vocab_size}")
    return part, loader.matrix(path, 0, [part], whole(hidden_size))


class Embedding:
    def __init__(self, loader: Loader, vocab_size: int, hidden_size: int) -> None:
        self.group = loader.group
        self.part, self.weight = _vocabulary(loader, "embed", vocab_size, hidden_size)

    def __call__(self, ids_t: Tensor) -> Tensor:
        """ids [t] int64, all in the vocabulary -> [t, d]"""
        if self.group.size == 1:
            return F.embedding(ids_t, self.weight)
        local = ids_t - self.part.mine.start
        ours = (local >= 0) & (local < len(self.part.mine))
        vectors = F.embedding(torch.where(ours, local, 0), self.weight)
        return self.group.all_reduce(torch.where(ours[:, None], vectors, 0))


class Head:
    """Logits. `tied` is the embedding whose matrix the head shares, if it does."""

    def __init__(
        self, loader: Loader, backend: Backend, vocab_size: int, hidden_size: int, tied: Embedding | None
    ) -> None:
        self.group = loader.group
        weight = tied.weight if tied else _vocabulary(loader, "head", vocab_size, hidden_size)[1]
        self.apply = backend.linear(weight, None)
        self.vocab_size = vocab_size

    def __call__(self, x_rd: Tensor) -> Tensor:
        """[r, d] -> [r, v] float32, whole on every rank"""
        return self.group.gather_columns(self.apply(x_rd), self.vocab_size).float()
