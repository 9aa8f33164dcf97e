"""KV blocks on the device, in host memory and in a file: copied as they are told to, and found again."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.common.config import CacheConfig
from quire.common.errors import ConfigError
from quire.worker.kv_store import KvFile, KvStore, host_blocks, host_bytes
from quire.worker.plan import PlanError, read_columns

from .plans import make_plan

BLOCK = torch.Size((2, 2, 1, 4, 8))  # layer, K/V, head, slot, dim
CPU = torch.device("cpu")


def store_of(num_blocks: int, num_host: int, file: torch.Tensor | None = None) -> KvStore:
    host = host_blocks(num_host, BLOCK, torch.bfloat16, CPU)
    device = torch.zeros(num_blocks + 1, *BLOCK, dtype=torch.bfloat16)
    return KvStore(device, host, host[:0] if file is None else file)


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_made_one_after_the_other(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = KvFile(tmp_path, 0, 5, BLOCK, torch.bfloat16)
    store = store_of(6, 4, file.blocks)
    held = [float(i) for i in range(store.num_blocks)]
    for block, what in enumerate(held):
        store._block(block).fill_(what)
    for _ in range(10):
        pairs = [rng.sample(range(1, store.num_blocks), 2) for _ in range(rng.randint(0, 12))]
        for source, target in pairs:
            held[target] = held[source]
        store.copy(np.array(pairs, dtype=np.int64).reshape(-1, 2))
        for block, what in enumerate(held):
            assert (store._block(block) == what).all()
    file.close()


def test_a_file_is_found_as_it_was_left_and_begun_anew_when_it_is_another(tmp_path: Path) -> None:
    first = KvFile(tmp_path, 0, 5, BLOCK, torch.bfloat16)
    first.blocks[3].fill_(7.0)
    first.close()
    again = KvFile(tmp_path, 0, 5, BLOCK, torch.bfloat16)
    assert again.id == first.id and (again.blocks[3] == 7.0).all()
    with pytest.raises(ConfigError, match="in use by another worker"):
        KvFile(tmp_path, 0, 5, BLOCK, torch.bfloat16)
    again.close()
    ids = {first.id, KvFile(tmp_path, 1, 5, BLOCK, torch.bfloat16).id}
    for count, block, dtype in (
        (6, BLOCK, torch.bfloat16),
        (6, BLOCK[:-1], torch.bfloat16),
        (6, BLOCK[:-1], torch.half),
    ):
        other = KvFile(tmp_path, 0, count, torch.Size(block), dtype)
        other.close()
        ids.add(other.id)
    assert len(ids) == 5
    (tmp_path / "rank0.json").write_text("{")
    damaged = KvFile(tmp_path, 0, 6, BLOCK[:-1], torch.half)
    assert damaged.id not in ids
    damaged.close()


def test_a_disk_that_cannot_hold_it_is_told_of_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kv-disk-space"):
        KvFile(tmp_path, 0, 2**40, BLOCK, torch.bfloat16)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--kv-disk"):
        KvFile(tmp_path / "file", 0, 4, BLOCK, torch.bfloat16)


@pytest.mark.parametrize("copies", [[(0, 1)], [(1, 0)], [(1, -1)], [(1, 11)], [(2**31 - 1, 1)]])
def test_a_block_that_is_not_there_breaks_the_plan(copies: list[tuple[int, int]]) -> None:
    store = store_of(6, 4)
    plan = make_plan(1, [], copies=copies)
    with pytest.raises(PlanError, match=r"there are 1 to 10"):
        store.check(plan, read_columns(plan, 4))
    good = make_plan(1, [], copies=[(10, 1), (1, 10)])
    store.check(good, read_columns(good, 4))


def test_half_a_pair_breaks_the_plan() -> None:
    plan = make_plan(1, [])
    with pytest.raises(PlanError, match="pairs"):
        read_columns(
            type(plan)(**{name: getattr(plan, name) for name in plan.__struct_fields__} | {"copies": b"abcd"}), 4
        )


def test_host_memory_that_is_not_there_is_refused() -> None:
    assert host_bytes(CacheConfig(), CPU, num_ranks=1) == 0
    assert host_bytes(CacheConfig(swap_space=0.5), CPU, num_ranks=1) == 2**29
    with pytest.raises(ConfigError, match=r"--swap-space 60000 GiB"):
        host_bytes(CacheConfig(swap_space=60000.0), CPU, num_ranks=2)


def test_what_copying_takes_is_measured_where_there_is_something(tmp_path: Path) -> None:
    assert store_of(4, 0).restoring_takes() == (0.0, 0.0)
    host_s, disk_s = store_of(4, 2).restoring_takes()
    assert host_s > 0.0 == disk_s
