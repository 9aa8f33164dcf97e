"""Requests that break a step: each fails alone, with its reason, and the tokens of its neighbours stay what they were."""

from collections.abc import Iterator

import openai
import pytest

from .clients import Body, workload
from .conftest import Engines
from .engine import Engine
from .faults import kinds

NEIGHBOURS = workload(16)


def poison(kind: int, **fields: object) -> Body:
    prompt = [kinds.MARK, kind, 40, 41, 42]
    return {"model": "demo", "prompt": prompt, "max_tokens": 20, "temperature": 0, **fields}


@pytest.fixture
def engine(engines: Engines) -> Iterator[Engine]:
    engine = engines(faulty=True)
    yield engine
    for switch in engine.switches.iterdir():
        switch.unlink()


@pytest.mark.parametrize(
    "kind",
    [kinds.RAISE, kinds.EXIT, kinds.NAN, kinds.LATE, kinds.SCHEDULER],
    ids=["raises", "exits", "NaN", "raises late", "ends the scheduler"],
)
def test_a_poisonous_request_fails_alone(engine: Engine, kind: int) -> None:
    with engine.crowd(NEIGHBOURS) as crowd:
        crowd.flowing(5)
        with engine.crowd([poison(kind)]) as poisonous:
            (answer,) = poisonous.join()
        engine.check_records(crowd.join())
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.error
    assert answer.headers["x-request-id"]
    engine.check()


def test_a_stream_that_fails_says_so_and_keeps_what_it_had(engine: Engine) -> None:
    with engine.crowd([*NEIGHBOURS, poison(kinds.LATE, stream=True)]) as crowd:
        *others, failed = crowd.join()
    engine.check_records(others)
    assert failed.status == 200
    assert failed.text
    assert not failed.done
    assert failed.finish is None
    assert failed.code == "internal_error"
    engine.check()


def test_several_poisons_among_many(engine: Engine) -> None:
    bodies = [*NEIGHBOURS[:8], poison(kinds.RAISE), *NEIGHBOURS[8:], poison(kinds.NAN), poison(kinds.LATE, seed=3)]
    with engine.crowd(bodies) as crowd:
        records = crowd.join()
    bad = [record for record in records if isinstance(record.body["prompt"], list)]
    assert [record.status for record in bad] == [500] * 3
    engine.check_records([record for record in records if record not in bad])
    engine.check()


@pytest.mark.parametrize("kind", [kinds.RAISE_ONCE, kinds.EXIT_ONCE], ids=["raises", "exits"])
def test_a_fault_that_does_not_come_again_costs_nobody_anything(engine: Engine, kind: int) -> None:
    """Not even whom it met first: a step may fail for reasons of its own."""
    body = poison(kind)
    engine.learn([body])
    (engine.switches / "once").touch()
    with engine.crowd([*NEIGHBOURS, body]) as crowd:
        engine.check_records(crowd.join())
    assert not (engine.switches / "once").exists()
    engine.check()


def test_retries_of_a_client_make_no_crash_loop(engine: Engine) -> None:
    """openai's client asks again after a 500, unless it is told that this is no use."""
    with engine.crowd([poison(kinds.NAN)]) as crowd:  # the counter is not there before
        crowd.join()
    failed = engine.metric("vllm:request_success_total", finished_reason="error")
    with (
        openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none") as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.completions.create(**poison(kinds.NAN))
    assert engine.metric("vllm:request_success_total", finished_reason="error") == failed + 1
    engine.check()


def test_a_step_beyond_the_memory_is_made_smaller(engine: Engine) -> None:
    """Whatever needs more than 100 tokens at once fails; halving the budget gets everybody through."""
    (engine.switches / "oom").write_text("100")
    with engine.crowd(NEIGHBOURS) as crowd:
        engine.check_records(crowd.join())
    assert "planted lack of memory" in engine.log()
    engine.check()


def test_neighbours_that_come_and_go_while_one_is_poisonous(engine: Engine) -> None:
    """Its strikes are not theirs: waves of requests beside a request that kills the worker each time."""
    with engine.crowd([poison(kinds.EXIT)]) as poisonous:
        while not poisonous.over:
            with engine.crowd(NEIGHBOURS[:8]) as crowd:
                engine.check_records(crowd.join())
    assert poisonous.records[0].status == 500
    engine.check()
