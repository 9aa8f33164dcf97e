"""Schedulers that die, forget, stand still or lose frames: what readers get is what they would have got without."""

import asyncio
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.common.curve import PEER_FILE, SCHEDULER_FILE, make, read_peer_keys, read_scheduler_keys
from quire.common.messages import Output, Outputs, Status
from quire.common.sampling import SamplingParams
from quire.frontend.generator import Generator
from quire.frontend.outputs import Accumulator, RequestOutput
from quire.frontend.tokenizer import Tokenizer

from .fake_scheduler import FakeScheduler, frontend_process, http, wait_ready
from .sequence_client import connected, expected, ids, submit, until

PROMPT = "hello world, the quick brown fox"
RECONNECT_S = 0.25  # ZeroMQ's own pause between two tries, 50 to 200 ms and some more at random
DISTURBANCES: dict[str, Callable[[FakeScheduler], None]] = {
    "restart": lambda scheduler: scheduler.restart(),
    "forget": lambda scheduler: scheduler.forget(),
    "lose a frame": lambda scheduler: scheduler.lose_frame(),
    "lose a frame of the frontend's": lambda scheduler: scheduler.lose_frame_of_peers(),
    "repeat a frame": lambda scheduler: scheduler.tell_twice(Status("ready", 1.0)),
}


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@pytest.fixture
def scheduler(make_scheduler) -> Iterator[FakeScheduler]:
    with make_scheduler() as scheduler:
        yield scheduler


@pytest.fixture(scope="module")
def lasting(make_scheduler) -> Iterator[FakeScheduler]:
    with make_scheduler() as scheduler:
        yield scheduler


@pytest.mark.parametrize("first", DISTURBANCES)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(others=st.lists(st.sampled_from(sorted(DISTURBANCES)), max_size=3), random=st.randoms(use_true_random=False))
def test_whatever_happens_the_text_is_the_same(
    lasting: FakeScheduler, loaded: Tokenizer, first: str, others: list[str], random: random.Random
) -> None:
    """Many choices, stop strings, greedy and sampled, read as they come or at the end; disturbed at random moments."""
    requests = [
        SamplingParams(
            max_tokens=random.randint(20, 150), seed=random.randint(0, 99), n=random.choice([1, 1, 3]),
            temperature=random.choice([0.0, 1.0]), stop=random.choice([[], ["quick br"], ["fox", "own"]]),
        )
        for _ in range(6)
    ]  # fmt: skip

    async def ask(generator: Generator, params: SamplingParams, *, slowly: bool) -> RequestOutput:
        accumulator = Accumulator()
        async for delta in generator.generate(PROMPT, params, request_id="r"):
            accumulator.add(delta)
            await asyncio.sleep(0.003 if slowly else 0)
        return accumulator.total()

    async def main() -> None:
        async with connected(lasting) as client:
            generator = Generator(client, loaded)
            lasting.delay_s, lasting.tokens_per_step = 0.0, 50
            undisturbed = [await ask(generator, params, slowly=False) for params in requests]
            lasting.delay_s, lasting.tokens_per_step = 0.002, 1
            asked = [
                asyncio.create_task(ask(generator, params, slowly=bool(i % 2))) for i, params in enumerate(requests)
            ]
            for name in (first, *others):
                await asyncio.sleep(random.uniform(0.0, 0.06))
                await asyncio.to_thread(DISTURBANCES[name], lasting)
            assert await asyncio.gather(*asked) == undisturbed
            await until(lambda: not lasting.num_running)

    asyncio.run(main())


def test_clients_notice_nothing(make_scheduler) -> None:
    """The same over HTTP: streams and whole answers, while one scheduler after the other dies."""
    bodies: list[dict[str, Any]] = [
        {"prompt": PROMPT, "max_tokens": 60 + 9 * i, "seed": i, "stream": bool(i % 2), "n": 1 + i % 3}
        | ({"stop": ["lazy", "brown fo"]} if i % 4 == 0 else {})
        for i in range(12)
    ]

    def ask(url: str, body: dict[str, Any]) -> dict[int, str]:
        answer = http.post(f"{url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200
        if not body["stream"]:
            return {choice["index"]: choice["text"] for choice in answer.json()["choices"]}
        assert answer.text.endswith("data: [DONE]\n\n")
        texts: dict[int, str] = {}
        for event in answer.text.split("\n\n")[:-2]:
            for choice in msgspec.json.decode(event.removeprefix("data: "))["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return texts

    with (
        make_scheduler() as scheduler,
        frontend_process(scheduler.address) as (_, url),
        ThreadPoolExecutor(len(bodies)) as pool,
    ):
        wait_ready(url)
        undisturbed = list(pool.map(lambda body: ask(url, body), bodies))
        scheduler.delay_s = 0.01
        asked = [pool.submit(ask, url, body) for body in bodies]
        for _ in range(5):
            time.sleep(random.uniform(0.02, 0.3))
            scheduler.restart(down_s=random.uniform(0.0, 0.1))
        assert [future.result() for future in asked] == undisturbed
        assert len(scheduler.submits) > 2 * len(bodies)


def test_a_scheduler_that_comes_back_has_everything_at_once(scheduler: FakeScheduler) -> None:
    """Neither side's beat of a second is waited for, only ZeroMQ's connection."""
    scheduler.delay_s = 0.005

    async def main() -> None:
        async with connected(scheduler) as client:
            reading = [asyncio.create_task(ids(submit(client, seed, 400))) for seed in range(32)]
            took = []
            for round in range(1, 6):
                await until(lambda: len(scheduler.submits) == 32 * round)  # noqa: B023
                await asyncio.sleep(0.05)
                await asyncio.to_thread(scheduler.restart)
                await until(lambda: len(scheduler.submits) == 32 * (round + 1))  # noqa: B023
                took.append(scheduler.submitted_at[-1] - scheduler.bound_at)
            assert statistics.median(took) < 0.1 + RECONNECT_S
            for seed, output in enumerate(await asyncio.gather(*reading)):
                assert output == expected(seed, 400)

    asyncio.run(main())


def test_a_scheduler_that_knows_us_not_is_not_flooded(scheduler: FakeScheduler) -> None:
    async def main() -> None:
        async with connected(scheduler) as client:
            await asyncio.to_thread(scheduler.forget)
            streams = [submit(client, seed) for seed in range(300)]  # each of these frames is asked for a Hello
            for seed, stream in enumerate(streams):
                assert await ids(stream) == expected(seed)
            assert len(scheduler.hellos) < 10

    asyncio.run(main())


def test_hellos_are_paced_and_not_said_after_the_welcome(scheduler: FakeScheduler) -> None:
    def ask_often() -> None:
        for peer in list(scheduler._peers):
            for _ in range(200):
                scheduler._hub.ask_for_hello(peer)
                time.sleep(0.001)

    async def main() -> None:
        async with connected(scheduler) as client:
            scheduler.delay_s = 0.005
            stream = submit(client, max_tokens=100)
            await until(lambda: len(stream.output) > 5)
            await asyncio.to_thread(scheduler.do, ask_often)
            assert await ids(stream) == expected(max_tokens=100)
            num_hellos, num_submits = len(scheduler.hellos), len(scheduler.submits)
            assert num_hellos < 30 and num_submits == 2
            stream = submit(client)
            await until(lambda: len(stream.output) > 5)
            client._link._put(scheduler.hellos[0])  # one that was due when the Welcome came
            assert await ids(stream) == expected()
            assert (len(scheduler.hellos), len(scheduler.submits)) == (num_hellos, num_submits + 1)

    asyncio.run(main())


def test_a_scheduler_that_stood_still_goes_on_where_it_was(scheduler: FakeScheduler, impatient: None) -> None:
    """No frame was lost, so nothing is computed again; meanwhile this side says that it hears nothing, and waits."""
    scheduler.delay_s = 0.005

    async def main() -> None:
        async with connected(scheduler) as client:
            first = submit(client)
            await until(lambda: len(first.output) > 5)
            scheduler.awake.clear()
            await until(lambda: client.silent)
            assert not client.ready and client.served
            await asyncio.sleep(0.5)  # two beats
            held = submit(client, seed=1)
            left = submit(client, seed=2)
            left.close()
            assert await client.stats() == b""  # at once: nobody is asked
            scheduler.awake.set()
            assert await ids(first) == expected() and await ids(held) == expected(1)
            await client.wait_ready()
            assert [s.sampling.seed for s in scheduler.submits] == [0, 1]
            assert not any(s.output or s.attempts for s in scheduler.submits)

    asyncio.run(main())


def test_a_frontend_that_stood_still_blames_nobody(scheduler: FakeScheduler, impatient: None) -> None:
    async def main() -> None:
        async with connected(scheduler) as client:
            scheduler.awake.clear()  # so that nothing is heard afterwards either
            await asyncio.sleep(0.1)
            time.sleep(1.0)  # the whole loop
            ends = time.monotonic() + 0.4  # two beats
            while time.monotonic() < ends:
                assert not client.silent
                await asyncio.sleep(0)
            scheduler.awake.set()
            await client.wait_ready()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["twice", "stale", "stale end", "unknown", "garbage"])
def test_frames_that_come_twice_or_too_late_change_nothing(scheduler: FakeScheduler, how: str) -> None:
    scheduler.delay_s = 0.005

    async def main() -> None:
        async with connected(scheduler) as client:
            stream = submit(client)
            await until(lambda: len(stream.output) > 8)
            id, have = scheduler.submits[0].id, stream.output[:8]
            match how:
                case "twice":
                    scheduler.tell_twice(Outputs([]))
                case "stale":
                    scheduler.tell(Outputs([Output(id, 0, have), Output(id, 3, have[3:5])]))
                case "stale end":
                    scheduler.tell(Outputs([Output(id, 3, have[3:5], "length"), Output(id, 2, [], "stop")]))
                case "unknown":
                    scheduler.tell(Outputs([Output(id + 7, 0, [1, 2], "length")]))
                case "garbage":
                    scheduler.tell_bytes(b"\xc1 no message")
            assert await ids(stream) == expected() and len(scheduler.submits) == 1
            if how in ("twice", "garbage"):
                await until(lambda: scheduler.heartbeats and scheduler.heartbeats[-1].bad_frames == 1)

    asyncio.run(main())


def test_a_link_between_hosts_begins_anew_with_its_keys(model_dir: Path, tmp_path: Path) -> None:
    make(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    keys = read_scheduler_keys(tmp_path / SCHEDULER_FILE)

    async def main(scheduler: FakeScheduler) -> None:
        async with connected(scheduler, read_peer_keys(tmp_path / PEER_FILE)) as client:
            stream = submit(client)
            await until(lambda: len(stream.output) > 5)
            await asyncio.to_thread(scheduler.restart)
            assert await ids(stream) == expected()

    with FakeScheduler(tmp_path, model_dir, address=address, keys=keys) as scheduler:
        scheduler.delay_s = 0.005
        asyncio.run(main(scheduler))
