"""Times of requests: against a dictionary, and what they mean to requests that wait and run."""

import random
from array import array
from collections import Counter
from math import inf
from pathlib import Path

import pytest

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import Output, Outputs, StepResult, Submit, pack
from quire.common.sampling import SamplingParams
from quire.scheduler import process
from quire.scheduler.deadlines import Deadlines
from quire.scheduler.recorder import Recorder
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.serving import Serving

from .peers import INFO, config, running

CLIENT = b"client"


def request(id: int) -> Request:
    return Request(id, array("i", [1]), 1, SamplingParams(max_tokens=1, seed=0))


@pytest.mark.parametrize("seed", range(20))
def test_it_is_a_dictionary_of_times(seed: int) -> None:
    choose = random.Random(seed)
    requests = [request(id) for id in range(10)]
    deadlines, model = Deadlines(), dict[Request, float]()
    for _ in range(300):
        one, at = choose.choice(requests), choose.uniform(0.0, 10.0)
        match choose.choice(["set", "set", "set", "drop", "due"]):
            case "set":
                deadlines.set(one, at)
                model[one] = at
            case "drop":
                deadlines.drop(one)
                model.pop(one, None)
            case _:
                late = list(deadlines.due(at))
                assert set(late) == {request for request, time in model.items() if time <= at}
                assert [model[request] for request in late] == sorted(model.pop(request) for request in late)
        assert deadlines.next() == min(model.values(), default=inf) and len(deadlines) == len(model)


def test_what_is_dropped_is_not_held_for_long() -> None:
    deadlines, kept = Deadlines(), [request(id) for id in range(10)]
    for one in kept:
        deadlines.set(one, 1e9)
    for id in range(10_000):
        deadlines.set(kept[id % 10], 1e9 + id)
        assert len(deadlines._heap) <= 2 * len(deadlines) + 16
        one = request(id)
        deadlines.set(one, float(id))
        deadlines.drop(one)
        assert len(deadlines._heap) <= 2 * len(deadlines) + 16


# --- in the engine ----------------------------------------------------------------------------------------------------


class Engine:
    """`Serving` and a device that answers each step after a while, at times of the test's own."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        config = SchedulerConfig(
            max_num_seqs=self.random.randint(1, 4),
            max_num_batched_tokens=self.random.choice([4, 64]),
            max_num_queued_reqs=30,
        )
        scheduler = Scheduler(config, CacheConfig(block_size=4), self.random.randint(16, 40), 48)
        self.serving = Serving(scheduler, INFO, Recorder("test", caching=True), self.random.randint(1, 3))
        self.now = 100.0
        self.limits: dict[int, tuple[float, float]] = {}  # of those that are open
        self.begun: set[int] = set()
        self.ends: dict[int, Output] = {}

    def submit(self, id: int) -> None:
        waited_s = self.random.choice([0.0, 0.0, self.random.uniform(0, 3)])
        timeout_s, max_queue_s = (self.random.choice([0.0, self.random.uniform(0.1, 8)]) for _ in range(2))
        output = [1] * self.random.choice([0, 0, 2])
        sampling = SamplingParams(max_tokens=self.random.randint(3, 12), seed=0)
        prompt = pack([self.random.randint(1, 5) for _ in range(self.random.randint(1, 20))])
        arrived_at = self.now - waited_s
        ends_at = arrived_at + timeout_s if timeout_s else 1e9
        begins_by = arrived_at + max_queue_s if max_queue_s and not output else 1e9
        self.limits[id] = ends_at, begins_by
        submit = Submit(
            id,
            prompt,
            sampling,
            waited_s,
            priority=self.random.choice([0, 0, 1]),
            tenant=self.random.choice("ab"),
            output=pack(output),
            timeout_s=timeout_s,
            max_queue_s=max_queue_s,
        )
        self.serving.submit(CLIENT, submit, self.now)

    def plan(self) -> None:
        while self.serving.plan(self.now) is not None:
            step = self.serving.scheduler.dispatched[-1]
            for request in (*step.admitted, *step.requests):  # who is admitted may be computed in a later step
                ends_at, begins_by = self.limits[request.id]
                assert self.now < ends_at, "a step was spent on a request whose time is over"
                assert request.id in self.begun or self.now < begins_by
                self.begun.add(request.id)

    def answer(self) -> None:
        dispatched = self.serving.scheduler.dispatched
        if dispatched:
            plan = dispatched[0].plan
            count = sum(plan.samples)
            self.serving.result(StepResult(plan.epoch, plan.step, pack([1] * count), pack([9] * count)), self.now)

    def hear(self) -> None:
        for _, outputs in self.serving.take_outputs():
            for output in outputs.outputs:
                assert output.id in self.limits, "told of a request that has ended"
                if output.finish is not None:
                    self.judge(output)
                    del self.limits[output.id]
                    self.ends[output.id] = output

    def judge(self, output: Output) -> None:
        ends_at, begins_by = self.limits[output.id]
        if output.rejection == "expired":
            assert output.id not in self.begun and begins_by < 1e9 and 1.0 <= output.retry_after_s <= 60.0
        elif output.finish == "timeout":
            assert ends_at <= self.now and not output.tokens
        else:
            failed = "4 times in a row" in output.error  # workers were lost again and again
            assert output.finish in ("stop", "length") or output.rejection == "overloaded" or failed

    def check(self) -> None:
        self.serving.scheduler.check()
        limits = [
            at
            for id, (ends_at, begins_by) in self.limits.items()
            for at in (ends_at, begins_by)[: 2 - (id in self.begun)]
        ]
        earliest = min(limits, default=1e9)
        assert min(self.serving.next_deadline, 1e9) == pytest.approx(earliest)


@pytest.mark.parametrize("seed", range(150))
def test_no_step_is_spent_on_those_whose_time_is_over(seed: int) -> None:
    engine = Engine(seed)
    for turn in range(120):
        engine.now += engine.random.choice([0.0, 0.1, 0.5])
        match engine.random.randint(0, 5):
            case 0 | 1 if turn < 80:
                engine.submit(turn)
            case 2:
                engine.answer()
            case 3 if engine.random.random() < 0.1:
                engine.serving.regroup(engine.serving.scheduler.epoch + 1, engine.now, out_of_memory=False)
            case 4 if engine.limits and engine.random.random() < 0.3:
                id = engine.random.choice(list(engine.limits))
                engine.serving.abort(CLIENT, [id], engine.now)
                engine.limits.pop(id)
            case _:
                engine.plan()
        engine.serving.expire(engine.now)
        engine.hear()
        engine.check()
    for _ in range(500):
        engine.now += 0.1
        engine.plan()
        engine.answer()
        engine.hear()
    serving = engine.serving
    assert not engine.limits and serving.num_requests == 0 and serving.scheduler.idle, "every request has ended"
    assert not serving._timeouts and not serving._places and not serving._queued


def test_the_runs_meet_every_end() -> None:
    ends: Counter[tuple[str | None, str, bool]] = Counter()
    for seed in range(40):
        engine = Engine(seed)
        for turn in range(60):
            engine.now += 0.2
            engine.submit(turn)
            engine.plan()
            engine.answer()
            engine.hear()
        ends.update((end.finish, end.rejection, id in engine.begun) for id, end in engine.ends.items())
    expected = {
        ("timeout", "", True),
        ("timeout", "", False),
        ("timeout", "expired", False),
        ("error", "expired", False),
    }
    assert expected <= ends.keys()


def test_an_engine_in_which_nothing_happens_wakes_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, config(max_num_seqs=1)) as engine:
        _, frontend = engine.ready()  # a worker that answers nothing from now on
        monkeypatch.setattr(process, "HEARTBEAT_S", 1000.0)
        sampling = SamplingParams(max_tokens=4, seed=0)
        frontend.send(Submit(1, pack([5]), sampling, timeout_s=0.2))
        frontend.send(Submit(2, pack([5]), sampling, max_queue_s=0.1))
        frontend.until(Outputs, 2)
        [late], [never] = frontend.outputs(1), frontend.outputs(2)
        assert (late.finish, late.rejection, never.finish, never.rejection) == ("timeout", "", "timeout", "expired")
