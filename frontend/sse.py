"""Server-sent events, and clients that go away."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..common.errors import EngineError, RequestError
from . import errors

log = logging.getLogger(__name__)

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
WRITE_STALL_S = 60.0  # a reader that takes nothing for so long is treated as gone


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventTemplate:
    """Events that differ in one text alone: all around it is encoded once."""

    def __init__(self, example: bytes, field: str) -> None:
        """`example` is such an event, with "" in that field."""
        name = f'"{field}":'.encode()
        head, self._tail = example.split(name + b'""')  # nowhere else: quotes within a text are escaped
        self._head = head + name

    def event(self, text: str) -> bytes:
        return self._head + msgspec.json.encode(text) + self._tail


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client goes away first, `work` is cancelled and ClientGone raised."""
    presence = asyncio.timeout(None)
    try:
        async with presence:
            gone = asyncio.create_task(_end_when_gone(receive, presence))
            try:
                return await work
            finally:
                gone.cancel()
    except TimeoutError:
        if presence.expired():
            raise ClientGone from None
        raise


class EventStream(Response):
    """Sends `first` and `events`, each a whole frame, and closes `events` at the end, whoever ended it.

    Errors become a last event, since the status has been sent; what is no error of the request's is logged. A reader
    that takes nothing for `write_stall_s` is treated as gone.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        *,
        write_stall_s: float = WRITE_STALL_S,
    ) -> None:
        self._first = first
        self._events = events
        self._write_stall_s = write_stall_s
        self._writing_since: float | None = None
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._send(send, request_id_of(scope)))
        except ClientGone:
            log.debug("a client went away in the middle of a stream")
        except TimeoutError:
            log.info("a client took nothing of its stream for %g s and is dropped", self._write_stall_s)
        finally:
            await self._events.aclose()

    async def _send(self, send: Send, request_id: str) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as patience:
            self._watch(loop, patience)
            try:
                async for frame in self._frames(request_id):
                    self._writing_since = loop.time()
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                    self._writing_since = None
            finally:
                self._clock.cancel()
        await send({"type": "http.response.body", "body": b""})

    def _watch(self, loop: asyncio.AbstractEventLoop, patience: asyncio.Timeout) -> None:
        """End a write that has waited for too long. One timer for the stream: one for each write would cost as much as
        the write."""
        now = loop.time()
        due = (now if self._writing_since is None else self._writing_since) + self._write_stall_s
        if due <= now:
            patience.reschedule(now)
        else:
            self._clock = loop.call_at(due, self._watch, loop, patience)

    async def _frames(self, request_id: str) -> AsyncIterator[bytes]:
        yield self._first
        try:
            async for frame in self._events:
                yield frame
            yield DONE
        except (RequestError, EngineError) as error:
            yield _error_event(errors.as_request_error(error, request_id))
        except Exception:
            log.exception("a stream ended with an error of ours")
            yield _error_event(errors.internal_error())


async def started(request: Request, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> EventStream:
    """A stream whose first event is there: what goes wrong before it is still answered with a status of its own."""
    first = await while_connected(request.receive, _next(events))
    return EventStream(first, events, headers, write_stall_s=request.app.state.service.write_stall_s)


def request_id_of(scope: Scope) -> str:
    """As `middleware.RequestIds` has named the request."""
    name: str = scope.get("state", {}).get("request_id", "")
    return name


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


def _error_event(error: RequestError) -> bytes:
    return b"data: " + errors.body(error) + b"\n\n"


async def _end_when_gone(receive: Receive, presence: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    presence.reschedule(asyncio.get_running_loop().time())
