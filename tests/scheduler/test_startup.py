"""Phases and block counts of a start."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.common.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from quire.common.errors import ConfigError
from quire.common.messages import PHASES, Progress, WorkerReady
from quire.scheduler import startup
from quire.scheduler.peers import Worker


def ready(rank: int = 0, available: int = 1000, block: int = 10) -> WorkerReady:
    return WorkerReady(rank, "fingerprint", "cpu", "float32", block, available)


def engine(cache: CacheConfig | None = None, **scheduler: int) -> EngineConfig:
    return EngineConfig(cache=cache or CacheConfig(block_size=4), scheduler=SchedulerConfig(**scheduler))


def test_phases_follow_the_worker_that_is_furthest_behind() -> None:
    first, second = Worker(0, "first"), Worker(1, "second")
    seen = [startup.phase([], 2), startup.phase([first], 2), startup.phase([first, second], 2)]
    first.progress = Progress("loading", 0.5, "model-1.safetensors")
    seen.append(startup.phase([first, second], 2))
    first.ready = ready()
    seen.append(startup.phase([first, second], 2))
    second.ready = ready(1)
    seen.append(startup.phase([first, second], 2))
    first.progress = Progress("warming up", 0.0)
    second.allocated = True
    seen.append(startup.phase([first, second], 2))
    assert [(status.phase, status.progress) for status in seen] == [
        ("connecting", 0.0),
        ("connecting", 0.5),
        ("loading", 0.0),
        ("loading", 0.25),
        ("loading", 0.5),
        ("allocating", 0.0),
        ("warming up", 0.5),
    ]
    assert seen[3].detail == "model-1.safetensors"


@given(st.lists(st.tuples(st.floats(), st.sampled_from(PHASES), st.booleans(), st.booleans()), max_size=4))
def test_progress_is_a_share_whatever_workers_say(reports: list[tuple[float, str, bool, bool]]) -> None:
    workers = [
        Worker(rank, "", Progress(phase, fraction), ready(rank) if loaded else None, loaded and allocated)
        for rank, (fraction, phase, loaded, allocated) in enumerate(reports)
    ]
    status = startup.phase(workers, 4)
    assert 0.0 <= status.progress <= 1.0 and status.phase in PHASES[:4]


def test_the_smallest_worker_decides() -> None:
    assert startup.num_blocks([ready(0, 1000), ready(1, 505)], engine(), 40) == 50


def test_no_more_than_can_be_used() -> None:
    assert startup.num_blocks([ready(0, 10**9)], engine(max_num_seqs=3), 40) == 30


def test_an_override_is_taken_at_its_word() -> None:
    cache = CacheConfig(block_size=4, num_gpu_blocks_override=70)
    assert startup.num_blocks([ready()], engine(cache, max_num_seqs=1), 40) == 70


@pytest.mark.parametrize(
    ("available", "override", "words"),
    [
        (90, None, ("holds 36 tokens", "one context may have 40", "--max-model-len to 36", "--kv-cache-memory")),
        (5, None, ("holds 0 tokens", "raise the memory")),
        (-100, None, ("holds 0 tokens", "raise the memory")),
        (1000, 9, ("--max-model-len to 36", "--num-gpu-blocks-override to 10")),
    ],
)
def test_one_context_must_fit(available: int, override: int | None, words: tuple[str, ...]) -> None:
    config = engine(CacheConfig(block_size=4, num_gpu_blocks_override=override))
    with pytest.raises(ConfigError) as raised:
        startup.num_blocks([ready(0, available)], config, 40)
    assert all(word in str(raised.value) for word in words), raised.value


def test_where_the_ranks_meet(tmp_path: Path) -> None:
    assert startup.rendezvous(EngineConfig(), tmp_path, 5) == ""
    two = EngineConfig(parallel=ParallelConfig(tensor_parallel_size=2))
    assert startup.rendezvous(two, tmp_path, 5) == f"file://{tmp_path}/rendezvous-5"
    hosts = EngineConfig(parallel=ParallelConfig(tensor_parallel_size=2, master_addr="10.0.0.1", master_port=7))
    assert startup.rendezvous(hosts, tmp_path, 5) == "tcp://10.0.0.1:7"
