"""Clients that go away, at once or in crowds, and clients that do not read: only their own sequences end."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import uvicorn

from quire.common.config import ServerConfig
from quire.frontend.app import App
from quire.frontend.engine_client import EngineClient
from quire.frontend.generator import Generator
from quire.frontend.http_protocol import BoundedHttpProtocol
from quire.frontend.service import Service
from quire.frontend.tokenizer import Tokenizer

from .fake_scheduler import (
    FakeScheduler,
    frontend_process,
    http,
    never_reading,
    send_request,
    until,
    wait_ready,
)

LONG = {"prompt": "hello world", "max_tokens": 450, "ignore_eos": True, "seed": 0, "stream": True}


@pytest.fixture
def scheduler(make_scheduler) -> Iterator[FakeScheduler]:
    with make_scheduler() as scheduler:
        yield scheduler


def test_five_hundred_clients_that_go_away_free_their_sequences(scheduler: FakeScheduler) -> None:
    scheduler.delay_s = 0.1
    with frontend_process(scheduler.address) as (_, url), contextlib.ExitStack() as stack:
        wait_ready(url)
        clients = [stack.enter_context(socket.socket()) for _ in range(500)]
        for client in clients:
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            send_request(client, LONG)
        until(lambda: scheduler.num_running == 500, 30)
        for client in clients:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        for client in clients:
            client.close()
        until(lambda: not scheduler.num_running)
        assert time.monotonic() - began < 1.0
        assert sorted(scheduler.aborts) == sorted(submit.id for submit in scheduler.submits)
        assert scheduler.abort_messages < 250
        assert http.get(f"{url}/health").status_code == 200


def test_a_client_that_goes_away_at_the_last_moment_leaves_no_trace(scheduler: FakeScheduler, tmp_path: Path) -> None:
    """Between the last token and the end of the stream, or anywhere before: nothing is logged."""
    log = tmp_path / "log"
    with frontend_process(scheduler.address, log=log) as (_, url):
        wait_ready(url)
        for wanted in (b'"finish_reason":"length"', b"[DONE]", b"data:") * 5:
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
                send_request(client, {**LONG, "max_tokens": 3})
                received = b""
                while wanted not in received:
                    received += (new := client.recv(16))
                    assert new
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        until(lambda: not scheduler.num_running)
        assert http.get(f"{url}/health").status_code == 200
    text = log.read_text()
    assert "Traceback" not in text and "ERROR" not in text and "WARNING" not in text


@contextlib.contextmanager
def serving(scheduler: FakeScheduler, model_dir: Path, *, write_stall_s: float) -> Iterator[str]:
    """A frontend in a thread, whose kernel takes little of an answer that is not read."""
    ready, server = threading.Event(), None

    async def serve(sock: socket.socket) -> None:
        nonlocal server
        async with EngineClient(scheduler.address) as client:
            await client.wait_ready()
            service = Service(client, write_stall_s=write_stall_s)
            service.generator = Generator(client, Tokenizer.load(model_dir))
            app = App(service)
            app.configure(ServerConfig())
            protocol = partial(BoundedHttpProtocol, connections=app.connections)
            server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_config=None))  # type: ignore[arg-type]
            ready.set()
            await server.serve([sock])

    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=lambda: asyncio.run(serve(sock)), daemon=True)
        thread.start()
        assert ready.wait(10) and server is not None
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = server.force_exit = True
        thread.join()


def text_of(stream: str) -> str:
    events = [event.removeprefix("data: ") for event in stream.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return "".join(msgspec.json.decode(event)["choices"][0]["text"] for event in events)


def test_a_client_that_reads_nothing_is_dropped_and_costs_nobody_else(
    scheduler: FakeScheduler, model_dir: Path
) -> None:
    with serving(scheduler, model_dir, write_stall_s=0.5) as url:
        undisturbed = text_of(http.post(f"{url}/v1/completions", json=LONG).text)
        scheduler.delay_s = 0.005
        with never_reading(url, {**LONG, "n": 4}) as stuck:
            until(lambda: scheduler.num_running == 4)
            assert text_of(http.post(f"{url}/v1/completions", json=LONG).text) == undisturbed
            until(lambda: len(scheduler.aborts) == 4 and not scheduler.num_running)
            assert set(scheduler.aborts) == {submit.id for submit in scheduler.submits[1:5]}
            stuck.settimeout(5)
            received = b""
            while new := stuck.recv(65536):
                received += new
            assert b"[DONE]" not in received and 1000 < len(received) < 1e6
