"""What a decoder-only model is, as data. No torch here.

A layer's `attn` and `mlp` are tagged by their types: a new mechanism (mixture of experts, latent attention) is a new
type here, a class in `worker/layers` that computes it, and a case in `worker/decoder.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    eps: float


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies divided by `factor` (https://kaiokendev.github.io/til)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, those between interpolated (arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, kw_only=True)
class Rope:
    dim: int
    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention: query heads [j * g, (j + 1) * g) read KV head j, g = num_heads / num_kv_heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None  # tokens a query sees, itself included; None: all
    qk_norm: RmsNorm | None = None  # over each head, before the rotation
    qkv_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x))"""

    width: int
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    attn: Attention
    mlp: GatedMLP
    pre_attn: RmsNorm
    pre_mlp: RmsNorm


@dataclass(frozen=True)
class Cat:
    """Our one matrix is the checkpoint's several, stacked on the output axis."""

    stems: tuple[str, ...]


Names = Mapping[str, str | Cat]  # path of our module -> stem of its tensors in a checkpoint, {i} being the layer


@dataclass(frozen=True, kw_only=True)
class Decoder:
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: RmsNorm
    tied_head: bool  # the head's matrix is the embedding's
    names: Names
    dtype: str  # of the checkpoint

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows of the layers."""
        return tuple(dict.fromkeys(layer.attn.window for layer in self.layers))

    @property
    def num_weights(self) -> int:
        """Of the matrices; the embedding's counts once more as the head's, where it is multiplied."""
        heads = sum((2 * x.attn.num_heads + 2 * x.attn.num_kv_heads) * x.attn.head_dim for x in self.layers)
        return self.hidden_size * (heads + sum(3 * x.mlp.width for x in self.layers) + self.vocab_size)
