"""Requests that wait for an engine, and requests that no engine survives."""

import asyncio
from collections.abc import Iterator

import msgspec
import pytest

from quire.common.config import ServerConfig
from quire.common.errors import EngineError, RequestError
from quire.common.messages import Output, Status, Submit
from quire.frontend.engine_client import num_held
from quire.frontend.sequences import MAX_ATTEMPTS
from quire.frontend.streams import EngineDead

from .fake_scheduler import FakeScheduler, http
from .sequence_client import connected, expected, ids, submit, until


@pytest.fixture
def scheduler(make_scheduler) -> Iterator[FakeScheduler]:
    with make_scheduler() as scheduler:
        yield scheduler


def test_requests_wait_for_a_scheduler_that_starts_again(scheduler: FakeScheduler) -> None:
    scheduler.config = msgspec.structs.replace(
        scheduler.config,
        scheduler=msgspec.structs.replace(scheduler.config.scheduler, max_num_seqs=2, max_num_queued_reqs=3),
        server=ServerConfig(overload_status="429"),
    )
    room = num_held(scheduler.config.scheduler)
    scheduler.delay_s = 0.005

    async def main() -> None:
        async with connected(scheduler) as client:
            first = submit(client)
            capacity = client.capacity
            await until(lambda: len(first.output) > 5)
            await asyncio.to_thread(scheduler.restart, status=Status("loading", 0.5))
            await until(lambda: client.status.phase == "loading")
            assert client.served and not client.ready and client.capacity == capacity
            waiting = [submit(client, seed) for seed in range(1, room)]
            with pytest.raises(RequestError, match="too many") as caught:
                submit(client)
            assert (caught.value.status, caught.value.code) == (429, "overloaded")
            assert int(caught.value.headers["Retry-After"]) >= 1
            waiting.pop().close()
            waiting.append(submit(client, room))  # one that goes away makes room for another
            assert len(scheduler.submits) == 1
            await asyncio.to_thread(scheduler.set_status, Status("ready", 1.0, capacity=capacity))
            assert await ids(first) == expected()
            assert [await ids(stream) for stream in waiting] == [expected(s) for s in (*range(1, room - 1), room)]
            assert len(scheduler.submits) == 1 + room and not any(s.attempts for s in scheduler.submits[2:])

    asyncio.run(main())


@pytest.mark.parametrize("phase", ["recovering", "stalled"])
def test_a_scheduler_whose_workers_are_missing_is_sent_everything(scheduler: FakeScheduler, phase: str) -> None:
    """It has its own queue, and its own limit."""

    async def main() -> None:
        async with connected(scheduler) as client:
            scheduler.hold.clear()
            first = submit(client)
            await until(lambda: scheduler.submits)
            await asyncio.to_thread(scheduler.set_status, Status(phase))
            await until(lambda: client.status.phase == phase)
            second = submit(client, seed=1)
            assert not client.ready
            await until(lambda: len(scheduler.submits) == 2)
            scheduler.hold.set()
            assert [await ids(first), await ids(second)] == [expected(), expected(1)]
            assert len(scheduler.submits) == 2

    asyncio.run(main())


def test_who_was_taken_before_is_not_turned_away_by_the_next_scheduler(
    scheduler: FakeScheduler, impatient: None
) -> None:
    def full(submit: Submit) -> Output | None:
        if submit.output and len(scheduler.submits) == 2:
            return Output(submit.id, 0, [], "error", error="full", rejection="overloaded", retry_after_s=0.2)
        return None

    scheduler.answer, scheduler.delay_s = full, 0.005

    async def main() -> None:
        async with connected(scheduler) as client:
            stream = submit(client)
            await until(lambda: len(stream.output) > 5)
            await asyncio.to_thread(scheduler.restart)
            assert await ids(stream) == expected() and len(scheduler.submits) == 3

    asyncio.run(main())


def test_four_schedulers_that_die_of_a_request_are_enough(scheduler: FakeScheduler) -> None:
    """It fails alone. Of two suspects the second is not sent while schedulers die of the first."""

    async def main() -> None:
        async with connected(scheduler) as client:
            scheduler.hold.clear()
            poison, other = submit(client), submit(client, seed=1)
            await until(lambda: len(scheduler.submits) == 2)
            for deaths in range(1, MAX_ATTEMPTS + 1):
                seen = len(scheduler.submits)
                await asyncio.to_thread(scheduler.restart)
                await until(lambda: len(scheduler.submits) > seen)  # noqa: B023
                await asyncio.sleep(0.05)
                new = [(s.sampling.seed, s.attempts) for s in scheduler.submits[seen:]]
                if deaths == 1:
                    assert new == [(0, 1), (1, 1)]
                elif deaths < MAX_ATTEMPTS:
                    assert new == [(0, deaths)]  # alone
                else:
                    assert new == [(1, 2)]  # the other had two when it was held, and none while it waited here
            with pytest.raises(EngineError, match="failed 4 times"):
                await ids(poison)
            scheduler.hold.set()
            assert await ids(other) == expected(1)

    asyncio.run(main())


@pytest.mark.parametrize("change", ["fingerprint", "tokenizer", "max_model_len"])
def test_a_scheduler_that_comes_back_with_another_model(scheduler: FakeScheduler, change: str) -> None:
    """The tokenizer that is loaded must fit; anything else is the new one's to say."""
    scheduler.delay_s = 0.005

    def act() -> None:
        if change == "tokenizer":
            model = msgspec.structs.replace(scheduler.config.model, tokenizer="/elsewhere")
            scheduler.config = msgspec.structs.replace(scheduler.config, model=model)
        else:
            value = 99 if change == "max_model_len" else "another"
            scheduler.info = msgspec.structs.replace(scheduler.info, **{change: value})
        scheduler.restart()

    async def main() -> None:
        async with connected(scheduler) as client:
            stream = submit(client)
            await until(lambda: len(stream.output) > 5)
            await asyncio.to_thread(act)
            if change == "max_model_len":
                assert await ids(stream) == expected() and client.model.max_model_len == 99
            else:
                with pytest.raises(EngineDead, match="another model"):
                    await ids(stream)
                assert isinstance(await client.wait_ended(), EngineDead)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_who_fails_alone_is_named_and_not_to_come_again(url: str, engine: FakeScheduler, stream: bool) -> None:
    """The openai client would repeat a 500, and with it what the engine cannot survive."""

    def answer(submit: Submit) -> Output:
        """Tokens and a fault, or tokens that do not follow on anything."""
        return Output(submit.id, 0, [5, 6], "error", error="NaN logits") if stream else Output(submit.id, 2, [5])

    engine.answer = answer
    body = {"prompt": "hello world", "stream": stream}
    got = http.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "the-one"})
    assert len(engine.submits) == (1 if stream else MAX_ATTEMPTS)
    error = msgspec.json.decode(got.text.strip().rpartition("data: ")[2])["error"]
    assert error["code"] == "internal_error" and "the-one" in error["message"]
    assert stream or (got.status_code, got.headers["x-should-retry"]) == (500, "false")
