"""Which sequence is submitted when, and what it has in the end, whatever becomes of the schedulers that hold it."""

import asyncio
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.config import SchedulerConfig
from quire.common.errors import EngineError, RequestError
from quire.common.messages import Output, Submit, pack, unpack
from quire.common.sampling import SamplingParams
from quire.frontend.engine_client import num_held
from quire.frontend.sequences import MAX_ATTEMPTS, SUSPECT_ATTEMPTS, Sequences
from quire.frontend.streams import Routing, TokenStream
from quire.scheduler.limits import num_queueable

LENGTH = 12
NOW = 1000.0


def text(number: int) -> list[int]:
    return [(number * 31 + i * i) % 97 for i in range(LENGTH)]


def stream(number: int = 0) -> TokenStream:
    params = SamplingParams(max_tokens=LENGTH, seed=number)
    return TokenStream([number + 1], params, Routing(), abort=lambda _: None, wake=asyncio.Event())


class Engine:
    """A scheduler as a frontend sees it: what it holds, by id, and its outputs."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.held: dict[int, Submit] = {}
        self.last: dict[int, Output] = {}  # of each id
        self.given: dict[int, Submit] = {}  # all that ever was, by id
        self.steps: Counter[int] = Counter()

    def take(self) -> None:
        for submit in self.sequences.due(NOW):
            assert submit.id not in self.given
            self.held[submit.id] = self.given[submit.id] = submit

    def tell(self, output: Output) -> None:
        unwanted = self.sequences.accept(output, overload_status=503, now=NOW)
        if unwanted is not None:
            del self.held[unwanted]
        self.take()

    def step(self, id: int, count: int = 1, skipped: int = 0) -> None:
        """`count` more tokens of a sequence, behind `skipped` that are not told."""
        submit = self.held[id]
        self.steps[id] += 1
        have = unpack(submit.output)
        end = min(LENGTH, len(have) + skipped + count)
        tokens = text(submit.sampling.seed or 0)[len(have) + skipped : end]
        self.held[id] = type(submit)(
            id, submit.prompt, submit.sampling, output=pack(text(submit.sampling.seed or 0)[:end])
        )
        finish = "length" if end == LENGTH else None
        if finish and not skipped:
            del self.held[id]
        self.last[id] = Output(id, len(have) + skipped, tokens, finish)
        self.tell(self.last[id])

    def forget(self, *, died: bool) -> None:
        self.held.clear()
        self.sequences.withdraw(died=died)
        self.take()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_sequence_ends_as_if_nothing_had_happened(data: st.DataObject) -> None:
    """Schedulers die or forget, skip tokens, repeat what is old: no id is lost, none comes twice."""
    sequences = Sequences()
    engine = Engine(sequences)
    streams = [stream(number) for number in range(data.draw(st.integers(1, 4)))]
    for one in streams:
        sequences.add(one)
    engine.take()
    for _ in range(data.draw(st.integers(0, 30))):
        if not engine.held:
            break
        id = data.draw(st.sampled_from(sorted(engine.held)))
        match data.draw(st.sampled_from(["step", "step", "step", "die", "forget", "skip", "repeat"])):
            case "step":
                engine.step(id, data.draw(st.integers(0, 3)))
            case "die" if all(one.attempts == 0 for one in streams):
                engine.forget(died=True)
            case "forget":
                engine.forget(died=False)
            case "skip" if all(one.attempts == 0 for one in streams):
                engine.step(id, skipped=data.draw(st.integers(1, 3)))
            case "repeat" if engine.last:
                engine.tell(data.draw(st.sampled_from(list(engine.last.values()))))
    while engine.held:
        engine.step(min(engine.held), 2)
    assert [one.output for one in streams] == [text(number) for number in range(len(streams))]
    for one in streams:
        delta = one.take()
        assert delta is not None and delta.finish == "length" and one.done
    assert len(sequences) == 0


@pytest.mark.parametrize("num_streams", [1, 2, 7])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("fatal", [0, 1])
def test_a_sequence_that_kills_schedulers_takes_no_other_with_it(num_streams: int, started: bool, fatal: int) -> None:
    """The scheduler runs suspects alone, everything else together, and dies of the poisonous one: at once, or when it
    has computed what is there anew, and one token with it."""
    for poison in range(num_streams):
        sequences = Sequences()
        engine = Engine(sequences)
        streams = [stream(number) for number in range(num_streams)]
        for one in streams:
            sequences.add(one)
        engine.take()
        if started and not fatal:
            for id in list(engine.held):
                engine.step(id)
                engine.steps[id] = 0
        deaths = 0
        while engine.held:
            alone = [id for id, submit in engine.held.items() if submit.attempts >= SUSPECT_ATTEMPTS]
            together = [id for id in engine.held if id not in alone]
            for batch in (together, *([id] for id in alone)):
                if any(engine.given[id].sampling.seed == poison and engine.steps[id] == fatal for id in batch):
                    engine.forget(died=True)
                    deaths += 1
                    break
                for id in batch:
                    engine.step(id)
        assert deaths == MAX_ATTEMPTS
        for number, one in enumerate(streams):
            if number == poison:
                with pytest.raises(EngineError, match="failed 4 times"):
                    while one.take():
                        pass
            else:
                assert one.output == text(number)


def test_progress_takes_attempts_away_and_lost_frames_count_none() -> None:
    sequences = Sequences()
    engine = Engine(sequences)
    one = stream()
    sequences.add(one)
    engine.take()
    for _ in range(20):
        engine.forget(died=False)
    assert one.attempts == 0 and not one.done
    for _ in range(3):
        for _ in range(MAX_ATTEMPTS - 1):
            engine.forget(died=True)
        [submit] = engine.held.values()
        assert submit.attempts == MAX_ATTEMPTS - 1
        engine.step(submit.id)
        assert one.attempts == MAX_ATTEMPTS - 1
        engine.step(submit.id)
        assert one.attempts == 0
    waiting = stream(1)
    for _ in range(MAX_ATTEMPTS):
        sequences.withdraw(died=True)
        sequences.add(waiting)  # schedulers die while it waits here, and so does the other from the second on
    assert (waiting.attempts, one.attempts) == (0, 1) and not waiting.done


def test_what_was_taken_before_is_not_refused_any_more() -> None:
    sequences = Sequences()
    held, new = stream(0), stream(1)
    sequences.add(held)
    [first] = sequences.due(NOW)
    sequences.withdraw(died=True)
    sequences.add(new)
    again, fresh = sequences.due(NOW)
    assert [unpack(s.prompt) for s in (first, again, fresh)] == [[1], [1], [2]]  # in the order in which they came
    for rejection, id in (("overloaded", again.id), ("overloaded", fresh.id)):
        output = Output(id, 0, [], "error", error="full", rejection=rejection, retry_after_s=7.2)
        assert sequences.accept(output, overload_status=429, now=NOW) is None
    with pytest.raises(RequestError, match="full") as caught:
        new.take()
    assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "overloaded", {"Retry-After": "8"})
    assert sequences.due(NOW + 7.0) == [] and not held.done and len(sequences) == 1
    [later] = sequences.due(NOW + 7.5)
    assert later.id not in (first.id, again.id)


@pytest.mark.parametrize(
    ("said", "header"), [(0.0, "1"), (1.2, "2"), (30.0, "30"), (-5.0, "1"), (math.inf, "3600"), (math.nan, "1")]
)
def test_retry_after_is_what_the_scheduler_says(said: float, header: str) -> None:
    sequences = Sequences()
    one = stream()
    sequences.add(one)
    [submit] = sequences.due(NOW)
    output = Output(submit.id, 0, [], "error", rejection="rate_limited", retry_after_s=said)
    sequences.accept(output, overload_status=503, now=NOW)
    with pytest.raises(RequestError) as caught:
        one.take()
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers == {"Retry-After": header}


def test_nobody_is_told_of_what_was_left() -> None:
    sequences = Sequences()
    left, stays, waits = stream(0), stream(1), stream(2)
    sequences.add(left)
    sequences.add(stays)
    first, second = sequences.due(NOW)
    sequences.add(waits)
    assert sequences.remove(left) == first.id and sequences.remove(waits) is None and len(sequences) == 1
    assert sequences.accept(Output(first.id, 0, [5]), overload_status=503, now=NOW) is None and left.output == []
    sequences.withdraw(died=False)
    assert [s.prompt for s in sequences.due(NOW)] == [second.prompt]


@pytest.mark.parametrize("queued", [None, 3])
def test_as_many_wait_here_as_a_scheduler_would_take(queued: int | None) -> None:
    config = SchedulerConfig(max_num_seqs=5, max_num_queued_reqs=queued)
    assert num_held(config) == 5 + num_queueable(config)
