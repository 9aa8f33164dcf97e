"""Typed messages over ZeroMQ: the scheduler binds a `Hub` per wire, every other process connects a `Link`.

A frame that does not decode is dropped and counted; it never ends a loop. Sockets are not shared between threads.
`Link` also exists for asyncio (`AsyncLink`), and `memory_pair` gives both ends without a socket, through the same
codec, for tests and debuggers.
"""

import contextlib
import logging
import os
import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from .errors import ConfigError
from .messages import HEARTBEAT_S, MAX_FRAME_BYTES, Message

log = logging.getLogger(__name__)

HUB_BACKLOG = 10_000  # frames of one peer that may wait here; beyond that they wait at the sender
LINK_TIMEOUT_S = 30.0  # a host unheard of for this long is gone; a process paused in a debugger for less is not

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


class Codec(Generic[T]):
    """Decodes the frames of one direction of a wire. `bad_frames` counts those that were dropped."""

    def __init__(self, union: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)
        self.bad_frames = 0

    def decode(self, frame: bytes) -> T | None:
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
            log.warning("dropped a frame that does not decode (%d so far): %s", self.bad_frames, why)


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
        raise ConfigError(f"{address}: internal sockets do not listen on every interface; name the address of one")


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

    def __init__(self, context: zmq.Context[Any], address: str, union: Any) -> None:
        """Raises ConfigError when the address cannot be bound."""
        check_address(address)
        self.codec: Codec[T] = Codec(union)
        self.socket = context.socket(zmq.ROUTER)
        _tune(self.socket, address)
        self.socket.setsockopt(zmq.RCVHWM, HUB_BACKLOG)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error here, not a silent loss
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects takes its identity along
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
        self.address: str = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def received(self, limit: int) -> Iterator[tuple[bytes, T]]:
        """The messages that are here, each with its sender. Looks at `limit` frames at most, and never waits."""
        for _ in range(limit):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                self.codec.drop(f"{len(frames) - 1} parts, expected one")
            elif (message := self.codec.decode(frames[1])) is not None:
                yield frames[0], message

    def send(self, peer: bytes, message: Message) -> bool:
        """False when the peer is gone."""
        return self.send_frame(peer, encode(message))

    def send_frame(self, peer: bytes, frame: bytes) -> bool:
        """As `send`, for a message encoded once and sent to several peers."""
        try:
            self.socket.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def close(self) -> None:
        self.socket.close(linger=1000)


class Link(Generic[T]):
    """The connecting end of a wire. Reconnects by itself; what is sent meanwhile waits."""

    def __init__(self, context: zmq.Context[Any], address: str, union: Any) -> None:
        self.codec: Codec[T] = Codec(union)
        self.socket = _dealer(context, address)

    def receive(self, timeout_s: float | None = None) -> T | None:
        """The next message, or None when none came in time (or only one that does not decode). None waits for ever."""
        if not self.socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        return self.codec.decode(self.socket.recv())

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def close(self) -> None:
        self.socket.close(linger=1000)


class AsyncLink(Generic[T]):
    """`Link` for an event loop. One task receives; any may send."""

    def __init__(self, context: "zmq.asyncio.Context", address: str, union: Any) -> None:
        self.codec: Codec[T] = Codec(union)
        self.socket = _dealer(context, address)

    async def receive(self) -> T | None:
        """The next message; None for a frame that does not decode."""
        return self.codec.decode(await self.socket.recv())

    async def send(self, message: Message) -> None:
        await self.socket.send(encode(message))

    def close(self) -> None:
        self.socket.close(linger=1000)


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


def _dealer(context: Any, address: str) -> Any:
    """A connected socket of the context's kind, with an identity of its own that survives reconnection."""
    check_address(address)
    socket = context.socket(zmq.DEALER)
    _tune(socket, address)
    socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes + os.getpid().to_bytes(4, "little"))
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    socket.connect(address)
    return socket


def _tune(socket: "zmq.Socket[Any]", address: str) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded above, by admission; a full queue here would drop messages silently
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    if address.startswith("tcp://"):  # on one host a dead peer's connection closes; a paused one is to be waited for
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(LINK_TIMEOUT_S * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    with contextlib.suppress(AttributeError, zmq.ZMQError):  # not on every platform, and only tcp needs it
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
