"""Many clients, rude clients, and too little room for them: the others are served, and everything is given back."""

import asyncio
import contextlib
import json
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from ..conftest import Sizes
from ..e2e.server import wait_until
from .clients import STREAM, Body, Connection, Load, whole, workload
from .conftest import Engines
from .engine import BACK_S, FRESH, Engine, seconds_until

BODIES = workload(32)
FREED_S = 1.0


def endless(i: int) -> Body:
    """Half of them are in the middle of a long prompt for a while, the others write on and on."""
    prompt = [5 + (i * 7 + j) % 900 for j in range(700)] if i % 2 else f"# {i}\n"
    return {"model": "demo", "prompt": prompt, "max_tokens": 1300, "ignore_eos": True, **STREAM}


@pytest.mark.parametrize("stream", [True, False], ids=["streams", "whole answers"])
def test_a_disconnect_storm(engine: Engine, sizes: Sizes, stream: bool) -> None:
    bodies = [endless(i) for i in range(sizes.clients)]
    with engine.crowd(bodies if stream else [whole(body) for body in bodies]) as crowd:
        wait_until(lambda: engine.metric("vllm:num_requests_running") > sizes.clients // 4, BACK_S)
        crowd.hang_up()
    assert seconds_until(engine.is_idle) <= FREED_S
    with engine.crowd(BODIES) as calm:
        engine.check_records(calm.join())
    engine.check()


def test_a_disconnect_storm_while_a_worker_is_missing(engine: Engine, sizes: Sizes) -> None:
    with engine.crowd([endless(i) for i in range(sizes.clients)]) as crowd:
        wait_until(lambda: engine.metric("vllm:num_requests_running") > sizes.clients // 4, BACK_S)
        engine.kill("worker")
        crowd.hang_up()
    engine.check()


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_no_blocks_left_and_a_part_killed(engines: Engines, role: str) -> None:
    """Sequences that preempt each other all the time are computed again as if nothing had been."""
    engine = engines("--num-gpu-blocks-override", 64, "--max-model-len", 512)
    bodies = workload(40)
    engine.learn(bodies)
    with engine.crowd(bodies) as crowd:
        wait_until(lambda: engine.metric("vllm:num_preemptions_total") > 0, BACK_S)
        engine.kill(role)
        engine.check_records(crowd.join())
    engine.check()


def test_equal_request_ids_are_different_requests(engine: Engine) -> None:
    """A client's id is a label: 32 requests under one id, half of which hang up, disturb each other in nothing."""

    async def ask_or_hang_up(body: Body, stays: bool) -> str:
        connection = await Connection.open("127.0.0.1", engine.port)
        with contextlib.closing(connection):
            status, headers = await connection.send("POST", "/v1/completions", body, X_Request_Id="the-same")
            assert (status, headers["x-request-id"]) == (200, "the-same")
            return str(json.loads(await connection.whole())["choices"][0]["text"]) if stays else ""

    async def everybody() -> list[str]:
        asked = ((whole(body), True) if i % 2 else (body, False) for i, body in enumerate(BODIES))
        return await asyncio.gather(*(ask_or_hang_up(body, stays) for body, stays in asked))

    answers = asyncio.run(everybody())
    assert answers[1::2] == [engine.golden(body) for body in BODIES[1::2]]
    engine.check()


def test_ids_that_are_used_again_at_once(engine: Engine) -> None:
    """Abort and ask, abort and ask: no abort meets the request behind it."""
    for _ in range(10):
        with engine.crowd(BODIES) as crowd:
            crowd.flowing(1)
            crowd.hang_up()
        with engine.crowd(FRESH) as crowd:
            engine.check_records(crowd.join())
    engine.check()


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open, silent, all at once; what the server closes or refuses stays in the list."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 1000)), hard))
    sockets = []
    try:
        for _ in range(count):
            sockets.append(socket.socket())
            sockets[-1].settimeout(10)
            with contextlib.suppress(OSError):
                sockets[-1].connect(("127.0.0.1", port))
        yield sockets
    finally:
        for sock in sockets:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections(engine: Engine, sizes: Sizes) -> None:
    before = engine.part("frontend").memory_info().rss
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(1)
        with idle_connections(engine.port, sizes.connections):
            engine.check_records(crowd.join())
            assert engine.part("frontend").memory_info().rss - before < 32_768 * sizes.connections + (16 << 20)
    engine.check()


def test_a_storm_of_scrapes(engine: Engine) -> None:
    """Metrics asked for by many at once, while it serves and while a worker is missing."""
    stop = threading.Event()
    statuses: set[int] = set()

    async def scrape() -> None:
        connection = await Connection.open("127.0.0.1", engine.port)
        with contextlib.closing(connection):
            while not stop.is_set():
                status, _ = await connection.send("GET", "/metrics")
                statuses.add(status)
                assert b"quire:kv_blocks" in await connection.whole()

    async def everybody() -> None:
        await asyncio.gather(*(scrape() for _ in range(16)))

    thread = threading.Thread(target=asyncio.run, args=(everybody(),))
    thread.start()
    try:
        with engine.crowd(BODIES) as crowd:
            crowd.flowing(5)
            engine.kill("worker")
            engine.check_records(crowd.join())
    finally:
        stop.set()
        thread.join()
    assert statuses == {200}
    engine.check()


GROWTH_BYTES = 6 << 20  # what allocators keep back or not; benchmarks/soak.py looks closer


def test_nothing_grows(engine: Engine, sizes: Sizes) -> None:
    """Short requests, each on a connection of its own, one in eight hung up on: once to warm up, then again."""
    short = [body | {"max_tokens": 1 + i % 4} for i, body in enumerate(workload(28, first=300))]
    engine.learn(short)
    rude = [endless(2 * i) for i in range(4)]

    def memory() -> dict[str, int]:
        return {role: engine.part(role).memory_full_info().uss for role in ("frontend", "scheduler")}

    def ask_many() -> dict[str, int]:
        with Load(engine.port, short, 16) as load:
            while len(load.ended) < sizes.requests:
                with engine.crowd(rude) as crowd:
                    crowd.flowing(1)
            engine.check_records(load.finish())
        engine.check()
        return memory()

    before, after = ask_many(), ask_many()
    assert all(after[role] - size < GROWTH_BYTES for role, size in before.items()), (before, after)
