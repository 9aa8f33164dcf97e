"""An HTTP client that costs the server's cores little: a few microseconds for each event, of any OpenAI-compatible server."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import msgspec

Body = dict[str, Any]

_ERROR = (b'data: {"error"', b'data: {"object":"error"', b'{"error"')
_NO_CHOICES = (b'"choices":[]', b'"choices": []')


@dataclass(slots=True)
class Answer:
    """What came of one request, and when. Nothing that went wrong is left out: it is in `error`."""

    sent_at: float = 0.0
    status: int = 0
    times: list[float] = field(default_factory=list)  # of the events that bring output
    ended_at: float = 0.0
    error: str = ""
    tokens: int = 0  # as `usage` counts them; the number of events where the server does not say
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""  # when it was asked for

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent_at

    @property
    def per_token_s(self) -> float:
        """Mean time between two tokens. Only where there are two."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1)

    @property
    def whole_s(self) -> float:
        return self.ended_at - self.sent_at


class Events:
    """Server-Sent Events out of pieces of any size, looked at as bytes; JSON is read once, at the end."""

    __slots__ = ("_answer", "_kept", "_last", "_rest", "done")

    def __init__(self, answer: Answer, *, keep: bool = False) -> None:
        self._answer = answer
        self._rest, self._last = b"", b""
        self._kept: list[bytes] | None = [] if keep else None
        self.done = False

    def feed(self, data: bytes, now: float) -> None:
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                self.done = True
            elif event.startswith(_ERROR):
                self._answer.error = self._answer.error or event.decode(errors="replace")[:300]
            elif event.startswith(b"data:"):
                self._take(event, now)

    def _take(self, event: bytes, now: float) -> None:
        if b'"usage"' in event:
            self._last = event
        if _NO_CHOICES[0] in event or _NO_CHOICES[1] in event:
            return
        times = self._answer.times
        if not times and b'"role"' in event and b'"content":""' in event:  # a chat's first event has no token
            return
        times.append(now)
        if self._kept is not None:
            self._kept.append(event)

    def end(self) -> None:
        """The stream is over: count what came."""
        answer = self._answer
        if not self.done and not answer.error:
            answer.error = "the stream ended without [DONE]"
        usage = msgspec.json.decode(self._last[5:])["usage"] if self._last else None
        _count(answer, usage)
        if self._kept:
            answer.text = "".join(map(_text, (msgspec.json.decode(event[5:]) for event in self._kept)))


def _count(answer: Answer, usage: Body | None) -> None:
    answer.tokens = usage["completion_tokens"] if usage else len(answer.times)
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _text(told: Body) -> str:
    choice = told["choices"][0]
    text: str = (choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")) or ""
    return text


class Connection(asyncio.Protocol):
    """Persistent HTTP/1.1, one request at a time."""

    def __init__(self, host: str) -> None:
        self._host = host.encode()
        self._answer = Answer()
        self._events: Events | None = None
        self._whole: list[bytes] = []
        self._now = 0.0
        self._ended: asyncio.Future[None] | None = None
        self.open = False

    @classmethod
    async def to(cls, host: str, port: int) -> "Connection":
        _, connection = await asyncio.get_running_loop().create_connection(lambda: cls(f"{host}:{port}"), host, port)
        return connection

    async def ask(self, path: str, body: Body, answer: Answer, *, keep: bool = False) -> None:
        """Send, and fill `answer` until its end. What fails stands there. `keep`: the text as well."""
        content = msgspec.json.encode(body)
        self._answer, self._whole, self._keep = answer, [], keep
        self._stream = self._sized = False
        self._events = Events(answer, keep=keep)
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        answer.sent_at = answer.sent_at or time.perf_counter()
        self._transport.write(
            b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (path.encode(), self._host, len(content), content)
        )
        try:
            await self._ended
        except ConnectionError as error:
            answer.error = answer.error or f"connection: {error}"
        finally:
            self._ended = None
        answer.ended_at = time.perf_counter()
        self._conclude(answer)

    def _conclude(self, answer: Answer) -> None:
        if self._stream:
            assert self._events
            self._events.end()
        elif not answer.error:
            whole = b"".join(self._whole)
            if answer.status != 200:
                answer.error = f"{answer.status} {whole.decode(errors='replace')[:300]}"
                return
            told = msgspec.json.decode(whole)
            answer.times = [answer.ended_at]
            _count(answer, told.get("usage"))
            if self._keep:
                answer.text = _text(told)

    def close(self) -> None:
        self._transport.abort()

    # --- what asyncio and httptools tell ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = cast(asyncio.Transport, transport), True  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        if self._answer.status and not self._sized:  # the end of the connection is the end of such an answer
            self.on_message_complete()
        self._fail("closed before the answer had ended")

    def _fail(self, why: str) -> None:
        if self._ended and not self._ended.done():
            self._ended.set_exception(ConnectionError(why))

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"content-type":
                self._stream = value.startswith(b"text/event-stream")
            case b"content-length" | b"transfer-encoding":
                self._sized = True

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._stream:
            assert self._events
            self._events.feed(data, self._now)
        else:
            self._whole.append(data)

    def on_message_complete(self) -> None:
        self.open = self.open and self._parser.should_keep_alive()
        if self._ended and not self._ended.done():
            self._ended.set_result(None)
