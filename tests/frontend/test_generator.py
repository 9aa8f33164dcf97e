"""Requests over the real wire, against a scheduler whose model repeats the prompt: streams, faults, recovery."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quire.common.errors import ConfigError, EngineError, RequestError
from quire.common.messages import Heartbeat, Output, Outputs, Shutdown, Status, Submit
from quire.common.sampling import SamplingParams
from quire.frontend import engine_client, scheduler_link
from quire.frontend.engine_client import EngineClient
from quire.frontend.generator import Generator
from quire.frontend.outputs import Accumulator, RequestOutput, collect
from quire.frontend.streams import EngineDead
from quire.frontend.tokenizer import Tokenizer

from .fake_scheduler import FakeScheduler

PROMPT = "hello world, the quick brown fox"


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture
def scheduler(make_scheduler):
    with make_scheduler() as scheduler:
        yield scheduler


def run(scheduler: FakeScheduler, loaded: Tokenizer, work: Callable[[Generator], Awaitable[None]]) -> None:
    async def main() -> None:
        async with EngineClient(scheduler.address) as client, asyncio.timeout(15):
            await client.wait_ready()
            await work(Generator(client, loaded))

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_stream_and_whole_are_equal(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    async def work(generator: Generator) -> None:
        params = SamplingParams(max_tokens=40, seed=0)
        deltas = [delta async for delta in generator.generate(PROMPT, params, request_id="r")]
        whole = await collect(generator.generate(PROMPT, params, request_id="r"))
        ids = loaded.backend.encode(PROMPT).ids
        expected = [ids[i % len(ids)] for i in range(40)]
        assert whole.outputs[0].token_ids == expected
        assert whole.outputs[0].text == loaded.backend.decode(expected) == "".join(d.outputs[0].text for d in deltas)
        assert (whole.prompt, whole.prompt_token_ids, whole.finished, whole.request_id) == (PROMPT, ids, True, "r")
        assert whole.outputs[0].finish_reason == "length" and whole.num_cached_tokens == len(ids) // 2
        assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]

    run(scheduler, loaded, work)


def test_choices_sample_with_consecutive_seeds(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    async def work(generator: Generator) -> None:
        ids = loaded.backend.encode(PROMPT).ids
        whole = await collect(generator.generate(ids, SamplingParams(n=3, max_tokens=5, seed=2), request_id="r"))
        assert [c.index for c in whole.outputs] == [0, 1, 2]
        assert [c.token_ids for c in whole.outputs] == [
            [ids[(2 + c + i) % len(ids)] for i in range(5)] for c in range(3)
        ]
        top = 2**63 - 1
        await collect(generator.generate(ids, SamplingParams(n=2, max_tokens=1, seed=top), request_id="r"))
        assert [s.sampling.seed for s in scheduler.submits[-2:]] == [top, -(2**63)]  # wraps within int64

    run(scheduler, loaded, work)


def test_a_stop_string_aborts_in_the_engine(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    scheduler.delay_s = 0.002

    async def work(generator: Generator) -> None:
        whole = await collect(
            generator.generate(PROMPT, SamplingParams(max_tokens=400, stop=["brown fo"], seed=0), request_id="r")
        )
        choice = whole.outputs[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (
            "hello world, the quick ",
            "stop",
            "brown fo",
        )
        await until(lambda: scheduler.aborts == [scheduler.submits[0].id])
        assert not scheduler.num_running

    run(scheduler, loaded, work)


def test_leaving_a_stream_aborts_every_choice(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    scheduler.delay_s = 0.002

    async def work(generator: Generator) -> None:
        stream = generator.generate(PROMPT, SamplingParams(n=3, max_tokens=400), request_id="r")
        await anext(stream)
        await stream.aclose()
        await until(lambda: sorted(scheduler.aborts) == [s.id for s in scheduler.submits])
        waiting = asyncio.create_task(
            collect(generator.generate(PROMPT, SamplingParams(max_tokens=400), request_id="r"))
        )
        await until(lambda: len(scheduler.submits) == 4)
        waiting.cancel()
        await until(lambda: len(scheduler.aborts) == 4)

    run(scheduler, loaded, work)


def test_a_slow_reader_gets_merged_deltas(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    async def work(generator: Generator) -> None:
        deltas: list[RequestOutput] = []
        async for delta in generator.generate(PROMPT, SamplingParams(max_tokens=300, seed=0), request_id="r"):
            deltas.append(delta)
            await until(lambda: not scheduler.num_running)
            await asyncio.sleep(0.05)
        assert len(deltas) <= 3
        ids = loaded.backend.encode(PROMPT).ids
        assert [i for d in deltas for i in d.outputs[0].token_ids] == [ids[i % len(ids)] for i in range(300)]

    run(scheduler, loaded, work)


@pytest.mark.parametrize("how", ["restart", "silence", "stranger"])
def test_streams_survive_a_scheduler_that_forgets_them(
    scheduler: FakeScheduler, loaded: Tokenizer, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new epoch, or one that took this frontend for gone: submitted again with the ids held, the text is the same."""
    monkeypatch.setattr(scheduler_link, "PEER_TIMEOUT_S", 0.6 if how == "silence" else 5.0)
    monkeypatch.setattr(scheduler_link, "HEARTBEAT_S", 0.1)
    scheduler.delay_s = 0.005

    async def work(generator: Generator) -> None:
        params = SamplingParams(n=2, max_tokens=120, seed=5)
        ids = loaded.backend.encode(PROMPT).ids
        accumulator = Accumulator()
        disturbed = False
        async for delta in generator.generate(PROMPT, params, request_id="r"):
            accumulator.add(delta)
            if not disturbed and len(accumulator.total().outputs[0].token_ids) > 20:
                disturbed = True
                if how == "restart":
                    await asyncio.to_thread(scheduler.restart)
                elif how == "stranger":
                    await asyncio.to_thread(scheduler.forget)
                else:
                    await asyncio.to_thread(scheduler.mute, 1.0)
        total = accumulator.total()
        for c in range(2):
            assert total.outputs[c].token_ids == [ids[(5 + c + i) % len(ids)] for i in range(120)]
        again = scheduler.submits[2:]
        assert len(again) == 2 and all(s.output and s.waited_s > 0 for s in again)
        assert {s.id for s in again}.isdisjoint(s.id for s in scheduler.submits[:2])

    run(scheduler, loaded, work)


def test_repeated_and_unknown_messages_change_nothing(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    scheduler.delay_s = 0.005

    async def work(generator: Generator) -> None:
        params = SamplingParams(max_tokens=60, seed=0)
        accumulator = Accumulator()
        async for delta in generator.generate(PROMPT, params, request_id="r"):
            accumulator.add(delta)
            held = accumulator.total().outputs[0].token_ids
            if len(held) == 10:
                await asyncio.to_thread(scheduler.tell_bytes, b"\xc1 no message")
                await asyncio.to_thread(
                    scheduler.tell, Outputs([Output(scheduler.submits[0].id, 3, held[3:8]), Output(999, 0, [1])])
                )
                await asyncio.to_thread(scheduler.tell, Heartbeat(scheduler.epoch))
        ids = loaded.backend.encode(PROMPT).ids
        assert accumulator.total().outputs[0].token_ids == [ids[i % len(ids)] for i in range(60)]
        assert len(scheduler.submits) == 1

    run(scheduler, loaded, work)


@pytest.mark.parametrize("gaps", [1, 3, 9])
def test_tokens_that_the_engine_skips_are_asked_for_again(
    scheduler: FakeScheduler, loaded: Tokenizer, gaps: int
) -> None:
    """A gap within a conversation is the engine's fault: four in a row, without a token between, are too many."""

    def answer(submit: Submit) -> Output | None:
        return Output(submit.id, 2, [5]) if len(scheduler.submits) <= gaps else None

    scheduler.answer = answer

    async def work(generator: Generator) -> None:
        stream = generator.generate(PROMPT, SamplingParams(max_tokens=20, seed=0), request_id="r")
        if gaps > 3:
            with pytest.raises(EngineError, match="failed 4 times"):
                await collect(stream)
        else:
            ids = loaded.backend.encode(PROMPT).ids
            assert (await collect(stream)).outputs[0].token_ids == [ids[i % len(ids)] for i in range(20)]
        assert [submit.attempts for submit in scheduler.submits] == list(range(min(gaps, 3) + 1))
        await until(lambda: scheduler.aborts == [submit.id for submit in scheduler.submits[:gaps]])

    run(scheduler, loaded, work)


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        ({"finish": "error", "error": "queue full", "rejection": "overloaded"}, RequestError, "queue full"),
        ({"finish": "error", "error": "NaN logits"}, EngineError, "NaN logits"),
        ({"finish": "abort"}, EngineError, "ended this request"),
    ],
)
def test_what_the_engine_refuses_is_raised(
    scheduler: FakeScheduler, loaded: Tokenizer, output: dict, error: type, match: str
) -> None:
    scheduler.answer = lambda submit: Output(submit.id, 0, [], **output)

    async def work(generator: Generator) -> None:
        with pytest.raises(error, match=match) as caught:
            await collect(generator.generate(PROMPT, SamplingParams(), request_id="r"))
        if error is RequestError:
            assert (caught.value.status, caught.value.code) == (
                503,
                "overloaded",
            ) and "Retry-After" in caught.value.headers

    run(scheduler, loaded, work)


@pytest.mark.parametrize(
    ("message", "failure"), [(Status("failed", detail="worker 1 died"), EngineDead), (Shutdown(), type(None))]
)
def test_the_end_of_the_engine_ends_every_stream(
    scheduler: FakeScheduler, loaded: Tokenizer, message: object, failure: type
) -> None:
    scheduler.delay_s = 0.005

    async def work(generator: Generator) -> None:
        streams = [
            asyncio.create_task(collect(generator.generate(PROMPT, SamplingParams(max_tokens=400), request_id="r")))
            for _ in range(4)
        ]
        await until(lambda: scheduler.num_running == 4)
        await asyncio.to_thread(scheduler.tell, message)
        for stream in streams:
            with pytest.raises(EngineDead):
                await stream
        assert isinstance(await generator.client.wait_ended(), failure)
        with pytest.raises(EngineDead):
            await collect(generator.generate(PROMPT, SamplingParams(), request_id="r"))

    run(scheduler, loaded, work)


def test_refused_is_a_configuration_error(
    scheduler: FakeScheduler, loaded: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_link, "PROTOCOL", 999)

    async def main() -> None:
        async with EngineClient(scheduler.address) as client:
            with pytest.raises(ConfigError, match="refused"):
                await client.wait_welcome()

    asyncio.run(main())


def test_stats_fall_back_to_the_last_known(
    scheduler: FakeScheduler, loaded: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "STATS_TIMEOUT_S", 0.2)

    async def work(generator: Generator) -> None:
        assert await asyncio.gather(*(generator.client.stats() for _ in range(5))) == [b"quire:fake 1\n"] * 5
        await asyncio.to_thread(scheduler.mute, 0.5)
        assert await generator.client.stats() == b"quire:fake 1\n"

    run(scheduler, loaded, work)


@pytest.mark.parametrize(
    ("prompt", "params", "param", "code"),
    [
        ([], {}, "prompt", None),
        ("", {}, "prompt", None),
        ([-1], {}, "prompt", None),
        ([10**6], {}, "prompt", None),
        ([5] * 512, {}, "prompt", "context_length_exceeded"),
        ([5], {"max_tokens": 513}, "max_tokens", None),
        ([5], {"stop_token_ids": [10**6]}, "stop_token_ids", None),
        ([5], {"logit_bias": {10**6: 1.0}}, "logit_bias", None),
        ([5], {"stop_token_ids": list(range(1000, 2024))}, "stop_token_ids", None),
    ],
)
def test_requests_that_cannot_be_served_are_not_submitted(
    scheduler: FakeScheduler, loaded: Tokenizer, prompt: str | list[int], params: dict, param: str, code: str | None
) -> None:
    async def work(generator: Generator) -> None:
        with pytest.raises(RequestError) as caught:
            await collect(generator.generate(prompt, SamplingParams(**params), request_id="r"))
        assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
        if code:
            assert "512" in caught.value.message
        assert scheduler.submits == []

    run(scheduler, loaded, work)


def test_a_request_may_fill_the_context_to_its_last_token(scheduler: FakeScheduler, loaded: Tokenizer) -> None:
    async def work(generator: Generator) -> None:
        whole = await collect(generator.generate([5] * 500, SamplingParams(max_tokens=None), request_id="r"))
        assert (len(whole.outputs[0].token_ids), whole.outputs[0].finish_reason) == (12, "length")
        whole = await collect(generator.generate([5] * 511, SamplingParams(max_tokens=9), request_id="r"))
        assert len(whole.outputs[0].token_ids) == 1

    run(scheduler, loaded, work)
