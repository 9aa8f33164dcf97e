"""The frontend's side of the engine: its state, and many sequences over one conversation with the scheduler.

Holds each request until its reader has it all. When the scheduler is another than before, or frames were lost, every
open sequence is submitted again with the ids that are here: a stream pauses, its reader sees no error. While there is
no scheduler, requests wait here. Works on any running event loop; call everything on that loop.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from ..common.channel import LOST, Lost, wires
from ..common.config import EngineConfig, SchedulerConfig
from ..common.curve import PeerKeys
from ..common.errors import ConfigError, EngineError, QuireError, RequestError
from ..common.messages import (
    PEER_TIMEOUT_S,
    Abort,
    Capacity,
    GetStats,
    Heartbeat,
    Outputs,
    Refused,
    Shutdown,
    Stats,
    Status,
    ToFrontend,
    Welcome,
)
from ..common.model_info import ModelInfo
from ..common.pins import GetPins, Pinned
from ..common.sampling import SamplingParams
from .errors import retry_after
from .scheduler_link import SchedulerLink
from .sequences import Sequences
from .streams import EngineDead, Routing, TokenStream

log = logging.getLogger(__name__)

STATS_TIMEOUT_S = 1.0
PINS_TIMEOUT_S = 1.0
CONNECTING = Status(phase="connecting")
SERVING = frozenset({"ready", "recovering", "stalled"})  # phases in which the scheduler takes sequences
QUEUED_PER_SEQ = 16  # what --max-num-queued-reqs is by default, for each of --max-num-seqs


class EngineClient:
    """Connects to the scheduler at `address`, keeps the connection, and submits sequences.

    `async with EngineClient(address) as client` runs it; `keys` are for a scheduler that asks for them. Sequences may
    be submitted once `wait_welcome` has returned; they are sent when the scheduler takes them.
    """

    def __init__(self, address: str, keys: PeerKeys | None = None) -> None:
        self.status = CONNECTING  # what the scheduler said last; "connecting" when there is none
        self.capacity: Capacity | None = None  # what the engine can hold, once it has been ready
        self.served = False  # the engine has been ready
        self.failure: QuireError | None = None  # why the engine is gone for good
        self.ended = False  # failed, or said goodbye
        self._address, self._keys = wires(address)[0], keys
        self._link = SchedulerLink(self._hear, self._heard_again, self._broke, self._end_overdue)
        self._sequences = Sequences()
        self._changed = asyncio.Event()
        self._stats = b""
        self._stats_waiter: asyncio.Future[bytes] | None = None
        self._pin_waiters: dict[int, asyncio.Future[Pinned]] = {}  # by serial
        self._pin_serial = 0

    async def __aenter__(self) -> "EngineClient":
        self._link.connect(self._address, self._keys)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Abort what runs and disconnect. Streams that are still read end with EngineDead."""
        abort = Abort(self._sequences.held_ids)
        if not self.ended:
            self._finish(EngineDead("the connection to the engine was closed"))
        await self._link.close([abort])

    @property
    def config(self) -> EngineConfig:
        return self._greeting.config

    @property
    def model(self) -> ModelInfo:
        return self._greeting.model

    @property
    def ready(self) -> bool:
        return self.status.phase == "ready" and self._takes_sequences

    @property
    def silent(self) -> bool:
        """The scheduler was there, and has not been heard for PEER_TIMEOUT_S."""
        return self._link.silent

    async def changed(self) -> None:
        """Return at the next change of `status`, `failure` or `ended`, and when the scheduler is heard again."""
        await self._changed.wait()

    async def wait_welcome(self) -> Welcome:
        """The scheduler's greeting. Raises what went wrong when there will be none."""
        while self._link.welcome is None and not self.ended:
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

    def give_up(self, why: str) -> None:
        """The engine is gone for good, as somebody knows who started it. Every stream ends with EngineDead."""
        self._end(EngineDead(why))

    def dismiss(self, error: QuireError) -> None:
        """End every sequence with `error`. The engine goes on."""
        self._link.post(Abort(self._sequences.held_ids))
        self._sequences.end(error)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        routing: Routing | None = None,
        wake: asyncio.Event | None = None,
    ) -> TokenStream:
        """Start one sequence. `sampling` is resolved; `wake` is set when there is something to take.

        Raises EngineDead when the engine is gone, RequestError when too many wait for a scheduler.
        """
        if self.ended:
            raise self._gone()
        if not self._takes_sequences and len(self._sequences) >= num_held(self.config.scheduler):
            raise RequestError(
                "too many requests wait for the engine to recover",
                status=self._overload_status,
                code="overloaded",
                headers=retry_after(PEER_TIMEOUT_S),
            )
        stream = TokenStream(prompt, sampling, routing or Routing(), abort=self._abort, wake=wake or asyncio.Event())
        self._sequences.add(stream)
        self._submit_due()
        return stream

    async def stats(self) -> bytes:
        """The scheduler's metrics in Prometheus' text format; the last known ones when it does not answer."""
        if not self._link.connected or self.silent:
            return self._stats
        if self._stats_waiter is None:
            self._stats_waiter = asyncio.get_running_loop().create_future()
            self._link.post(GetStats())
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                return await asyncio.shield(self._stats_waiter)
        except TimeoutError:
            self._stats_waiter = None
            return self._stats

    async def pins(self, *, unpin: bool = False, tenant: str | None = None, id: int = 0) -> Pinned:
        """What is pinned: all, or a tenant's, or the one of this id; with `unpin` it is no more. Raises RequestError when
        no scheduler answers: it may have heard, then."""
        self._pin_serial = serial = self._pin_serial + 1
        waiter: asyncio.Future[Pinned] = asyncio.get_running_loop().create_future()
        self._pin_waiters[serial] = waiter
        self._link.post(GetPins(serial, unpin, tenant, id))
        try:
            async with asyncio.timeout(PINS_TIMEOUT_S):
                return await waiter
        except TimeoutError:
            raise RequestError("the scheduler does not answer", status=503, headers=retry_after(1)) from None
        finally:
            del self._pin_waiters[serial]

    # --- what the scheduler says --------------------------------------------------------------------------------------

    def _hear(self, message: ToFrontend | Lost) -> None:
        match message:
            case Outputs():
                self._output(message)
            case Heartbeat():
                self._submit_due()  # those that had a rest
            case Welcome():
                self._welcomed(message)
            case Status():
                self._status(message)
            case Stats():
                self._stats = message.text
                if self._stats_waiter is not None and not self._stats_waiter.done():
                    self._stats_waiter.set_result(message.text)
                self._stats_waiter = None
            case Pinned(serial):
                if (waiter := self._pin_waiters.get(serial)) is not None and not waiter.done():
                    waiter.set_result(message)
            case Refused():
                self._end(ConfigError(f"the scheduler at {self._address} refused the connection: {message.why}"))
            case Shutdown():
                self._end(None)
            case _ if message is LOST:
                self.status = CONNECTING
                self._announce()

    def _output(self, message: Outputs) -> None:
        now = time.monotonic()
        for output in message.outputs:
            unwanted = self._sequences.accept(output, overload_status=self._overload_status, now=now)
            if unwanted is not None:
                self._link.post(Abort([unwanted]))
        self._submit_due()  # a suspect that had a token makes room for the next

    def _welcomed(self, welcome: Welcome) -> None:
        before = self._link.welcome
        if before is not None:
            if _tokenizer_of(welcome) != _tokenizer_of(before):
                self._end(EngineDead(f"the scheduler serves another model than before: {welcome.model.model}"))
                return
            if num_again := self._sequences.withdraw(died=welcome.epoch != before.epoch):
                log.info("submitting %d open sequences again", num_again)
        self.status = CONNECTING  # until it says more, which it does at once
        self._announce()

    def _status(self, status: Status) -> None:
        self.status = status
        self.capacity = status.capacity or self.capacity
        self.served |= status.phase in SERVING
        if status.phase == "failed":
            self._end(EngineDead(status.detail or "the engine failed"))
        self._announce()
        self._submit_due()

    def _heard_again(self) -> None:
        self._announce()
        self._submit_due()

    def _broke(self, error: BaseException) -> None:
        log.error("the connection to the engine broke", exc_info=error)
        self._end(EngineDead("the connection to the engine broke"))

    # --- what follows from it -----------------------------------------------------------------------------------------

    @property
    def _takes_sequences(self) -> bool:
        return self._link.connected and self.status.phase in SERVING and not self.ended and not self.silent

    @property
    def _overload_status(self) -> int:
        return int(self.config.server.overload_status)

    def _submit_due(self) -> None:
        if self._takes_sequences:
            for submission in self._sequences.due(time.monotonic()):
                self._link.post(submission)

    def _end_overdue(self) -> None:
        if len(self._sequences):
            late = self._sequences.overdue(overload_status=self._overload_status, now=time.monotonic())
            if late:
                self._link.post(Abort(late))
                self._submit_due()

    def _abort(self, stream: TokenStream) -> None:
        id = self._sequences.remove(stream)
        if id is not None:
            self._link.post(Abort([id]))
            self._submit_due()

    def _end(self, failure: QuireError | None) -> None:
        if not self.ended:
            self._link.stop()
            self._finish(failure)

    def _finish(self, failure: QuireError | None) -> None:
        self.ended, self.failure = True, failure
        self._sequences.end(self._gone())
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _raise_if_ended(self) -> None:
        if self.ended:
            raise self.failure or self._gone()

    def _gone(self) -> EngineDead:
        """What a request hears of the end."""
        return EngineDead(str(self.failure or "the engine was shut down"))

    @property
    def _greeting(self) -> Welcome:
        if self._link.welcome is None:
            raise EngineError("the scheduler has not answered yet")
        return self._link.welcome


def num_held(config: SchedulerConfig) -> int:
    """Sequences that may be open while there is no scheduler to take them: as many as one would take."""
    return config.max_num_seqs + (config.max_num_queued_reqs or QUEUED_PER_SEQ * config.max_num_seqs)


def _tokenizer_of(welcome: Welcome) -> tuple[str, str | None]:
    """What decides whether the tokenizer that is loaded fits."""
    return welcome.model.fingerprint, welcome.config.model.tokenizer
