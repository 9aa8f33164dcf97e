"""A spec, made to compute. The one place that knows how layers are wired."""

from collections.abc import Callable

import torch
from torch import Tensor

from .backends import Backend
from .batch import Batch
from .layers.attention import Attention
from .layers.embedding import Embedding, Head
from .layers.mlp import GatedMLP
from .layers.norm import RmsNorm
from .layers.rope import Angles, RopeTable
from .models import spec
from .weights import Loader


class Block:
    """One layer. What flows between blocks is (delta, residual), their sum being the stream: so every addition is part
    of the norm that follows it."""

    def __init__(self, layer: spec.Layer, loader: Loader, backend: Backend, i: int, hidden_size: int) -> None:
        self.rope = layer.attn.rope
        self.pre_attn = RmsNorm(layer.pre_attn, loader, backend, "pre_attn", i, hidden_size)
        self.attn = Attention(layer.attn, loader, backend, i, hidden_size)
        self.pre_mlp = RmsNorm(layer.pre_mlp, loader, backend, "pre_mlp", i, hidden_size)
        self.mlp = GatedMLP(layer.mlp, loader, backend, i, hidden_size)

    def __call__(
        self, delta: Tensor, residual: Tensor, angles: Angles, batch: Batch, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.pre_attn.after_add(delta, residual)
        x, residual = self.pre_mlp.after_add(self.attn(x, angles, batch, cache), residual)
        return self.mlp(x), residual


class Decoder:
    """This rank's share of a model. Pulls every weight when it is constructed (ConfigError for one that is not there).

    `max_positions` bounds the positions that may ever be computed.
    """

    def __init__(self, model: spec.Decoder, loader: Loader, backend: Backend, max_positions: int) -> None:
        self.spec, self.backend = model, backend
        self.group, self.dtype, self.device = loader.group, loader.dtype, loader.device
        self.embed = Embedding(loader, model.vocab_size, model.hidden_size)
        self.blocks = [Block(layer, loader, backend, i, model.hidden_size) for i, layer in enumerate(model.layers)]
        self.norm = RmsNorm(model.norm, loader, backend, "norm", 0, model.hidden_size)
        self.head = Head(loader, backend, model.vocab_size, model.hidden_size, self.embed if model.tied_head else None)
        ropes = dict.fromkeys(layer.attn.rope for layer in model.layers)
        self.angles: dict[spec.Rope, Callable[[Tensor], Angles]] = {
            rope: RopeTable(rope, max_positions, loader.device) for rope in ropes
        }

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(layers, KV heads of this rank, head dim), of which the cache is made."""
        shapes = {(block.attn.num_kv_heads, block.attn.spec.head_dim) for block in self.blocks}
        assert len(shapes) == 1, f"one cache holds every layer, and these differ in (KV heads, head dim): {shapes}"
        return len(self.blocks), *shapes.pop()

    def forward(self, batch: Batch, cache: Tensor, between: Callable[[], None] = lambda: None) -> Tensor:
        """Compute the step's tokens, writing their KV to `cache`; the hidden states [t, d]. `between` is called before
        each layer."""
        angles = {rope: table(batch.positions_t) for rope, table in self.angles.items()}
        delta = self.embed(batch.ids_t)
        residual = torch.zeros_like(delta)
        for block in self.blocks:
            between()
            delta, residual = block(delta, residual, angles[block.rope], batch, cache)
        return self.norm.after_add(delta, residual)[0]
