"""Typed messages over ZeroMQ: the scheduler binds a `Hub` per wire, every other process connects a `Link`.

A frame that does not decode, or comes twice, is dropped and counted; it never ends a loop. A frame that was lost ends
its conversation (`conversation`), which both sides hear of as `LOST`. Sockets are not shared between threads. `Link`
also exists for asyncio (`AsyncLink`), and `memory_pair` gives both ends without a socket, through the same codec, for
tests and debuggers.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec
import zmq
import zmq.asyncio

from . import curve
from .conversation import NO_CONVERSATION, Conversation, Verdict, outside, split
from .errors import ConfigError
from .messages import MAX_FRAME_BYTES, STRANGER_EPOCH, Heartbeat, Hello, Message, Welcome
from .sockets import EVERYWHERE, NAMED, RETRY_S, Line, dealer, router

log = logging.getLogger(__name__)

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


class Event(Enum):
    """What is heard of a conversation besides its messages."""

    LOST = "lost"  # it is over: frames are missing, or the peer has begun another


LOST: Final = Event.LOST
Lost = Literal[Event.LOST]


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


class Codec(Generic[T]):
    """Decodes the frames of one direction of a wire. `bad_frames` counts those that were dropped."""

    def __init__(self, union: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)
        self.bad_frames = 0

    def decode(self, frame: bytes | memoryview) -> T | None:
        if len(frame) > MAX_FRAME_BYTES:
            self.drop(f"{len(frame)} bytes, the limit is {MAX_FRAME_BYTES}")
            return None
        try:
            message: T = self._decoder.decode(frame)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: strings that are not UTF-8
            self.drop(error)
            return None
        return message

    def drop(self, why: object) -> None:
        self.bad_frames += 1
        if self.bad_frames.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...: a flood does not fill the log
            text = str(why)[:200].encode("unicode_escape").decode()  # it may quote the frame: no line of its making
            log.warning("dropped a frame (%d so far): %s", self.bad_frames, text)


def check_address(address: str) -> None:
    """Internal sockets are ipc:// or tcp:// with an explicit address; raises ConfigError for anything else."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if len(rest.encode()) > 107:  # sun_path holds 108 bytes with its terminator
            raise ConfigError(
                f"{address}: the path of an ipc socket may have 107 bytes, this one has {len(rest.encode())}; use a shorter --run-dir"
            )
        return
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address}: expected tcp://HOST:PORT, with a port up to 65535, or ipc:///PATH")
    if host in {"*", "0.0.0.0", "[::]", "::"}:
        raise ConfigError(f"{address}: {EVERYWHERE}")


def wires(address: str) -> tuple[str, str]:
    """The frontends' and the workers' wire of a scheduler, from the one address that users are asked for.

    tcp://HOST:PORT uses PORT and PORT + 1; ipc:///DIRECTORY two sockets in that directory.
    """
    check_address(address)
    if address.startswith("ipc://"):
        return f"{address}/frontends", f"{address}/workers"
    host, _, port = address.rpartition(":")
    if not 1 <= int(port) < 65535:
        raise ConfigError(f"{address}: the port must be from 1 to 65534; the workers use the one after it")
    return address, f"{host}:{int(port) + 1}"


class Hub(Generic[T]):
    """The bound end of a wire: many peers, each named by the identity that its frames carry."""

    def __init__(
        self, context: zmq.Context[Any], address: str, union: Any, keys: "curve.SchedulerKeys | None" = None
    ) -> None:
        """With `keys` only peers that hold theirs can connect (`curve.admit` must run in `context`). Raises ConfigError
        when the address cannot be bound."""
        check_address(address)
        self.codec: Codec[T] = Codec(union)
        self._conversations: dict[bytes, Conversation] = {}
        self.socket = router(context, address, keys)
        self.address: str = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def received(self, limit: int) -> Iterator[tuple[bytes, T | Lost]]:
        """What is here, each with its sender. Looks at `limit` frames at most, and never waits.

        A peer is heard from its Hello until LOST. One that speaks without Hello is told to say it.
        """
        for _ in range(limit):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                self.codec.drop(f"{len(frames) - 1} parts, expected one")
                continue
            yield from self._heard(*frames)

    def _heard(self, peer: bytes, frame: bytes) -> Iterator[tuple[bytes, T | Lost]]:
        if not peer.startswith(NAMED):  # also what a connection left unread that its peer has replaced by another
            self.codec.drop("its sender has no name")
            return
        conversation = self._conversations.get(peer)
        if not frame:  # the peer has just connected, and may have been in conversation with a hub before this one
            if conversation is None:
                self._ask_for_hello(peer, NO_CONVERSATION)
            return
        try:
            session, number, body = split(frame)
        except ValueError as error:
            self.codec.drop(error)
            return
        if conversation is None or session > conversation.session:
            yield from self._begin(peer, session, number, body)
        else:
            yield from self._go_on(peer, conversation.judge(session, number), body)

    def _begin(self, peer: bytes, session: int, number: int, body: memoryview) -> Iterator[tuple[bytes, T | Lost]]:
        message = self.codec.decode(body)
        if message is None:
            return
        if peer in self._conversations:
            self.forget(peer)
            yield peer, LOST
        if not isinstance(message, Hello) or session == NO_CONVERSATION:
            self._ask_for_hello(peer, session)
            return
        self._conversations[peer] = conversation = Conversation(session, sent=secrets.randbits(48))
        conversation.judge(session, number)
        yield peer, message

    def _go_on(self, peer: bytes, verdict: Verdict, body: memoryview) -> Iterator[tuple[bytes, T | Lost]]:
        match verdict:
            case Verdict.NEXT:
                if (message := self.codec.decode(body)) is not None:
                    yield peer, message
            case Verdict.REPEATED:
                self.codec.drop("it came before")
            case Verdict.OTHER:
                self.codec.drop("it is of a conversation that is over")
            case Verdict.GAP:
                self.ask_for_hello(peer)
                yield peer, LOST

    def forget(self, peer: bytes) -> None:
        """End the conversation: the peer is not heard until it says Hello anew."""
        self._conversations.pop(peer, None)

    def ask_for_hello(self, peer: bytes) -> None:
        """End the conversation and have the peer begin another."""
        ended = self._conversations.pop(peer, None)
        self._ask_for_hello(peer, ended.session if ended else NO_CONVERSATION)

    def send(self, peer: bytes, message: Message) -> bool:
        """False when the peer is gone, reads nothing, or is in no conversation."""
        return self.send_frame(peer, encode(message))

    def send_frame(self, peer: bytes, frame: bytes) -> bool:
        """As `send`, for a message encoded once and sent to several peers."""
        conversation = self._conversations.get(peer)
        return conversation is not None and self._send(peer, conversation.header() + frame)

    def _ask_for_hello(self, peer: bytes, session: int) -> None:
        self._send(peer, outside(session) + _HELLO_PLEASE)

    def _send(self, peer: bytes, frame: bytes) -> bool:
        try:
            self.socket.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def close(self) -> None:
        self.socket.close(linger=1000)


_HELLO_PLEASE = encode(Heartbeat(STRANGER_EPOCH))


class Speaker(Generic[T]):
    """A peer's side of its conversation with the scheduler: messages to frames and back. A Hello begins a new one after
    the Welcome, after LOST, and when the scheduler does not know this one; any other belongs to the same."""

    def __init__(self, union: Any) -> None:
        self.codec: Codec[T] = Codec(union)
        self._conversation = Conversation()
        self._welcomed = False

    def frame(self, message: Message) -> bytes:
        """The next frame to send."""
        if isinstance(message, Hello) and (self._welcomed or not self._conversation.session):
            self._conversation.begin(self._conversation.session + 1)
            self._welcomed = False
        return self._conversation.header() + encode(message)

    def heard(self, frame: bytes) -> T | Lost | None:
        """What a frame says; None when it is dropped."""
        try:
            session, number, body = split(frame)
        except ValueError as error:
            self.codec.drop(error)
            return None
        if session == NO_CONVERSATION:
            self._welcomed |= number == self._conversation.session  # else it speaks of an earlier one
            return self.codec.decode(body)
        match self._conversation.judge(session, number):
            case Verdict.NEXT:
                message = self.codec.decode(body)
                self._welcomed |= isinstance(message, Welcome)
                return message
            case Verdict.REPEATED:
                self.codec.drop("it came before")
            case Verdict.OTHER if session > self._conversation.session:
                self.codec.drop("it is of a conversation that has not begun")
            case Verdict.GAP:
                self._welcomed = True  # so that the next Hello begins another conversation
                return LOST
        return None


class Link(Speaker[T]):
    """The connecting end of a wire. Reconnects by itself; what is sent meanwhile waits.

    At each connection the scheduler is told that there is one: a new scheduler then asks for a Hello at once. This
    happens in `receive`, so call it often.
    """

    def __init__(
        self, context: zmq.Context[Any], address: str, union: Any, keys: "curve.PeerKeys | None" = None
    ) -> None:
        """Raises ConfigError."""
        super().__init__(union)
        check_address(address)
        self.socket = dealer(context, address, keys)
        self._line = Line(self.socket, address)
        self._poller = zmq.Poller()
        for socket in (self.socket, self._line.news):
            self._poller.register(socket, zmq.POLLIN)

    def receive(self, timeout_s: float | None = None) -> T | Lost | None:
        """The next message, LOST, or None when none came in time. None may come early; a `timeout_s` of None is long."""
        if (gave_up_at := self._line.gave_up_at) is not None:
            timeout_s = min(RETRY_S, RETRY_S if timeout_s is None else timeout_s)
            if time.monotonic() - gave_up_at >= RETRY_S:
                self._line.connect_again()
        ready = dict(self._poller.poll(None if timeout_s is None else int(timeout_s * 1000)))
        if self._line.news in ready and self._line.heed(self._line.news.recv_multipart()):
            self._send(b"")
        return self.heard(self.socket.recv()) if self.socket in ready else None

    def send(self, message: Message) -> None:
        """Never waits."""
        self._send(self.frame(message))

    def _send(self, frame: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # there is no connection, nor will be soon: it is lost, and will be missed
            self.socket.send(frame, zmq.NOBLOCK)

    def close(self) -> None:
        self.socket.close(linger=1000)


class AsyncLink(Speaker[T]):
    """`Link` for an event loop, which must run when it is made. One task receives, one sends."""

    def __init__(
        self, context: "zmq.asyncio.Context", address: str, union: Any, keys: "curve.PeerKeys | None" = None
    ) -> None:
        """Raises ConfigError."""
        super().__init__(union)
        check_address(address)
        self.socket = dealer(context, address, keys)
        self._line = Line(self.socket, address)
        self._watching = asyncio.create_task(self._watch())

    async def receive(self) -> T | Lost | None:
        """The next message; LOST; None for a frame that is dropped."""
        return self.heard(await self.socket.recv())

    async def send(self, message: Message) -> None:
        await self._send(self.frame(message))

    async def _send(self, frame: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # as in Link
            await self.socket.send(frame, zmq.NOBLOCK)

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._line.gave_up_at is None else RETRY_S):
                    if self._line.heed(await self._line.news.recv_multipart()):
                        await self._send(b"")
                    continue
            self._line.connect_again()

    def close(self, linger_s: float = 1.0) -> None:
        self._watching.cancel()
        self.socket.close(linger=int(linger_s * 1000))


class MemoryEnd(Generic[T]):
    """One end of a wire without sockets; the interface of `Link`, never waiting."""

    def __init__(self, union: Any) -> None:
        self.codec: Codec[T] = Codec(union)
        self.inbox: deque[bytes] = deque()
        self.peer: MemoryEnd[Any]

    def receive(self, timeout_s: float | None = None) -> T | None:  # noqa: ARG002 (Link's signature)
        return self.codec.decode(self.inbox.popleft()) if self.inbox else None

    def send(self, message: Message) -> None:
        self.peer.inbox.append(encode(message))

    def close(self) -> None:
        self.inbox.clear()


def memory_pair(near_receives: Any, far_receives: Any) -> tuple[MemoryEnd[Any], MemoryEnd[Any]]:
    near: MemoryEnd[Any] = MemoryEnd(near_receives)
    far: MemoryEnd[Any] = MemoryEnd(far_receives)
    near.peer, far.peer = far, near
    return near, far
