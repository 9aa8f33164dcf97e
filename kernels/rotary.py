"""What lies between the projection of queries, keys and values and attention: norms of heads, rotation, the cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from .kv_write import kv_write
from .rms_norm import rms_norm
from .rope import rope


class HeadNorms(NamedTuple):
    """Root-mean-square norms of each head, before the rotation; weights [h]."""

    query: Tensor
    key: Tensor
    eps: float


def rotate_and_write(
    qkv: Tensor,
    num_heads: int,
    angles: tuple[Tensor, Tensor],
    norms: HeadNorms | None,
    cache: Tensor,
    layer: int,
    slots_t: Tensor,
) -> Tensor:
    """Of a step's projections `qkv` [t, (num_heads + 2 * kv_heads) * h] the queries, normed and rotated, [t, num_heads, h];
    keys, likewise, and values go into the cache, in place, as `kv_write` says. `qkv` may be overwritten.
    """
    num_kv, head_dim = cache.shape[3], cache.shape[5]
    q, k, v = torch.split(qkv.view(len(qkv), -1, head_dim), [num_heads, num_kv, num_kv], 1)
    if norms:
        q, k = rms_norm(q, norms.query, norms.eps), rms_norm(k, norms.key, norms.eps)
    kv_write(rope(k, *angles), v, cache, layer, slots_t)
    return rope(q, *angles)
