"""HTTP clients that write down everything they are told, token by token, on plain sockets.

One of them costs a tenth of what a library's does, so that the server has the cores, and a crowd of 32 or of 500 is one
thread. Nothing is retried here: what goes wrong for a client stands in its record.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]

STREAM: Body = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
JOIN_S = 120.0  # only a stream that is lost for good takes so long


@dataclass(slots=True)
class Record:
    """What one client was told. Grows while it listens."""

    body: Body
    status: int = 0
    text: str = ""
    counts: list[int] = field(default_factory=list)  # completion tokens, as each event gave them
    times: list[float] = field(default_factory=list)  # of the events with new tokens
    finish: str | None = None
    done: bool = False  # [DONE] was seen, or the whole answer of a request without stream
    error: str = ""  # what the server, the connection or this client has to complain of
    code: str = ""  # of the server's error
    headers: dict[str, str] = field(default_factory=dict)
    ended_at: float = 0.0

    @property
    def tokens(self) -> int:
        return self.counts[-1] if self.counts else 0

    @property
    def well(self) -> bool:
        """A whole answer of 200, without an error, and no token counted twice or backwards."""
        return self.status == 200 and self.done and not self.error and self.counts == sorted(set(self.counts))


class Connection:
    """A persistent HTTP/1.1 connection; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._chunked, self._left = False, 0

    @classmethod
    async def open(cls, host: str, port: int) -> "Connection":
        return cls(*await asyncio.open_connection(host, port))

    async def send(
        self, method: str, path: str, body: Body | None = None, **headers: str
    ) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer; `pieces` then yields its body, and must be read to its end."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(content)}"]
        lines += ["Content-Type: application/json", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        told = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        self._chunked = told.get("transfer-encoding") == "chunked"
        self._left = int(told.get("content-length", "0"))
        return int(head[0].split()[1]), told

    async def pieces(self) -> AsyncIterator[bytes]:
        if not self._chunked:
            if self._left:
                yield await self._reader.readexactly(self._left)
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        self._writer.transport.abort()


async def ask(connection: Connection, body: Body, record: Record, path: str = "/v1/completions") -> None:
    """Send `body` and keep `record` until the answer has ended, however it ends."""
    try:
        record.status, record.headers = await connection.send("POST", path, body)
        if record.headers.get("content-type", "").startswith("text/event-stream"):
            await _listen(connection, record)
        else:
            _take(record, json.loads(await connection.whole()))
            record.done = True
    except (OSError, EOFError, asyncio.IncompleteReadError, ValueError) as error:
        record.error = record.error or f"connection: {error!r}"
    finally:
        record.ended_at = time.monotonic()


async def _listen(connection: Connection, record: Record) -> None:
    rest = b""
    async for piece in connection.pieces():
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if record.done:
                record.error = record.error or "an event behind [DONE]"
            elif event == b"data: [DONE]":
                record.done = True
            else:
                _take(record, json.loads(event.removeprefix(b"data: ")))
    if not record.done and not record.error:
        record.error = "the stream ended without [DONE]"


def _take(record: Record, told: dict[str, Any]) -> None:
    """Of one event, or of a whole answer."""
    if "error" in told:
        record.error = record.error or told["error"]["message"] or "?"
        record.code = told["error"]["code"] or ""
        return
    for choice in told["choices"]:
        record.text += choice["text"]
        record.finish = choice["finish_reason"] or record.finish
    usage = told.get("usage")
    if usage and usage["completion_tokens"] != record.tokens:  # the last event repeats the count
        record.counts.append(usage["completion_tokens"])
        record.times.append(time.monotonic())


class Crowd:
    """Clients in a thread of their own, one for each body, all begun at once. Leaving the block hangs up on the rest."""

    def __init__(
        self, port: int, bodies: Sequence[Body], *, host: str = "127.0.0.1", patience_s: float = JOIN_S
    ) -> None:
        self.records = [Record(body) for body in bodies]
        self._host, self._port, self._patience_s = host, port, patience_s
        self._loop = asyncio.new_event_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()

    def _run(self) -> None:
        self._loop.run_until_complete(self._everybody())
        self._loop.close()

    async def _everybody(self) -> None:
        self._tasks = [asyncio.create_task(self._client(record)) for record in self.records]
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted close in the loop's next turn

    async def _client(self, record: Record) -> None:
        try:
            connection = await Connection.open(self._host, self._port)
        except OSError as error:
            record.error, record.ended_at = f"connection: {error!r}", time.monotonic()
            return
        with contextlib.closing(connection):
            await ask(connection, record.body, record)

    @property
    def over(self) -> bool:
        return all(record.ended_at for record in self.records)

    def wait_for(self, condition: Callable[[Record], object]) -> "Crowd":
        """Until it holds for every client. Raises AssertionError with what they were told when it never does."""
        end = time.monotonic() + self._patience_s
        while not all(condition(record) for record in self.records):
            behind = [r for r in self.records if not condition(r)]
            assert not any(r.ended_at for r in behind), f"ended before that: {[r for r in behind if r.ended_at][:2]}"
            assert time.monotonic() < end, f"{len(behind)} clients wait in vain: {behind[:2]}"
            time.sleep(0.005)
        return self

    def flowing(self, tokens: int = 1) -> "Crowd":
        """Until each client has so many tokens."""
        return self.wait_for(lambda record: record.tokens >= tokens)

    def join(self) -> list[Record]:
        """The records, once all have ended."""
        self._thread.join(self._patience_s)
        assert not self._thread.is_alive(), f"wait in vain: {[r for r in self.records if not r.ended_at][:2]}"
        return self.records

    def hang_up(self) -> None:
        """Close every connection that is open, in the middle of whatever it is."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])
            self._thread.join(self._patience_s)


class Load:
    """So many clients at a time, each asking for one of `bodies` after the other until the end is asked for."""

    def __init__(self, port: int, bodies: Sequence[Body], clients: int) -> None:
        self.records: list[Record] = []  # in the order in which they began
        self._port, self._bodies, self._clients = port, bodies, clients
        self._finish = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    @property
    def ended(self) -> list[Record]:
        return [record for record in self.records if record.ended_at]

    def finish(self) -> list[Record]:
        """Begin nothing more, let everything end; all records."""
        self._finish.set()
        self._thread.join(JOIN_S)
        assert not self._thread.is_alive(), "clients wait in vain"
        return self.records

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(i) for i in range(self._clients)))
        await asyncio.sleep(0)  # as in Crowd

    async def _client(self, turn: int) -> None:
        while not self._finish.is_set():
            record = Record(self._bodies[turn % len(self._bodies)])
            self.records.append(record)
            turn += self._clients
            try:
                connection = await Connection.open("127.0.0.1", self._port)
            except OSError as error:
                record.error, record.ended_at = f"connection: {error!r}", time.monotonic()
            else:
                with contextlib.closing(connection):
                    await ask(connection, record.body, record)


OPENINGS = (
    "import os\n",
    "def main(",
    "class Stack:\n    def push(self",
    "The first",
    "for line in",
    "x = 17 + ",
    "What is",
)


def workload(count: int, max_tokens: int = 70, *, first: int = 0) -> list[Body]:
    """Requests of many lengths, no two alike; every other one samples with a seed of its own, the rest are greedy."""
    return [
        {
            "model": "demo",
            "prompt": f"# {i}\n" + OPENINGS[i % len(OPENINGS)] * (1 + i * i % 11),
            "max_tokens": max_tokens - i % 7,
            "ignore_eos": True,
            **({"temperature": 1.0, "top_p": 1.0, "seed": i} if i % 2 else {"temperature": 0}),
            **STREAM,
        }
        for i in range(first, first + count)
    ]


def whole(body: Body) -> Body:
    """The same request for an answer in one piece."""
    return {name: value for name, value in body.items() if name not in STREAM}
