"""Put the keys and values of a step into the paged cache."""

import torch
from torch import Tensor


def kv_write(k_tnh: Tensor, v_tnh: Tensor, cache: Tensor, layer: int, slots_t: Tensor) -> None:
    """Write k and v [t, kv_heads, h] of one layer, in place.

    `cache` is [block, layer, 2, kv_head, slot, h], contiguous; `slots_t` [t] int64 is block * slots per block + slot.
    Padding tokens name slots of block 0, which nobody reads.
    """
    _, num_layers, _, num_heads, block_slots, head_dim = cache.shape
    block, slot = slots_t // block_slots, slots_t % block_slots
    heads = torch.arange(num_heads, device=cache.device)
    keys = (((block * num_layers + layer) * 2 * num_heads)[:, None] + heads) * block_slots + slot[:, None]
    flat = cache.view(-1, head_dim)
    flat.index_copy_(0, keys.view(-1), k_tnh.reshape(-1, head_dim))
    flat.index_copy_(0, (keys + num_heads * block_slots).view(-1), v_tnh.reshape(-1, head_dim))
