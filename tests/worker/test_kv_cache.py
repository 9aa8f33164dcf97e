"""How much memory the KV cache is given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quire.common.config import CacheConfig, ModelConfig
from quire.worker import kv_cache
from quire.worker.loading import load_decoder
from quire.worker.parallel import Group
from quire.worker.runner import peak_bytes

CPU = torch.device("cpu")


def never() -> int:
    raise AssertionError("measured without need")


def available(device: torch.device = CPU, *, num_ranks: int = 1, peak: Callable[[], int] = never, **config: Any) -> int:
    return kv_cache.available_bytes(CacheConfig(**config), device, num_ranks=num_ranks, peak_bytes=peak)


def test_a_cpu_gives_a_share_of_what_is_free_to_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available() == 500
    assert available(num_ranks=2, gpu_memory_utilization=0.8) == 400
    assert available(num_ranks=2, kv_cache_memory=123) == 123


def test_a_gpu_gives_its_share_less_what_is_used_and_what_a_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu = torch.device("cuda", 0)
    assert available(gpu, peak=lambda: 50) == 900 - 300 - 50
    assert available(gpu, peak=lambda: 50, gpu_memory_utilization=0.2) == 0


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert kv_cache.block_bytes((3, 2, 16), 8, torch.bfloat16) == 3 * 2 * 2 * 16 * 8 * 2
    assert kv_cache.allocate(4, (3, 2, 16), 8, torch.bfloat16, CPU).nbytes == 5 * 3 * 2 * 2 * 16 * 8 * 2


def test_what_a_step_needs_is_measured_with_every_row_sampled(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for sampling must be left when the cache is sized, or a busy step would run out of it."""
    sampled, readings = [], iter([100, 700])
    decoder = load_decoder(checkpoint("llama"), ModelConfig(), Group(), CPU, block_size=8, max_model_len=64)
    sample = decoder.backend.sample

    def spy(logits: torch.Tensor, *rest: Any) -> Any:
        sampled.append(tuple(logits.shape))
        return sample(logits, *rest)

    decoder.backend = replace(decoder.backend, sample=spy)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: next(readings))
    assert peak_bytes(decoder, num_rows=5, max_len=64, block_size=8, num_tokens=100) == 600
    assert sampled == [(5, 320)]
