"""uvicorn's HTTP/1.1 protocol with bounds that it and its parser lack: on what is not body, and on how long a request
may take to arrive."""

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..common.errors import RequestError
from . import errors
from .middleware import MAX_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds a client may take to send; the time that we take does not count."""

    head_s: float = 10.0  # a new connection its first byte, and any request its headers
    body_s: float = 60.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection that outgrows or outwaits a limit, and answers what is not HTTP with our error body."""

    def __init__(self, *args: Any, timeouts: Timeouts = Timeouts(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeouts = timeouts
        self._phase: Literal["idle", "head", "body"] = "idle"
        self._clock: asyncio.TimerHandle | None = None  # runs while something is to come from the client
        self._overhead = 0  # bytes since the last one of a body, or the beginning or the end of a message

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect("idle", self._timeouts.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        if self._clock is None:  # after a message; uvicorn's own clock stops at any byte, even one that begins none
            self._expect("idle", self._timeouts.head_s)
        super().data_received(data)
        if self._overhead > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(RequestError(f"the headers are larger than {MAX_HEADER_BYTES} bytes", status=431))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._overhead = 0
        self._expect("head", self._timeouts.head_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == "head":  # trailers may not pass for headers: routes and keys are chosen by now
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._expect("body", self._timeouts.body_s)

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = 0
        self._phase = "idle"
        self._stop_clock()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError(msg))

    def _expect(self, phase: Literal["idle", "head", "body"], within_s: float) -> None:
        self._stop_clock()
        self._phase = phase
        self._clock = self.loop.call_later(within_s, self._expired, within_s)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expired(self, within_s: float) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or (answering and self._phase != "body"):
            self._expect(self._phase, within_s)  # it is the client that waits: for its turn, or for an earlier answer
        elif self._phase == "idle" or (self._phase == "body" and self.cycle.response_started):
            self.transport.close()
        else:
            self._refuse(RequestError(f"the {self._phase} of the request took longer than {within_s:g} s", status=408))

    def _refuse(self, error: RequestError) -> None:
        content = errors.body(error)
        head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[error.status] + head.encode() + content)
        self.transport.close()
