"""Between wire and scheduler, without sockets: who is charged, who is told, when the books are looked at."""

from collections.abc import Iterator
from math import inf

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
        engine.submit(CLIENT, submit(id, tenant="a"), 0.0)
    engine.submit(CLIENT, submit(3, tenant="a", quota=Quota(1)), 0.0)
    assert told(engine)[-1].rejection == "overloaded"
    for _ in steps(engine):
        pass
    engine.submit(CLIENT, submit(4, tenant="a", quota=Quota(1)), 0.0)
    assert all(output.id != 4 for output in told(engine))


def test_who_is_told_to_come_again_is_told_when_there_is_a_place() -> None:
    engine = busy()
    for id in range(100, 121):
        engine.submit(CLIENT, submit(id, max_tokens=1), 60.0)
    assert told(engine) == []
    for id in range(200, 220):
        engine.submit(CLIENT, submit(id, max_tokens=1), 60.0)
    waits = [output.retry_after_s for output in told(engine)]
    assert len(waits) == 20 and waits == sorted(waits)
    assert 1.0 <= waits[0] < 2.0 and 20.0 < waits[-1] < 30.0, "one place a second, and somewhat later than that"


def busy(max_num_queued_reqs: int = 20) -> Serving:
    """Serves one sequence a second, and has done so for a minute."""
    engine = serving(max_num_seqs=1, max_num_queued_reqs=max_num_queued_reqs, depth=1)
    engine.submit(CLIENT, submit(0, max_tokens=1), 0.0)
    for second in range(1, 61):
        engine.submit(CLIENT, submit(second, max_tokens=1), float(second))
        next(steps(engine, float(second)))
    next(steps(engine, 60.0))
    told(engine)
    return engine


def test_who_would_wait_in_vain_is_told_at_once_and_nobody_else() -> None:
    engine = busy(max_num_queued_reqs=1000)
    for id in range(100, 150):
        engine.submit(CLIENT, submit(id, tenant="flood", priority=1, max_tokens=1), 60.0)
    for second in range(60, 70):
        next(steps(engine, float(second)))
    told(engine)
    hasty = {"max_queue_s": 10.0}
    engine.submit(CLIENT, submit(1, tenant="flood", priority=1, **hasty), 70.0)
    [refused] = told(engine)
    assert (refused.id, refused.finish, refused.rejection) == (1, "error", "expired")
    assert 25.0 < refused.retry_after_s < 35.0, "forty wait, one a second: thirty too many"
    engine.submit(CLIENT, submit(2, tenant="other", priority=1, **hasty), 70.0)  # may be let in before them
    engine.submit(CLIENT, submit(3, tenant="flood", priority=0, **hasty), 70.0)
    engine.submit(CLIENT, submit(4, tenant="flood", priority=1, max_queue_s=30.0), 70.0)  # who knows?
    engine.submit(CLIENT, submit(5, tenant="flood", priority=1, attempts=1, **hasty), 70.0)  # was taken before
    assert told(engine) == []
    counted = engine._recorder.metrics.render().decode()
    assert 'vllm:admission_rejections_total{model_name="test",reason="expired"} 1.0' in counted


def test_nobody_is_turned_away_by_an_engine_that_knows_nothing() -> None:
    engine = serving(max_num_seqs=1, max_num_queued_reqs=1000)
    for id in range(500):
        engine.submit(CLIENT, submit(id, max_queue_s=0.5), 0.0)
    assert told(engine) == []


def test_an_engine_with_room_refuses_nobody_for_the_pace_of_those_it_has() -> None:
    engine = serving(1000, max_num_seqs=8)
    for second in range(60):  # four at a time, which take a while: half of what could run
        engine.submit(CLIENT, submit(second), float(second))
        next(steps(engine, float(second)))
    told(engine)
    for id in range(100, 200):
        engine.submit(CLIENT, submit(id, max_queue_s=0.5), 60.0)
    assert told(engine) == []


def test_who_ran_out_of_time_is_counted_by_what_was_computed_of_it() -> None:
    engine = serving(max_num_seqs=1)
    engine.submit(CLIENT, submit(1, timeout_s=2.0), 0.0)
    engine.submit(CLIENT, submit(2, timeout_s=3.0), 0.0)
    engine.submit(CLIENT, submit(3, max_queue_s=1.0), 0.0)
    engine.submit(CLIENT, submit(4, timeout_s=2.0, waited_s=2.0), 0.0)
    next(steps(engine))
    assert engine.next_deadline == 1.0
    engine.expire(10.0)
    ends = {output.id: (output.finish, output.rejection) for output in told(engine) if output.finish}
    timeout = ("timeout", "")
    assert ends == {4: timeout, 3: ("timeout", "expired"), 1: timeout, 2: timeout}
    counted = engine._recorder.metrics.render().decode()
    assert 'quire:requests_timed_out_total{model_name="test",phase="waiting"} 3.0' in counted
    assert 'quire:requests_timed_out_total{model_name="test",phase="running"} 1.0' in counted
    assert 'vllm:request_success_total{finished_reason="timeout",model_name="test"} 4.0' in counted
    assert engine.plan(10.0) is None and engine.next_deadline == inf


def test_a_place_once_had_is_enough() -> None:
    """Preempted, begun anew with other workers, or brought by another scheduler: it has begun."""
    engine = serving()
    engine.submit(CLIENT, submit(1, max_queue_s=1.0), 0.0)
    engine.submit(CLIENT, submit(2, max_queue_s=1.0, output=pack([5]), attempts=1, waited_s=50.0), 0.0)
    assert engine.plan(0.5) is not None
    engine.submit(CLIENT, submit(3, timeout_s=6.0), 0.0)
    assert engine.plan(0.5) is not None
    engine.regroup(2, 5.0, out_of_memory=False)
    engine.expire(6.0)
    for _ in steps(engine, 7.0):
        pass
    assert {output.id: output.finish for output in told(engine)} == {1: "length", 2: "length", 3: "timeout"}
    counted = engine._recorder.metrics.render().decode()
    assert 'quire:requests_timed_out_total{model_name="test",phase="running"} 1.0' in counted


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
