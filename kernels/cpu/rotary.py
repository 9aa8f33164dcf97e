"""Queries and keys normed and rotated, keys and values put into the cache: the signature of `kernels/rotary.py`, with the
keys laid out as `paged_attention.py` beside this file reads them."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..rotary import HeadNorms
from .pool import OWN, Kernel, alike, as_float, bfloats, bits_of, floats, ints, next_task, pieces
from .rms_norm import inverse_rms
from .vectors import LANES, load, shifted, splat, store

COUNT, EACH, HEAD_DIM, QKV, COS, SIN, Q_WEIGHT, K_WEIGHT, EPS, CACHE, SLOTS, Q = range(OWN, OWN + 12)
NUM_HEADS, NUM_KV, BLOCK_SLOTS, NUM_LAYERS, LAYER = range(OWN + 12, OWN + 17)


def rotate_and_write(
    qkv: Tensor,
    num_heads: int,
    angles: tuple[Tensor, Tensor],
    norms: HeadNorms | None,
    cache: Tensor,
    layer: int,
    slots_t: Tensor,
) -> Tensor:
    _, num_layers, _, num_kv, block_slots, head_dim = cache.shape
    q = qkv.new_empty(len(qkv), num_heads, head_dim)
    weights = (norms.query.data_ptr(), norms.key.data_ptr(), bits_of(norms.eps)) if norms else (0, 0, 0)
    tasks, each = pieces(len(qkv), qkv.shape[1])
    KERNELS[qkv.dtype][0](
        tasks, len(qkv), each, head_dim, qkv.data_ptr(), angles[0].data_ptr(), angles[1].data_ptr(), *weights,
        cache.data_ptr(), slots_t.data_ptr(), q.data_ptr(), num_heads, num_kv, block_slots, num_layers, layer,
    )  # fmt: skip
    return q


@njit(error_model="numpy")
def _rotated(head, token, weight, to, args):
    """One head of a token, normed if there is a weight."""
    head_dim = args[HEAD_DIM]
    half, cos, sin = head_dim // 2, floats(args[COS]), floats(args[SIN])
    scale = splat(np.float32(1.0))
    if args[Q_WEIGHT]:
        scale = splat(inverse_rms(head, 0, head_dim, as_float(args[EPS])))
    for c in range(0, half, LANES):
        first, second = load(head, c), load(head, half + c)
        if args[Q_WEIGHT]:
            first, second = first * scale * load(weight, c), second * scale * load(weight, half + c)
        cosine, sine = load(cos, token * half + c), load(sin, token * half + c)
        store(to, c, first * cosine - second * sine)
        store(to, half + c, second * cosine + first * sine)


@njit(error_model="numpy")
def _token(token, args, memory):
    head_dim, num_heads, num_kv, block_slots = args[HEAD_DIM], args[NUM_HEADS], args[NUM_KV], args[BLOCK_SLOTS]
    heads = shifted(alike(args[QKV], memory), token * (num_heads + 2 * num_kv) * head_dim)
    q = shifted(alike(args[Q], memory), token * num_heads * head_dim)
    for j in range(num_heads):
        at = j * head_dim
        _rotated(shifted(heads, at), token, alike(args[Q_WEIGHT], memory), shifted(q, at), args)
    block, slot = ints(args[SLOTS])[token] // block_slots, ints(args[SLOTS])[token] % block_slots
    first = (block * args[NUM_LAYERS] + args[LAYER]) * 2 * num_kv
    cache = alike(args[CACHE], memory)
    for j in range(num_kv):
        key = shifted(heads, (num_heads + j) * head_dim)
        value = shifted(key, num_kv * head_dim)
        _rotated(key, token, alike(args[K_WEIGHT], memory), key, args)  # in its place: nobody reads it again
        to = shifted(cache, ((first + j) * block_slots + slot // LANES * LANES) * head_dim + slot % LANES)
        for c in range(head_dim):
            to[c * LANES] = key[c]
        to = shifted(cache, ((first + num_kv + j) * block_slots + slot) * head_dim)
        for c in range(0, head_dim, LANES):
            store(to, c, load(value, c))


@njit(error_model="numpy")
def _rotate(args, memory):
    task = next_task(args)
    while task >= 0:
        for token in range(task * args[EACH], min(args[COUNT], (task + 1) * args[EACH])):
            _token(token, args, memory)
        task = next_task(args)


def _float32(args):
    _rotate(args, floats(0))


def _bfloat16(args):
    _rotate(args, bfloats(0))


KERNELS = {torch.float32: (Kernel(_float32),), torch.bfloat16: (Kernel(_bfloat16),)}
