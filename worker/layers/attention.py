"""Grouped-query attention over the paged cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ..backends import Backend
from ..batch import Batch
from ..models import spec
from ..parallel import Group, Part
from ..weights import Loader
from .linear import ColumnLinear, RowLinear
from .norm import RmsNorm
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
        self.heads = [len(heads.queries.mine), len(heads.kv.mine), len(heads.kv.mine)]
        self.scale = attn.head_dim**-0.5
        self.qkv = ColumnLinear(
            loader, "attn.qkv", layer, outputs=[queries, kv, kv], inputs=hidden_size, bias=attn.qkv_bias
        )
        self.out = RowLinear(loader, "attn.out", layer, outputs=hidden_size, inputs=queries, bias=attn.out_bias)
        self.q_norm = self.k_norm = None
        if attn.qk_norm:
            self.q_norm = RmsNorm(attn.qk_norm, loader, backend, "attn.q_norm", layer, attn.head_dim)
            self.k_norm = RmsNorm(attn.qk_norm, loader, backend, "attn.k_norm", layer, attn.head_dim)

    @property
    def num_kv_heads(self) -> int:
        return self.heads[1]

    def __call__(self, x_td: Tensor, angles: Angles, batch: Batch, cache: Tensor) -> Tensor:
        qkv = self.qkv(x_td).view(len(x_td), -1, self.spec.head_dim)
        q, k, v = torch.split(qkv, self.heads, 1)
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.backend.rope(q, *angles), self.backend.rope(k, *angles)
        self.backend.kv_write(k, v, cache, self.layer, batch.slots_t)
        plan = batch.attention[self.spec.window]
        attended = self.backend.paged_attention(q, cache, self.layer, plan, self.scale)
        return self.out(attended.flatten(1))
