"""The memory that holds keys and values: how large a block is, how many fit, and the tensor itself.

One tensor [block, layer, K/V, kv_head, slot, head_dim]: a block of all layers is contiguous. Block 0 is the null block:
padding writes there and nobody reads it.
"""

import math
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from ..common.config import CacheConfig
from ..common.errors import ConfigError

GPU_SHARE = 0.9
CPU_SHARE = 0.5


def block_bytes(kv_shape: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block of all layers; `kv_shape` is (layers, kv_heads, head_dim)."""
    return 2 * math.prod(kv_shape) * block_size * dtype.itemsize


def block_shape(kv_shape: tuple[int, int, int], block_size: int) -> torch.Size:
    """Of one block of all layers; `kv_shape` is (layers, kv_heads, head_dim)."""
    num_layers, num_heads, head_dim = kv_shape
    return torch.Size((num_layers, 2, num_heads, block_size, head_dim))


def available_bytes(config: CacheConfig, device: torch.device, *, num_ranks: int, peak_bytes: Callable[[], int]) -> int:
    """Bytes that this worker may use for KV, its weights being loaded.

    A GPU: its share of the whole, less what is used, less what a step needs besides, which `peak_bytes` measures by
    running one. A CPU: a share of the memory that is free, divided by the ranks, which may all be on this
    host.
    """
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if device.type == "cuda":
        peak = peak_bytes()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * (config.gpu_memory_utilization or GPU_SHARE)) - (total - free) - peak)
    return int(psutil.virtual_memory().available * (config.gpu_memory_utilization or CPU_SHARE)) // num_ranks


def allocate(
    num_blocks: int, kv_shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A cache of `num_blocks` blocks besides the null block. Raises ConfigError when memory does not hold it.

    Its content is undefined: what nobody wrote, nobody sees. A CPU's pages are thus taken as they are first used.
    """
    shape = (num_blocks + 1, *block_shape(kv_shape, block_size))
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        size = (num_blocks + 1) * block_bytes(kv_shape, block_size, dtype)
        raise ConfigError(
            f"{num_blocks} KV blocks ({size / 2**30:.1f} GiB) do not fit into the memory of {device}: "
            f"lower --kv-cache-memory, --gpu-memory-utilization or --num-gpu-blocks-override ({error!s:.200})"
        ) from None
