"""The worker group without sockets: who may join, when it is complete, what is said of it, who hangs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.common.errors import ConfigError
from quire.common.messages import PEER_TIMEOUT_S, PROTOCOL, Allocate, Hello, Progress, WorkerReady
from quire.scheduler.workers import STARTING_STALL, Claim, WorkerGroup

from .peers import INFO, NUM_BLOCKS, config


def group(ranks: int = 2, stall_timeout: float = 30.0) -> WorkerGroup:
    return WorkerGroup(config(ranks=ranks, stall_timeout=stall_timeout), INFO, Path("/run"), 7)


def hello(rank: int) -> Hello:
    return Hello(PROTOCOL, "worker", f"worker {rank}", rank)


def ready(rank: int) -> WorkerReady:
    return WorkerReady(rank, "fingerprint", "none", "float32", 100, 10**6)


def complete(workers: WorkerGroup, now: float = 0.0) -> None:
    for rank in range(workers.num_ranks):
        workers.join(bytes([rank]), hello(rank), now)
        workers.loaded(bytes([rank]), ready(rank))
    for _, worker in workers.members():
        worker.allocated = True


def test_memory_is_decided_once_by_all_and_then_given_to_each() -> None:
    first = group()
    first.join(b"a", hello(0), 0.0)
    assert first.loaded(b"a", ready(0)) == []
    first.join(b"b", hello(1), 0.0)
    assert first.loaded(b"b", ready(1)) == [b"a", b"b"] and first.allocate() == Allocate(7, NUM_BLOCKS, 4)
    second = first.successor(8)
    assert list(second) == [] and second.capacity == first.capacity
    second.join(b"b", hello(1), 0.0)
    assert second.loaded(b"b", ready(1)) == [b"b"] and second.allocate() == Allocate(8, NUM_BLOCKS, 4)


def test_other_weights_are_a_users_mistake() -> None:
    workers = group(1)
    workers.join(b"a", hello(0), 0.0)
    with pytest.raises(ConfigError, match="another checkpoint"):
        workers.loaded(b"a", WorkerReady(0, "other", "none", "float32", 100, 1))


@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=5))
def test_no_two_groups_share_an_epoch_or_a_place_to_meet(clock: list[int]) -> None:
    groups = [group()]
    for epoch in clock:  # which may stand still, or be set back
        groups.append(groups[-1].successor(epoch))
    epochs = [workers.epoch for workers in groups]
    assert epochs == sorted(set(epochs)) and len({workers.rendezvous for workers in groups}) == len(groups)


def test_a_rank_is_given_away_when_its_holder_has_been_silent() -> None:
    workers = group(1)
    workers.join(b"a", hello(0), 10.0)
    assert workers.rival(b"a", 0) is None and workers.rival(b"b", 0) == b"a"
    assert workers.claim(b"a", 11.0) is Claim.OPEN
    assert workers.claim(b"a", 12.0) is Claim.OPEN
    assert workers.claim(b"a", 10.0 + PEER_TIMEOUT_S + 0.1) is Claim.VACANT


def test_a_rank_stays_with_a_holder_that_is_heard_after_the_claim() -> None:
    workers = group(1)
    workers.join(b"a", hello(0), 10.0)
    assert workers.claim(b"a", 11.0) is Claim.OPEN, "heard a second ago, but it may have died since"
    workers.heard(b"a", 11.5)
    assert workers.claim(b"a", 12.0) is Claim.TAKEN
    assert workers.claim(b"a", 13.0) is Claim.OPEN, "the next one is another matter"


def test_what_is_said_of_a_group_from_the_first_to_the_next() -> None:
    workers = group()
    said = [workers.status(0.0)]
    complete(workers)
    said.append(workers.status(0.0))
    workers = workers.successor(8)
    said.append(workers.status(0.0))
    workers.join(b"a", hello(0), 0.0)
    worker = workers.heard(b"a", 0.0)
    assert worker is not None
    said.append(workers.status(0.0))
    workers.join(b"b", hello(1), 0.0)
    worker.progress = Progress("loading", 0.5, "12 of 24 MiB")
    said.append(workers.status(0.0))
    workers = workers.successor(9)
    complete(workers)
    said.append(workers.status(0.0))
    assert [(status.phase, status.progress, status.detail) for status in said] == [
        ("connecting", 0.0, "0 of 2 workers are here"),
        ("ready", 1.0, ""),
        ("recovering", 0.0, "connecting: 0 of 2 workers are here"),
        ("recovering", 0.5, "connecting: 1 of 2 workers are here"),
        ("recovering", 0.25, "loading: 12 of 24 MiB"),
        ("ready", 1.0, ""),
    ]
    assert [status.capacity is not None for status in said] == [False, True, True, True, True, True]


def test_a_group_that_never_served_goes_on_starting() -> None:
    workers = group().successor(8)
    assert workers.status(0.0).phase == "connecting" and workers.status(0.0).capacity is None


def test_silence_is_a_stall_until_a_sign_of_life() -> None:
    workers = group(stall_timeout=30.0)
    complete(workers, 100.0)
    workers.heard(b"\x00", 120.0)
    assert workers.status(129.9).phase == "ready"
    stalled = workers.status(130.1)
    assert stalled.phase == "stalled" and "30 s from rank 1 (worker 1)" in stalled.detail
    assert stalled == workers.status(140.0) and stalled.capacity is not None, "said once"
    both = workers.status(151.0)
    assert "rank 0" in both.detail and "rank 1" in both.detail
    workers.heard(b"\x00", 152.0)
    workers.heard(b"\x01", 152.0)
    assert workers.status(152.0).phase == "ready"


def test_time_in_which_the_scheduler_itself_was_stopped_is_forgiven() -> None:
    workers = group(stall_timeout=30.0)
    complete(workers, 0.0)
    assert workers.status(1000.0).phase == "stalled"
    workers.forgive(1000.0)
    assert workers.status(1000.0).phase == "ready"


def test_a_worker_that_starts_may_be_silent_for_longer() -> None:
    workers = group(stall_timeout=30.0)
    workers.join(b"a", hello(0), 0.0)
    assert workers.status(30.0 * STARTING_STALL - 1).phase == "connecting"
    assert workers.status(30.0 * STARTING_STALL + 1).phase == "stalled"


def test_a_beat_that_is_due_is_no_stall() -> None:
    workers = group(1, stall_timeout=1.0)
    complete(workers, 0.0)
    assert workers.status(1.5).phase == "ready" and workers.status(2.1).phase == "stalled"
