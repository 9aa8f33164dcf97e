"""Bugs of ours: the client hears that there was one, the log what it was, and neither stops the server."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from quire.frontend.app import App
from quire.frontend.openai.responses import Completion, CompletionChoice
from quire.frontend.service import Service
from quire.frontend.sse import ClientGone, EventStream, EventTemplate, event, while_connected


class Broken(Service):
    def __init__(self) -> None:
        self.draining = False

    @property
    def unavailable(self) -> None:  # type: ignore[override]
        raise RuntimeError("a secret at 0x7f00")


def test_an_exception_in_a_route_is_500_without_internals() -> None:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(App(Broken()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/v1/models")

    answer = asyncio.run(main())
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text and "0x" not in answer.text and answer.headers["x-request-id"]


def test_a_client_that_goes_away_while_it_sends_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    class Ready(Service):
        def __init__(self) -> None:
            pass

        def require(self) -> None:  # type: ignore[override]
            return None

    async def main() -> list[Message]:
        messages: list[Message] = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        await App(Ready())(scope, receive, send)
        return sent

    assert asyncio.run(main())[0]["status"] == 499
    assert not caplog.records


def test_an_exception_in_a_stream_is_its_last_event(caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 2\n\n"
            raise RuntimeError("a secret")
        finally:
            closed.append(True)

    async def main() -> bytes:
        sent: list[bytes] = []

        async def send(message: Message) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Message:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        await EventStream(b"data: 1\n\n", events(), {})({"type": "http"}, receive, send)
        return b"".join(sent)

    with caplog.at_level(logging.ERROR):
        text = asyncio.run(main()).decode()
    assert text.startswith("data: 1\n\ndata: 2\n\ndata: {") and '"internal_error"' in text
    assert "secret" not in text and "[DONE]" not in text and "a secret" in caplog.text and closed == [True]


@pytest.mark.parametrize(
    "text", ["", "plain", '"quoted": "text":""', "a\\b\n\t\0\x7f", "žluťoučký \u2028 \U0001f600", "</script>"]
)
def test_a_template_says_what_the_encoder_says(text: str) -> None:
    def told(new: str) -> bytes:
        choice = CompletionChoice(3, new, None)
        return event(Completion('"text":"" {', 7, '\\"text":""', [choice], usage=None))

    assert EventTemplate(told(""), "text").event(text) == told(text)


def test_work_is_cancelled_when_the_client_goes_away() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        await while_connected(request.receive, work())

    with pytest.raises(ClientGone):
        asyncio.run(main())
    assert cancelled == [True]


def test_every_route_that_takes_a_body_describes_it(url: str) -> None:
    answer = httpx.get(f"{url}/openapi.json")
    assert answer.status_code == 200, answer.text
    paths = answer.json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= paths.keys()
    for path, methods in paths.items():
        if "post" in methods:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert schema["properties"], path
