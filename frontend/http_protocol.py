"""uvicorn's HTTP/1.1 protocol with bounds that it and its parser lack: on connections, on what is not body, and on how
long a request may take to arrive and an answer to be read."""

import asyncio
import logging
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ..common.errors import RequestError
from . import errors
from .connections import Connections
from .middleware import MAX_HEADER_BYTES

log = logging.getLogger(__name__)

MAX_PIPELINED = (
    64  # requests behind one that is not answered yet; each costs memory, and one packet may bring thousands
)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a client may take; the time that we take does not count."""

    head_s: float = 10.0  # a new connection its first byte, and any request its headers
    body_s: float = 60.0
    read_s: float = 60.0  # without taking a byte of what waits for it


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection that outgrows or outwaits a limit, and answers what is not HTTP with our error body."""

    def __init__(self, *args: Any, connections: Connections, timeouts: Timeouts = Timeouts(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places = connections
        self._timeouts = timeouts
        self._phase: Literal["idle", "head", "body"] = "idle"
        self._clock: asyncio.TimerHandle | None = None  # runs while something is to come from the client
        self._overhead = 0  # bytes since the last one of a body, or the beginning or the end of a message
        self._unanswered: deque[RequestResponseCycle] = deque()  # requests whose headers are here, the first one first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        now = time.monotonic()
        if not self._places.admit(self, now):
            self._refuse(RequestError("the server has no place for another connection", status=503))
            return
        _drop_when_unread(transport, self._timeouts.read_s)
        self._places.rests(self, now)
        self._expect("idle", self._timeouts.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._places.left(self)
        self._stop_clock()
        for cycle in self._unanswered:  # uvicorn tells the last one alone, and the others fail where they write
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def give_way(self) -> None:
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._places.asks(self)
        self._overhead += len(data)
        if self._clock is None:  # after a message; uvicorn's own clock stops at any byte, even one that begins none
            self._expect("idle", self._timeouts.head_s)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._overhead > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(RequestError(f"the headers are larger than {MAX_HEADER_BYTES} bytes", status=431))

    def _parse(self, data: bytes) -> None:
        """As uvicorn does, without a line in the log for each client that sends something else."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            log.debug("a client asked for another protocol")
        except httptools.HttpParserError as error:
            log.debug("not HTTP: %s", error)
            self._refuse(RequestError("this is no HTTP request that can be answered"))

    def on_message_begin(self) -> None:
        if len(self._unanswered) > MAX_PIPELINED:
            raise RequestError("too many requests behind one that is not answered yet")  # the parser stops
        super().on_message_begin()
        self._overhead = 0
        self._expect("head", self._timeouts.head_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == "head":  # trailers may not pass for headers: routes and keys are chosen by now
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        self._expect("body", self._timeouts.body_s)

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = 0
        self._phase = "idle"
        self._stop_clock()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()
        if self._phase == "idle" and not self._unanswered:
            self._places.rests(self, time.monotonic())

    def _expect(self, phase: Literal["idle", "head", "body"], within_s: float) -> None:
        self._stop_clock()
        self._phase = phase
        self._clock = self.loop.call_later(within_s, self._expired, within_s)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expired(self, within_s: float) -> None:
        answering = len(self._unanswered) > (self._phase == "body")  # an earlier one than that which is arriving
        if self.flow.read_paused or answering:
            self._expect(self._phase, within_s)  # it is the client that waits, for its turn or for an earlier answer
        elif self._phase == "idle":
            self.transport.close()
        else:
            self._refuse(RequestError(f"the {self._phase} of the request took longer than {within_s:g} s", status=408))

    def _refuse(self, error: RequestError) -> None:
        """Close, after an answer that says why unless another one is being sent, or the request has had its own."""
        is_answered = self._phase == "body" and self.cycle.response_complete
        if not is_answered and not any(cycle.response_started for cycle in self._unanswered):
            content = errors.body(error)
            fields = {"content-type": "application/json", "content-length": str(len(content))}
            fields |= {name.lower(): value for name, value in errors.headers(error).items()} | {"connection": "close"}
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + content)
        self.transport.close()


def _drop_when_unread(transport: asyncio.BaseTransport, after_s: float) -> None:
    """Have the kernel end a connection whose client takes nothing for so long, also when it is closed on our side."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(after_s * 1000))
