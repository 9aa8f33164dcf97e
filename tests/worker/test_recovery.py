"""What a worker process outlives, and what it does not, over real sockets."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from quire.common.channel import encode
from quire.common.errors import EXIT_FATAL
from quire.common.messages import Heartbeat, Hello, Left, StepResult, Welcome, WorkerFault

from ..conftest import Sizes
from .plans import admit, make_plan
from .scheduler import PROMPT, Scheduler

FAILS_ONCE = """
from quire.worker.layers.mlp import GatedMLP

compute, calls = GatedMLP.__call__, 0

def failing(self, x):
    global calls
    calls += 1
    if calls == 3 + 3 + 2:  # warming up, a step, the second layer of the next
        import torch
        {error}
    return compute(self, x)

GatedMLP.__call__ = failing
"""


def one_step(there: Scheduler) -> None:
    """Of a request in row 2."""
    there.plan(0, [(2, 0, len(PROMPT), True)], admitted=[admit(2, PROMPT, [3])])
    there.expect(StepResult)


def leaving(there: Scheduler) -> list[Left]:
    """What the members say that leave this group, before each says Hello."""
    said: dict[int, Left] = {}
    back: set[int] = set()
    for identity, message in there.messages():
        if isinstance(message, Left) and message.epoch == there.epoch:
            assert there.peers[message.rank] == identity and message.rank not in back
            said[message.rank] = message
        elif isinstance(message, Hello):
            back.add(message.rank)
        if back == set(there.peers):
            return [said[rank] for rank in sorted(said)]
    raise AssertionError(f"only {back} came back")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_outlives_the_other(scheduler: Callable[..., Scheduler], expected: list[int], lost: int) -> None:
    there = scheduler(size=2)
    workers = [there.start_worker(rank) for rank in range(2)]
    there.meet()
    one_step(there)
    workers[lost].kill()
    workers[lost].wait()
    there.peers = {1 - lost: there.peers[1 - lost]}
    stayed = there.peers[1 - lost]
    there.plan(1, [(2, len(PROMPT), 1, True)])  # an exchange that nobody else takes part in
    (left,) = leaving(there)
    assert "lost the others" in left.why and not left.out_of_memory
    there.tell(Welcome(there.epoch, there.config, there.info, there.rendezvous))  # of the group that is no more
    there.expect(Hello)
    there.form_group(epoch=8)
    there.start_worker(lost)
    there.meet()
    assert there.hellos[1 - lost].fingerprint == there.info.fingerprint
    assert there.peers[1 - lost] == stayed
    assert there.continue_prompt(12) == expected


@pytest.mark.parametrize(
    ("size", "fails", "error", "words", "out_of_memory"),
    [
        (1, 0, "raise IndexError('index out of range in self')", "IndexError: index out of range", False),
        (2, 1, "torch.zeros(2) @ torch.zeros(3)", "RuntimeError", False),
        (2, 0, "torch.empty(1 << 50)", "out of memory", True),
    ],
)
def test_a_step_that_fails_costs_no_process(
    scheduler: Callable[..., Scheduler],
    expected: list[int],
    size: int,
    fails: int,
    error: str,
    words: str,
    out_of_memory: bool,
) -> None:
    """And the other rank, which waits in an exchange, leaves too."""
    there = scheduler(size=size)
    planted = FAILS_ONCE.format(error=error)
    workers = [there.start_worker(rank, planted if rank == fails else "") for rank in range(size)]
    there.meet()
    one_step(there)
    there.plan(1, [(2, len(PROMPT), 1, True)])
    said = leaving(there)
    assert len(said) == size
    assert words in said[fails].why
    assert [left.out_of_memory for left in said] == [out_of_memory and rank == fails for rank in range(size)]
    there.form_group(epoch=8)
    there.meet()
    assert {hello.fingerprint for hello in there.hellos.values()} == {there.info.fingerprint}
    assert there.continue_prompt(12) == expected
    assert [worker.poll() for worker in workers] == [None] * size


def test_a_device_that_is_lost_ends_the_process(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    error = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"
    worker = there.start_worker(planted=FAILS_ONCE.format(error=error))
    there.meet()
    one_step(there)
    there.plan(1, [(2, len(PROMPT), 1, True)])
    fault = there.expect(WorkerFault)[1]
    assert "illegal memory access" in fault.why and fault.code == EXIT_FATAL
    assert worker.wait(10) == EXIT_FATAL


def test_a_plan_that_was_lost_is_missed(scheduler: Callable[..., Scheduler], expected: list[int]) -> None:
    there = scheduler()
    there.start_worker()
    there.meet()
    one_step(there)
    # as a connection that breaks would: the frame has its number, and goes nowhere
    there.hub._conversations[there.peers[0]].header()
    there.plan(2, [(2, len(PROMPT) + 1, 1, True)])
    (left,) = leaving(there)
    assert "messages of the scheduler were lost" in left.why
    there.form_group(epoch=8)
    there.meet()
    assert there.continue_prompt(12) == expected


def test_ranks_are_killed_while_they_meet(
    scheduler: Callable[..., Scheduler], expected: list[int], sizes: Sizes
) -> None:
    """At any moment from Welcome on. Who is left is there for the replacement within seconds, without a hint."""
    there, rng = scheduler(size=2), random.Random(7)
    workers = {rank: there.start_worker(rank) for rank in range(2)}
    for trial in range(sizes.kills):
        while len(there.peers) < 2:
            there.welcome()
        time.sleep(rng.choice((0.0, 0.01, 0.03, 0.1)) * rng.random())  # the moment is what is tried
        victim = rng.randrange(2)
        workers[victim].kill()
        workers[victim].wait()
        there.form_group(epoch=there.epoch + 1)
        workers[victim] = there.start_worker(victim)
        started = time.monotonic()
        while victim not in there.peers:
            there.welcome()
        began = time.monotonic()
        there.meet()
        assert time.monotonic() - began < 10, f"trial {trial}, {began - started:.1f} s for the replacement's Hello"
        assert there.hellos[1 - victim].fingerprint in ("", there.info.fingerprint)
    assert there.continue_prompt(12) == expected


def test_a_member_hears_of_the_next_group(scheduler: Callable[..., Scheduler], expected: list[int]) -> None:
    """It says nothing of having left: the scheduler knows."""
    there = scheduler()
    there.start_worker()
    there.meet()
    one_step(there)
    there.plan(1, [(2, len(PROMPT), 1, True)])
    there.form_group(epoch=8)
    for identity, message in there.messages():
        assert not isinstance(message, Left)
        if isinstance(message, Hello):
            there.peers[0], there.hellos[0] = identity, message
            break
    there.tell(Welcome(there.epoch, there.config, there.info))
    there.meet()
    assert there.continue_prompt(12) == expected


def test_garbage_is_counted_and_told(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    there.start_worker()
    there.meet()
    conversation: Any = there.hub._conversations[there.peers[0]]
    for body in (b"\xc1", b"[1, 2", encode(make_plan(0, []))[:-1]):
        there.hub._send(there.peers[0], conversation.header() + body)
    counts = [m.bad_frames for _, m in zip(range(2), heartbeats(there), strict=False)]
    assert counts[-1] == 3
    one_step(there)


def heartbeats(there: Scheduler) -> Any:
    while True:
        yield there.expect(Heartbeat)[1]


def test_allocated_twice_is_empty_again(scheduler: Callable[..., Scheduler], expected: list[int]) -> None:
    there = scheduler()
    there.start_worker()
    there.meet(num_blocks=12)
    one_step(there)
    there.form_group(epoch=8)
    there.meet(num_blocks=6)
    assert there.continue_prompt(12) == expected
