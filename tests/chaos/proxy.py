"""A TCP link that misbehaves: what passes may be cut up, delayed, doubled, or end in the middle."""

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable

Treatment = Callable[[bytes, random.Random], AsyncIterator[bytes]]
CUT_SHARE = 0.01  # of the reads, how many end the connection
DOUBLED_SHARE = 0.01


async def slow(data: bytes, rng: random.Random) -> AsyncIterator[bytes]:
    """In pieces of any size, each after up to 10 ms."""
    while data:
        await asyncio.sleep(rng.uniform(0, 0.01))
        at = rng.randint(1, len(data))
        yield data[:at]
        data = data[at:]


async def breaking(data: bytes, rng: random.Random) -> AsyncIterator[bytes]:
    """Half of something, and the connection ends."""
    if rng.random() < CUT_SHARE:
        yield data[: len(data) // 2]
        raise ConnectionAbortedError
    yield data


async def stuttering(data: bytes, rng: random.Random) -> AsyncIterator[bytes]:
    """Some bytes come twice."""
    yield data
    if rng.random() < DOUBLED_SHARE:
        yield data[rng.randrange(len(data)) :]


class Proxy:
    """Listens at `port` and `port + 1` and passes on to `target` and `target + 1`, both ways through `treatment`."""

    def __init__(self, port: int, target: int, treatment: Treatment) -> None:
        self.spoilt = 0  # connections that ended by our doing
        self._ports = ((port, target), (port + 1, target + 1))
        self._treatment = treatment
        self._rng = random.Random(7)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        self._servers = [
            await asyncio.start_server(lambda r, w, t=target: self._connect(r, w, t), "127.0.0.1", port)
            for port, target in self._ports
        ]

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
            ways = [
                asyncio.ensure_future(self._pass(reader, there_writer)),
                asyncio.ensure_future(self._pass(there_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                there_writer.transport.abort()
        writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                try:
                    async for piece in self._treatment(data, self._rng):
                        writer.write(piece)
                        await writer.drain()
                except ConnectionAbortedError:
                    self.spoilt += 1
                    return
