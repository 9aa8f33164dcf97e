"""Grouped-query attention over the paged cache."""

from dataclasses import dataclass

from torch import Tensor

from ...common.errors import ConfigError
from ...kernels.rotary import HeadNorms
from ..backends import Backend
from ..batch import Batch
from ..models import spec
from ..parallel import Group, Part, whole
from ..weights import Loader
from .linear import ColumnLinear, RowLinear
from .rope import Angles


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank. Its query heads divide evenly among its KV heads."""

    queries: Part
    kv: Part


def share_heads(attn: spec.Attention, group: Group) -> HeadShare:
    """Whole KV heads with all their queries, in shares that differ by at most one. With more ranks than KV heads,
    several ranks hold a copy of one KV head each and divide its queries."""
    heads, kv_heads = attn.num_heads, attn.num_kv_heads
    if group.size > heads:
        raise ConfigError(f"--tensor-parallel-size {group.size} is more than the model's {heads} attention heads")
    per_kv = heads // kv_heads
    if group.size <= kv_heads:
        kv = group.share(kv_heads)
        return HeadShare(Part(heads, range(kv.mine.start * per_kv, kv.mine.stop * per_kv)), kv)
    owner = [rank * kv_heads // group.size for rank in range(group.size)]
    head = owner[group.rank]
    among = Group(group.rank - owner.index(head), owner.count(head))
    mine = among.share(per_kv).mine
    first = head * per_kv
    return HeadShare(Part(heads, range(first + mine.start, first + mine.stop)), Part(kv_heads, range(head, head + 1)))


def _features(heads: Part, head_dim: int) -> Part:
    return Part(heads.total * head_dim, range(heads.mine.start * head_dim, heads.mine.stop * head_dim))


class Attention:
    def __init__(self, attn: spec.Attention, loader: Loader, backend: Backend, layer: int, hidden_size: int) -> None:
        heads = share_heads(attn, loader.group)
        queries, kv = _features(heads.queries, attn.head_dim), _features(heads.kv, attn.head_dim)
        self.spec = attn
        self.backend = backend
        self.layer = layer
        self.num_heads, self.num_kv_heads = len(heads.queries.mine), len(heads.kv.mine)
        self.scale = attn.head_dim**-0.5
        self.qkv = ColumnLinear(
            loader, backend, "attn.qkv", layer, outputs=[queries, kv, kv], inputs=hidden_size, bias=attn.qkv_bias
        )
        self.out = RowLinear(
            loader, backend, "attn.out", layer, outputs=hidden_size, inputs=queries, bias=attn.out_bias
        )
        self.norms = None
        if attn.qk_norm:
            query, key = (loader.vector(path, layer, [whole(attn.head_dim)]) for path in ("attn.q_norm", "attn.k_norm"))
            self.norms = HeadNorms(query, key, attn.qk_norm.eps)

    def __call__(self, x_td: Tensor, angles: Angles, batch: Batch, cache: Tensor) -> Tensor:
        qkv = self.qkv(x_td)
        q = self.backend.rotate_and_write(qkv, self.num_heads, angles, self.norms, cache, self.layer, batch.slots_t)
        plan = batch.attention[self.spec.window]
        attended = self.backend.paged_attention(q, cache, self.layer, plan, self.scale)
        return self.out(attended.flatten(1))
