"""A frontend's conversation with the scheduler: kept up, and begun anew when frames were lost or the scheduler was.

Works on a running event loop; call everything on that loop.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence

import zmq.asyncio

from ..common.channel import LOST, AsyncLink, Lost
from ..common.curve import PeerKeys
from ..common.messages import (
    HEARTBEAT_S,
    PEER_TIMEOUT_S,
    PROTOCOL,
    Abort,
    Heartbeat,
    Hello,
    Message,
    ToFrontend,
    Welcome,
)

log = logging.getLogger(__name__)

HELLO_PAUSE_S = 0.02  # between two Hellos: a scheduler that knows us not asks for one at every frame


class SchedulerLink:
    """One connection, which reconnects by itself, and the conversation on it.

    `hear` is given what the scheduler says; a Welcome only if it begins a conversation, and LOST when one is over: what
    was asked in it is forgotten, and a Welcome will follow. `heard_again` is called after a silence, `broke` with what
    no conversation can mend, `tick` every HEARTBEAT_S, be there a scheduler or not.
    """

    def __init__(
        self,
        hear: Callable[[ToFrontend | Lost], None],
        heard_again: Callable[[], None],
        broke: Callable[[BaseException], None],
        tick: Callable[[], None],
    ) -> None:
        self.welcome: Welcome | None = None  # the last one
        self.connected = False  # in the conversation that it began
        self._hear, self._heard_again, self._broke, self._tick = hear, heard_again, broke, tick
        self._outbox: list[Message] = []
        self._to_send = asyncio.Event()
        self._heard_at = self._beat_at = time.monotonic()
        self._asked_at = 0.0
        self._asking: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def connect(self, address: str, keys: PeerKeys | None) -> None:
        self._context = zmq.asyncio.Context()
        self._link: AsyncLink[ToFrontend] = AsyncLink(self._context, address, ToFrontend, keys)
        for work in (self._receive(), self._send(), self._beat()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    async def close(self, last_words: Sequence[Message]) -> None:
        """Disconnect. What was posted goes out first, if somebody is there to hear it, and `last_words` behind it."""
        heard = self.connected
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for message in _aborts_as_one([*self._outbox, *last_words]) if heard else ():
            await self._link.send(message)
        self._link.close(linger_s=1.0 if heard else 0.0)
        await asyncio.to_thread(self._context.term)  # waits until the last words are out, a second at most

    @property
    def silent(self) -> bool:
        """The scheduler was there, and has not been heard for PEER_TIMEOUT_S. Time that this process was stopped for
        does not count."""
        now = time.monotonic()
        awake = now - self._beat_at < 2 * HEARTBEAT_S
        return self.welcome is not None and awake and now - self._heard_at > PEER_TIMEOUT_S

    def post(self, message: Message) -> None:
        """Send it in this conversation; void when there is none."""
        if self.connected:
            self._put(message)

    def stop(self) -> None:
        """There is nobody to talk to any more: say nothing, hear nothing."""
        self.connected = False
        if self._asking is not None:
            self._asking.cancel()
        for task in self._tasks:
            task.cancel()

    # --- tasks --------------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            was_silent, self._heard_at = self.silent, time.monotonic()
            if was_silent:
                log.info("the scheduler is heard again")
                self._heard_again()
            if message is not None:
                self._handle(message)

    async def _send(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            messages, self._outbox = self._outbox, []
            for message in _aborts_as_one(messages):
                if isinstance(message, Hello) and self.connected:
                    continue  # welcomed meanwhile: it would begin another conversation, and drop what runs
                await self._link.send(message)

    async def _beat(self) -> None:
        was_silent = False
        while True:
            now = time.monotonic()
            if now - self._beat_at >= 2 * HEARTBEAT_S:
                self._heard_at = now  # it was this process that was away
            self._beat_at = now
            if self.silent and not was_silent:
                log.warning("the scheduler has been silent for %.0f s", PEER_TIMEOUT_S)
            was_silent = self.silent
            if self.connected:
                self._put(self._heartbeat())
            else:
                self._say_hello()
            self._tick()
            await asyncio.sleep(HEARTBEAT_S)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broke(error)

    # --- the conversation ---------------------------------------------------------------------------------------------

    def _handle(self, message: ToFrontend | Lost) -> None:
        match message:
            case Welcome():
                if self.connected and self.welcome and message.epoch == self.welcome.epoch:
                    return  # the answer to a Hello that was repeated
                self.connected = True
                self._hear(message)
                self.welcome = message
            case Heartbeat(epoch) if not self.connected or self.welcome is None or epoch != self.welcome.epoch:
                self._begin_anew("the scheduler is another, or knows this process no more")
            case _ if message is LOST:
                self._begin_anew("frames of the scheduler were lost")
            case _:
                self._hear(message)

    def _begin_anew(self, why: str) -> None:
        """Say Hello until the scheduler welcomes. What was to be said is void: it forgets all that was asked."""
        if self.connected:
            log.info("%s", why)
            self.connected = False
            self._outbox.clear()
            self._hear(LOST)
        if self._asking is None:
            wait_s = self._asked_at + HELLO_PAUSE_S - time.monotonic()
            self._asking = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._say_hello)

    def _say_hello(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        if not self.connected:
            self._asked_at = time.monotonic()
            name = f"frontend {socket.gethostname()} {os.getpid()}"
            self._put(Hello(protocol=PROTOCOL, role="frontend", name=name))

    def _heartbeat(self) -> Heartbeat:
        assert self.welcome is not None
        return Heartbeat(self.welcome.epoch, self._link.codec.bad_frames)

    def _put(self, message: Message) -> None:
        self._outbox.append(message)
        self._to_send.set()


def _aborts_as_one(messages: Sequence[Message]) -> list[Message]:
    """The same, with one Abort behind all else: hundreds of clients may go away at once."""
    ids = [id for message in messages if isinstance(message, Abort) for id in message.ids]
    others = [message for message in messages if not isinstance(message, Abort)]
    return [*others, Abort(ids)] if ids else others
