"""Requests whose beginning is being computed for another one wait for it, and no longer than it is."""

from array import array
from collections.abc import Callable

import pytest

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.sampling import SamplingParams
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

from .simulation import MAX_MODEL_LEN, Device

BLOCK_SIZE, NUM_BLOCKS, BUDGET = 2, 400, 12
WORTH_WAITING = 4
PROMPT = [i % 11 for i in range(30)]


class Engine:
    """A scheduler and its device, one step at a time."""

    def __init__(self) -> None:
        config = SchedulerConfig(max_num_seqs=40, max_num_batched_tokens=BUDGET)
        self.scheduler = Scheduler(config, CacheConfig(block_size=BLOCK_SIZE), NUM_BLOCKS, MAX_MODEL_LEN)
        self.scheduler.kv.worth_waiting = WORTH_WAITING
        self.device = Device(NUM_BLOCKS, BLOCK_SIZE, 40, BUDGET)
        self.computed = 0

    def add(self, id: int, prompt: list[int], priority: int = 0) -> Request:
        sampling = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)
        request = Request(id, array("i", prompt), len(prompt), sampling, priority)
        assert self.scheduler.rejection(request) is None and self.scheduler.add(request) is None
        return request

    def step(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.computed += step.num_tokens
        self.scheduler.update(self.device.run(step.plan))
        self.scheduler.check()
        return True

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self.step(), "nothing can be done"


def test_what_many_ask_at_once_is_computed_once() -> None:
    engine = Engine()
    requests = [engine.add(id, [*PROMPT, id % 3]) for id in range(30)]
    engine.until(lambda: all(request.finish for request in requests))
    shared = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
    rest = len(PROMPT) + 1 - shared
    assert engine.computed <= shared + 30 * (rest + 4)


def test_others_go_ahead_meanwhile() -> None:
    engine = Engine()
    first, second = engine.add(1, PROMPT), engine.add(2, PROMPT)
    engine.step()
    other = engine.add(3, [12])
    engine.until(lambda: other.row is not None)
    assert first.row is not None and second.row is None


@pytest.mark.parametrize("how", ["aborted", "preempted", "failed"])
def test_who_waits_for_what_does_not_come_computes_it(how: str) -> None:
    engine = Engine()
    first, second = engine.add(1, PROMPT), engine.add(2, PROMPT)
    engine.step()
    assert first.row is not None and second.row is None
    if how == "aborted":
        engine.scheduler.abort(first)
    elif how == "preempted":
        engine.scheduler._preempt(first)
    else:
        step = engine.scheduler.schedule()
        assert step is not None and first.row is not None
        engine.scheduler.fault(step.plan.step, first.row, "NaN")
        engine.scheduler.update(engine.device.run(step.plan))
    engine.until(lambda: second.finish is not None)


def test_nobody_waits_for_who_comes_after_it() -> None:
    """The worse priority may not get on for long."""
    engine = Engine()
    worse = engine.add(1, PROMPT, priority=1)
    engine.step()
    engine.step()
    better = engine.add(2, PROMPT, priority=0)
    engine.step()
    assert worse.row is not None and better.row is not None and better.computed > 0


def test_nobody_waits_for_little() -> None:
    engine = Engine()
    prompt = PROMPT[: WORTH_WAITING // 2]
    first, second = engine.add(1, prompt), engine.add(2, prompt)
    engine.step()
    assert first.row is not None and second.row is not None
