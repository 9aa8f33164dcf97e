"""What comes to an open TCP port from people and programs that do not belong to the engine changes nothing."""

import random
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from quire.common import curve
from quire.common.channel import Hub, Link, encode
from quire.common.conversation import HEADER_BYTES
from quire.common.messages import Abort, FromFrontend, Heartbeat, ToFrontend

from . import wire
from .wire import answer, greet, heard, pump, quiet

CLOSED_S = 5.0 + 2.0  # the limit of a handshake, and some time to notice


@pytest.fixture(params=["plain", "curve"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Hub[Any], Link[Any]]]:
    """A hub on TCP and a peer in conversation with it."""
    scheduler_keys = peer_keys = None
    if request.param == "curve":
        ours, theirs = curve.make(tmp_path)
        scheduler_keys, peer_keys = curve.read_scheduler_keys(ours), curve.read_peer_keys(theirs)
    with wire.context() as context, ExitStack() as stack:
        stack.enter_context(curve.admit(context, scheduler_keys))
        hub: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend, scheduler_keys)
        stack.callback(hub.close)
        yield hub, Link(context, hub.address, ToFrontend, peer_keys)


def connect(hub: Hub[Any]) -> socket.socket:
    host, _, port = hub.address.removeprefix("tcp://").rpartition(":")
    made = socket.create_connection((host, int(port)))
    made.settimeout(CLOSED_S)
    return made


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side ends it; what it says before does not matter."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
READY = READY[:1] + bytes([len(READY) - 2]) + READY[2:]

UNFINISHED: dict[str, bytes] = {
    "nothing at all": b"",
    "half a greeting": GREETING[:20],
    "a greeting": GREETING,
    "half a handshake": GREETING + READY[:10],
}
FOREIGN: dict[str, bytes] = {
    "HTTP": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long HTTP request": b"POST / HTTP/1.1\r\nX: " + b"A" * 1_000_000,
    "zeros": bytes(100_000),
    "a greeting of version 1": b"\x01\x00" * 100,
    "random bytes": random.Random(1).randbytes(100_000),
    "a greeting and random bytes": GREETING + random.Random(2).randbytes(100_000),
    "a huge command": GREETING + b"\x06" + struct.pack(">Q", 2**63) + bytes(1000),
}


def guarded(hub: Hub[Any]) -> bool:
    return bool(hub.socket.getsockopt(zmq.CURVE_SERVER))


def shake_hands(connection: socket.socket) -> None:
    """As a ZeroMQ peer without keys and without a name does."""
    for part, size in ((GREETING, 64), (READY, len(READY))):
        connection.sendall(part)
        while size:
            size -= len(connection.recv(size))


def announce(size: int) -> bytes:
    """The begin of a long frame."""
    return b"\x02" + struct.pack(">Q", size)


def serves(hub: Hub[Any], link: Link[Any], peer: bytes) -> None:
    link.send(Abort([1]))
    assert heard(hub) == [(peer, Abort([1]))]
    hub.send(peer, Heartbeat(1))
    assert answer(link) == Heartbeat(1)


@pytest.mark.parametrize("what", FOREIGN)
def test_a_program_that_speaks_something_else(ends: tuple[Hub[Any], Link[Any]], what: str) -> None:
    hub, link = ends
    peer = greet(hub, link)
    with connect(hub) as stranger, suppress(OSError):
        stranger.sendall(FOREIGN[what])
        assert quiet(hub, 50)
        serves(hub, link, peer)
    serves(hub, link, peer)
    # ZeroMQ takes whatever begins unlike it for a greeting of its first version, and what follows for frames.
    assert hub.codec.bad_frames == 0 or not guarded(hub)


def test_a_tls_client(ends: tuple[Hub[Any], Link[Any]]) -> None:
    hub, link = ends
    peer = greet(hub, link)
    outgoing = ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x")
    with suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    with connect(hub) as stranger:
        stranger.sendall(outgoing.read())
        assert is_closed(stranger)
    serves(hub, link, peer)
    assert hub.codec.bad_frames == 0 or not guarded(hub)


def test_a_port_scan(ends: tuple[Hub[Any], Link[Any]]) -> None:
    hub, link = ends
    peer = greet(hub, link)
    before = psutil.Process().num_fds()
    for _ in range(200):
        with connect(hub) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
    serves(hub, link, peer)
    end = time.monotonic() + CLOSED_S
    while psutil.Process().num_fds() > before + 5:
        assert time.monotonic() < end
        serves(hub, link, peer)
    assert hub.codec.bad_frames == 0


def test_handshakes_that_are_never_finished_are_ended(ends: tuple[Hub[Any], Link[Any]]) -> None:
    hub, link = ends
    peer = greet(hub, link)
    strangers = [connect(hub) for _ in range(10) for _ in UNFINISHED]
    for stranger, begin in zip(strangers, [*UNFINISHED.values()] * 10, strict=True):
        stranger.sendall(begin)
    serves(hub, link, peer)
    since = time.monotonic()
    for stranger in strangers:
        assert is_closed(stranger)
        stranger.close()
    assert time.monotonic() - since < CLOSED_S
    serves(hub, link, peer)
    assert hub.codec.bad_frames == 0


@pytest.mark.parametrize("ends", ["plain"], indirect=True)
def test_whoever_announces_a_gibibyte_is_thrown_out_before_it_is_kept(ends: tuple[Hub[Any], Link[Any]]) -> None:
    """Past the handshake, hence only where there are no keys, or by a peer that holds them."""
    hub, link = ends
    peer = greet(hub, link)
    before = psutil.Process().memory_info().rss
    for _ in range(10):
        with connect(hub) as stranger:
            shake_hands(stranger)
            stranger.sendall(announce(1 << 30))
            assert is_closed(stranger)
    assert psutil.Process().memory_info().rss - before < 20 << 20
    serves(hub, link, peer)
    assert hub.codec.bad_frames == 0

    with connect(hub) as stranger:  # the same with a frame of the right size: so it was the size
        shake_hands(stranger)
        body = bytes(HEADER_BYTES) + encode(Abort([1]))
        stranger.sendall(announce(len(body)) + body)
        pump(hub, lambda: hub.codec.bad_frames == 1)


@pytest.mark.parametrize("ends", ["plain"], indirect=True)
def test_many_frames_at_once_from_a_peer_of_another_kind(ends: tuple[Hub[Any], Link[Any]]) -> None:
    """Sockets that do not fit to a ROUTER are refused in the handshake, or not heard."""
    hub, link = ends
    peer = greet(hub, link)
    with wire.context() as context:
        for kind in (zmq.REQ, zmq.DEALER, zmq.PUSH, zmq.PUB, zmq.PAIR, zmq.ROUTER):
            stranger = context.socket(kind)
            stranger.connect(hub.address)
            with suppress(zmq.ZMQError):
                stranger.send_multipart([b"x"] * 100, zmq.NOBLOCK)
        assert quiet(hub, 300)
        serves(hub, link, peer)
