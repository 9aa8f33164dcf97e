"""The frontend's end of the wire to the scheduler: one connection, many sequences.

Holds each request until its reader has it all, so that a restarted scheduler can be given it again: a stream pauses,
its reader sees no error. Works on any running event loop; call everything on that loop.
"""

import asyncio
import itertools
import logging
import os
import socket
import time
from collections.abc import Sequence

import zmq.asyncio

from ..common.channel import AsyncLink, wires
from ..common.config import EngineConfig
from ..common.errors import ConfigError, EngineError, QuireError
from ..common.messages import (
    HEARTBEAT_S,
    PEER_TIMEOUT_S,
    PROTOCOL,
    Abort,
    Capacity,
    GetStats,
    Heartbeat,
    Hello,
    Message,
    Output,
    Outputs,
    Refused,
    Shutdown,
    Stats,
    Status,
    ToFrontend,
    Welcome,
)
from ..common.model_info import ModelInfo
from ..common.sampling import SamplingParams
from .streams import EngineDead, Routing, TokenStream

log = logging.getLogger(__name__)

STATS_TIMEOUT_S = 1.0


class EngineClient:
    """Connects to the scheduler at `address`, keeps the connection, and submits sequences.

    `async with EngineClient(address) as client` runs it. Sequences may be submitted once `wait_welcome` has returned;
    they are sent when the engine is ready.
    """

    def __init__(self, address: str) -> None:
        self.status = Status(phase="connecting")
        self.failure: QuireError | None = None  # why the engine is gone for good
        self.ended = False  # failed, or said goodbye
        self._address = wires(address)[0]
        self._welcome: Welcome | None = None
        self._streams: dict[int, TokenStream] = {}  # those the scheduler holds, by wire id
        self._unsent: list[TokenStream] = []  # those that wait until the engine is ready
        self._ids = itertools.count(1)
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._heard = time.monotonic()
        self._lost = False  # welcomed once, but the scheduler has been silent or has restarted since
        self._stats = b""
        self._stats_waiter: asyncio.Future[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "EngineClient":
        self._context = zmq.asyncio.Context()
        self._link: AsyncLink[ToFrontend] = AsyncLink(self._context, self._address, ToFrontend)
        for work in (self._receive(), self._send(), self._beat()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Abort what runs and disconnect. Streams that are still read end with EngineDead."""
        if open_ids := list(self._streams):
            self._outbox.put_nowait(Abort(open_ids))
        self._end(EngineDead("the connection to the engine was closed"))
        while not self._outbox.empty() and not any(task.done() for task in self._tasks):
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._link.close()
        await asyncio.to_thread(self._context.term)  # waits until the Abort is out, a second at most

    @property
    def config(self) -> EngineConfig:
        return self._greeting.config

    @property
    def model(self) -> ModelInfo:
        return self._greeting.model

    @property
    def capacity(self) -> Capacity | None:
        """What the engine can hold; None until it is ready."""
        return self.status.capacity

    @property
    def ready(self) -> bool:
        return self.status.phase == "ready" and not self._lost and not self.ended

    async def changed(self) -> None:
        """Return at the next change of `status`, `failure` or `ended`."""
        await self._changed.wait()

    async def wait_welcome(self) -> Welcome:
        """The scheduler's greeting. Raises what went wrong when there will be none."""
        while self._welcome is None and not self.ended:
            await self.changed()
        self._raise_if_ended()
        return self._greeting

    async def wait_ready(self) -> None:
        """Return when sequences are served. Raises what went wrong when they never will be."""
        while not self.ready and not self.ended:
            await self.changed()
        self._raise_if_ended()

    async def wait_ended(self) -> QuireError | None:
        """Return when the engine is gone for good: why, or None after a goodbye."""
        while not self.ended:
            await self.changed()
        return self.failure

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        routing: Routing | None = None,
        wake: asyncio.Event | None = None,
    ) -> TokenStream:
        """Start one sequence. `sampling` is resolved; `wake` is set when there is something to take.

        Raises EngineDead when the engine is gone.
        """
        if self.ended:
            raise self._gone()
        stream = TokenStream(prompt, sampling, routing or Routing(), abort=self._abort, wake=wake or asyncio.Event())
        self._unsent.append(stream)
        self._send_unsent()
        return stream

    async def stats(self) -> bytes:
        """The scheduler's metrics in Prometheus' text format; the last known ones when it does not answer."""
        if self._stats_waiter is None:
            self._stats_waiter = asyncio.get_running_loop().create_future()
            self._outbox.put_nowait(GetStats())
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                return await asyncio.shield(self._stats_waiter)
        except TimeoutError:
            self._stats_waiter = None
            return self._stats

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            self._heard = time.monotonic()
            if message is not None:
                self._handle(message)

    async def _send(self) -> None:
        while True:
            await self._link.send(await self._outbox.get())

    async def _beat(self) -> None:
        while True:
            silent = time.monotonic() - self._heard > PEER_TIMEOUT_S
            if self._welcome is not None and silent and not self._lost:
                log.warning("the scheduler has been silent for %.0f s", PEER_TIMEOUT_S)
                self._lose()
            elif self._welcome is None or self._lost:
                self._outbox.put_nowait(self._hello())
            else:
                self._outbox.put_nowait(Heartbeat(self._welcome.epoch))
            await asyncio.sleep(HEARTBEAT_S)

    def _handle(self, message: ToFrontend) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    self._output(output)
            case Heartbeat():
                if self._welcome is not None and message.epoch != self._welcome.epoch and not self._lost:
                    self._lose()
            case Welcome():
                self._welcomed(message)
            case Status():
                self._status(message)
            case Stats():
                self._stats = message.text
                if self._stats_waiter is not None and not self._stats_waiter.done():
                    self._stats_waiter.set_result(message.text)
                self._stats_waiter = None
            case Refused():
                self._end(ConfigError(f"the scheduler at {self._address} refused the connection: {message.why}"))
            case Shutdown():
                self._end(None)

    def _output(self, output: Output) -> None:
        stream = self._streams.get(output.id)
        if stream is None:  # aborted meanwhile
            return
        stream.accept(output)
        if stream.done:
            del self._streams[output.id]
            if output.finish is None:  # ended here, by a gap; the engine does not know
                self._outbox.put_nowait(Abort([output.id]))

    def _welcomed(self, welcome: Welcome) -> None:
        known = self._welcome is not None and welcome.epoch == self._welcome.epoch and not self._lost
        if known:  # the answer to a Hello that was repeated
            return
        if self._welcome is not None:
            self._withdraw()
            self.status = Status(phase="connecting")
        self._welcome = welcome
        self._lost = False
        self._announce()

    def _status(self, status: Status) -> None:
        self.status = status
        if status.phase == "failed":
            self._end(EngineDead(status.detail or "the engine failed"))
        self._announce()
        self._send_unsent()

    def _lose(self) -> None:
        """The scheduler that welcomed this process is gone or has dropped it: say Hello until it welcomes again."""
        self._lost = True
        self.status = Status(phase="connecting")
        self._outbox.put_nowait(self._hello())
        self._announce()

    def _withdraw(self) -> None:
        """Take every open sequence back, to submit it again with the ids that are here.

        The scheduler may still hold some, if only its heartbeats were lost; under new ids the old ones cannot interfere.
        """
        if self._streams:
            self._outbox.put_nowait(Abort(list(self._streams)))
            log.info("submitting %d open sequences again", len(self._streams))
        self._unsent = [*self._streams.values(), *self._unsent]
        self._streams = {}

    def _send_unsent(self) -> None:
        if not self.ready or not self._unsent:
            return
        for stream in self._unsent:
            if not stream.done:
                stream.id = next(self._ids)
                self._streams[stream.id] = stream
                self._outbox.put_nowait(stream.submission())
        self._unsent.clear()

    def _abort(self, stream: TokenStream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            self._outbox.put_nowait(Abort([stream.id]))

    def _end(self, failure: QuireError | None) -> None:
        if self.ended:
            return
        self.ended, self.failure = True, failure
        for stream in (*self._streams.values(), *self._unsent):
            stream.fail(self._gone())
        self._streams, self._unsent = {}, []
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the connection to the engine broke", exc_info=error)
            self._end(EngineDead("the connection to the engine broke"))

    def _raise_if_ended(self) -> None:
        if self.ended:
            raise self.failure or self._gone()

    def _gone(self) -> EngineDead:
        """What a request hears of the end."""
        return EngineDead(str(self.failure or "the engine was shut down"))

    @property
    def _greeting(self) -> Welcome:
        if self._welcome is None:
            raise EngineError("the scheduler has not answered yet")
        return self._welcome

    def _hello(self) -> Hello:
        return Hello(protocol=PROTOCOL, role="frontend", name=f"frontend {socket.gethostname()} {os.getpid()}")
