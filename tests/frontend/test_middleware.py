"""The layers by themselves, and what an answer tells a client that would try again."""

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from quire.common.config import ServerConfig
from quire.common.errors import RequestError
from quire.common.messages import Output
from quire.frontend.app import App
from quire.frontend.middleware import LARGE_BODIES, SMALL_BODY, BodyLimit
from quire.frontend.service import Service

from .fake_scheduler import FakeScheduler, http
from .raw import parsed, request, send

LIMIT = 1 << 20


class Upload:
    """A request whose body comes as it is told to."""

    def __init__(self, limit: BodyLimit) -> None:
        self._limit = limit
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()

    def send(self, piece: bytes) -> None:
        self._pieces.put_nowait(piece)

    async def run(self) -> None:
        async def receive() -> Message:
            piece = await self._pieces.get()
            return {"type": "http.request", "body": piece, "more_body": bool(piece)}

        async def send(message: Message) -> None:
            pass

        await self._limit({"type": "http", "headers": []}, receive, send)


async def swallow(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.sleep(0.01)  # answering takes its time, but the body is not held meanwhile
    await send({"type": "http.response.body", "body": b""})


def test_bodies_that_arrive_at_once_are_bounded_together() -> None:
    async def main() -> None:
        limit = BodyLimit(swallow, LIMIT)
        for _ in range(3):  # what is let go can be had again
            uploads = [Upload(limit) for _ in range(LARGE_BODIES + 2)]
            running = [asyncio.create_task(upload.run()) for upload in uploads]
            for upload in uploads:
                upload.send(b"a" * LIMIT)
            while sum(task.done() for task in running) < 2:
                await asyncio.sleep(0)
            small = Upload(limit)  # finds a place all the same
            small.send(b"a" * SMALL_BODY)
            small.send(b"")
            await small.run()
            for upload in uploads:
                upload.send(b"")
            done = await asyncio.gather(*running, return_exceptions=True)
            refused = [error for error in done if error is not None]
            assert len(refused) == 2
            assert all(isinstance(error, RequestError) and error.status == 503 for error in refused)

    asyncio.run(main())


class Broken(Service):
    def __init__(self) -> None:
        self.draining = False


@pytest.mark.parametrize(
    "host", ["[", "[::1", "x/health?", "x/health#", "a b", "\xff", "http://evil.example/health", "", ":::"]
)
def test_no_host_makes_a_path_another(host: str) -> None:
    """CVE-2026-48746: a URL is put together from what the client calls the server."""

    def asked(path: str, **headers: str) -> Message:
        return asyncio.run(_answer(path, {"host": host, **headers}))

    assert asked("/v1/models")["status"] == 401
    assert asked("/nothing", authorization="Bearer key")["status"] == 404


async def _answer(path: str, headers: dict[str, str]) -> Message:
    app = App(Broken())
    app.configure(ServerConfig(api_key=("key",)))
    sent: list[Message] = []

    async def collect(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": fields,
    }
    await app(scope, receive, collect)
    return sent[0]


# --- trying again -----------------------------------------------------------------------------------------------------


def test_every_refusal_says_that_trying_again_is_in_vain(url: str, engine: FakeScheduler) -> None:
    answers = {
        400: http.post(f"{url}/v1/completions", content=b"{").headers,
        403: http.get(f"{url}/health", headers={"host": "evil.example"}).headers,
        404: http.get(f"{url}/nothing").headers,
        405: http.get(f"{url}/v1/completions").headers,
        413: request(url, "POST", "/v1/completions", "Content-Length: 1073741824").headers,
        414: http.get(f"{url}/health?{'a' * 9000}").headers,
        431: request(url, "GET", "/health", "x: " + "a" * 66_000).headers,
    }
    for status, headers in answers.items():
        assert headers.get("x-should-retry") == "false", status
    assert parsed(send(url, b"nonsense\r\n\r\n")).headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("answer", "body", "attempts"),
    [
        (lambda submit: None, {"prompt": "a", "temperature": 9}, 1),
        (lambda submit: None, {"prompt": "a", "model": "gpt-9"}, 1),
        (lambda submit: None, {"prompt": [5] * 600}, 1),
        (lambda submit: Output(submit.id, 0, [], "error", error="this one is poison"), {"prompt": "a"}, 1),
        (
            lambda submit: Output(submit.id, 0, [], "error", error="full", rejection="overloaded", retry_after_s=1.0),
            {"prompt": "a"},
            2,
        ),
    ],
    ids=["bad field", "no such model", "too long", "poison", "overload"],
)
def test_a_client_tries_again_only_what_may_help(
    url: str, engine: FakeScheduler, answer: Callable, body: dict, attempts: int
) -> None:
    engine.answer = answer
    sent: list[httpx.Request] = []
    transport = httpx.Client(verify=False, event_hooks={"request": [sent.append]})
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1, http_client=transport) as client,
        pytest.raises(openai.APIStatusError),
    ):
        client.completions.create(**{"model": "tiny", **body})
    assert len(sent) == attempts
