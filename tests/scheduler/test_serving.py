"""Between wire and scheduler, without sockets: who is charged, who is told, when the books are looked at."""

from collections.abc import Iterator

import pytest

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import Output, Quota, StepResult, Submit, pack
from quire.common.sampling import SamplingParams
from quire.scheduler.recorder import Recorder
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.serving import AUDITED_AT_ONCE, Serving

from .peers import INFO

CLIENT = b"client"


def serving(num_blocks: int = 100, depth: int = 2, **config: int) -> Serving:
    scheduler = Scheduler(SchedulerConfig(**config), CacheConfig(block_size=4), num_blocks, 64)
    return Serving(scheduler, INFO, Recorder("test", caching=True), depth)


def submit(id: int, *, prompt: int = 3, max_tokens: int = 4, **more: object) -> Submit:
    return Submit(id, pack([5] * prompt), SamplingParams(max_tokens=max_tokens, seed=0), **more)  # type: ignore[arg-type]


def steps(engine: Serving, now: float = 0.0) -> Iterator[None]:
    """One after the other, until there is nothing to do."""
    while (plan := engine.plan(now)) is not None:
        count = sum(plan.samples)
        engine.result(StepResult(plan.epoch, plan.step, pack([1] * count), pack([9] * count)), now)
        yield


def told(engine: Serving) -> list[Output]:
    return [output for _, outputs in engine.take_outputs() for output in outputs.outputs]


def test_a_leak_is_found_in_the_idle_time_after_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serving(3 * AUDITED_AT_ONCE)
    looked_at: list[range] = []
    check = engine.scheduler.check
    monkeypatch.setattr(engine.scheduler, "check", lambda blocks: (looked_at.append(blocks), check(blocks)))
    for _ in range(5):
        engine.audit()
    assert [block for blocks in looked_at for block in blocks] == list(range(1, 3 * AUDITED_AT_ONCE + 1))
    assert max(map(len, looked_at)) == AUDITED_AT_ONCE
    looked_at.clear()
    engine.submit(CLIENT, submit(1), 0.0)
    engine.audit()
    assert not looked_at, "there is work to do"
    for _ in steps(engine):
        pass
    engine.scheduler.kv.pool._refs[2 * AUDITED_AT_ONCE + 5] = 1
    for _ in range(2):
        engine.audit()
    with pytest.raises(AssertionError, match=f"block {2 * AUDITED_AT_ONCE + 5} counts"):
        engine.audit()


def test_outputs_are_charged_while_they_come() -> None:
    engine = serving()
    quota = Quota(tokens=10)
    engine.submit(CLIENT, submit(1, prompt=3, max_tokens=20, tenant="a", quota=quota), 0.0)
    running = steps(engine)
    for _ in range(6):
        next(running)
    engine.submit(CLIENT, submit(2, tenant="a", quota=quota, max_tokens=1), 0.0)
    assert told(engine)[-1].finish is None, "nine of ten tokens are used"
    next(running)
    engine.submit(CLIENT, submit(3, tenant="a", quota=quota), 0.0)
    refused = told(engine)[-1]
    assert refused.rejection == "rate_limited" and "10 tokens" in refused.error and refused.retry_after_s > 0


def test_what_is_refused_for_another_reason_is_not_charged() -> None:
    engine = serving(max_num_seqs=1, max_num_queued_reqs=1)
    for id in range(3):
        engine.submit(CLIENT, submit(id), 0.0)
    engine.submit(CLIENT, submit(3, tenant="a", quota=Quota(1)), 0.0)
    assert told(engine)[-1].rejection == "overloaded"
    for _ in steps(engine):
        pass
    engine.submit(CLIENT, submit(4, tenant="a", quota=Quota(1)), 0.0)
    assert all(output.id != 4 for output in told(engine))


def test_who_is_told_to_come_again_is_told_what_the_queue_takes() -> None:
    engine = serving(max_num_seqs=1, max_num_queued_reqs=20)
    now = 0.0
    for id in range(21):
        engine.submit(CLIENT, submit(id, max_tokens=1), now)
    for _ in steps(engine):  # one sequence a step
        now += 0.5
        engine.submit(CLIENT, submit(100 + int(now * 2), max_tokens=1), now)
        engine.submit(CLIENT, submit(99, max_tokens=1), now)
        if now >= 20.0:
            break
    refused = told(engine)[-1]
    assert refused.rejection == "overloaded" and refused.id == 99
    assert 5.0 < refused.retry_after_s < 20.0, "twenty wait, and two a second end"


def test_a_loss_tells_nobody_anything_but_those_it_ends() -> None:
    engine = serving()
    engine.submit(CLIENT, submit(1), 0.0)
    engine.submit(CLIENT, submit(2, attempts=3), 0.0)
    next(steps(engine))
    told(engine)
    for epoch in (2, 3):
        assert engine.plan(0.0) is not None
        engine.regroup(epoch, 0.0, out_of_memory=False)
    assert [(output.id, output.finish) for output in told(engine)] == [(2, "error")]
    assert engine.num_requests == 1
    for _ in steps(engine, 1000.0):
        pass
    assert told(engine)[-1].finish == "length" and engine.num_requests == 0
    assert engine._recorder.metrics.step_time._sum == 0.0, "steps took no time, and what was lost is not waited for"
