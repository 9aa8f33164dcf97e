"""Hub and link over real sockets."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from quire.common.channel import LOST, AsyncLink, Hub, Link, check_address, encode, wires
from quire.common.conversation import Conversation
from quire.common.errors import ConfigError
from quire.common.messages import Abort, FromFrontend, Heartbeat, ToFrontend

from . import wire
from .wire import HELLO, HELLO_PLEASE, WELCOME, answer, greet, heard, pump, quiet, told


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with wire.context() as made:
        yield made


@pytest.fixture(params=["ipc", "tcp"])
def hub(request: pytest.FixtureRequest, context: zmq.Context[Any], tmp_path: Path) -> Hub[Any]:
    address = f"ipc://{tmp_path}/s" if request.param == "ipc" else "tcp://127.0.0.1:0"
    return Hub(context, address, FromFrontend)


@pytest.fixture
def link(context: zmq.Context[Any], hub: Hub[Any]) -> Link[Any]:
    return Link(context, hub.address, ToFrontend)


def test_messages_go_both_ways(hub: Hub[Any], link: Link[Any]) -> None:
    peer = greet(hub, link)
    assert hub.send(peer, Heartbeat(3))
    assert answer(link) == Heartbeat(3)
    link.send(Abort([1]))
    assert heard(hub) == [(peer, Abort([1]))]
    assert not hub.send(b"nobody", Heartbeat(3))
    assert link.receive(0) is None
    assert hub.codec.bad_frames == link.codec.bad_frames == 0


def test_whoever_speaks_without_hello_is_asked_for_it_and_not_heard(hub: Hub[Any], link: Link[Any]) -> None:
    link.send(Abort([1]))
    pump(hub, lambda: link.receive(0) == HELLO_PLEASE)
    greet(hub, link)


def test_a_hello_that_is_repeated_belongs_to_the_same_conversation(hub: Hub[Any], link: Link[Any]) -> None:
    for _ in range(3):
        link.send(HELLO)
    assert [message for _, message in heard(hub, 3)] == [HELLO] * 3


def test_a_known_peer_that_begins_anew_is_lost_before_it_says_hello(hub: Hub[Any], link: Link[Any]) -> None:
    peer = greet(hub, link)
    hub.send(peer, WELCOME)
    assert answer(link) == WELCOME
    link.send(Abort([1]))
    link.send(HELLO)
    assert heard(hub, 3) == [(peer, Abort([1])), (peer, LOST), (peer, HELLO)]
    hub.send(peer, Heartbeat(2))
    assert answer(link) == Heartbeat(2)


@pytest.mark.parametrize("num_lost", [1, 3])
def test_a_gap_ends_the_conversation_at_the_hub(hub: Hub[Any], link: Link[Any], num_lost: int) -> None:
    peer = greet(hub, link)
    for i in range(num_lost):
        link.send(Abort([i]))
        hub.socket.poll(5000)
        hub.socket.recv_multipart()
    link.send(Abort([10]))
    link.send(Abort([11]))
    assert heard(hub) == [(peer, LOST)]
    assert quiet(hub)
    assert not hub.send(peer, Heartbeat(1))
    link.send(HELLO)
    assert heard(hub) == [(peer, HELLO)]


@pytest.mark.parametrize("num_lost", [1, 3])
def test_a_gap_ends_the_conversation_at_the_link(hub: Hub[Any], link: Link[Any], num_lost: int) -> None:
    peer = greet(hub, link)
    hub.send(peer, Heartbeat(1))
    assert answer(link) == Heartbeat(1)
    for i in range(num_lost):
        hub.send(peer, Heartbeat(i))
        link.socket.recv()
    for _ in range(2):
        hub.send(peer, Heartbeat(9))
    assert told(link) is LOST
    assert link.receive(0.2) is None  # what comes after the gap
    link.send(HELLO)
    assert heard(hub, 2) == [(peer, LOST), (peer, HELLO)]
    hub.send(peer, Heartbeat(10))
    assert answer(link) == Heartbeat(10)


def test_a_peer_that_is_forgotten_is_not_heard_until_it_says_hello(hub: Hub[Any], link: Link[Any]) -> None:
    peer = greet(hub, link)
    hub.forget(peer)
    assert not hub.send(peer, Heartbeat(1))
    link.send(Abort([1]))
    pump(hub, lambda: link.receive(0) == HELLO_PLEASE)
    hub.ask_for_hello(peer)
    assert told(link) == HELLO_PLEASE
    link.send(HELLO)
    assert heard(hub) == [(peer, HELLO)]


def test_async_link(tmp_path: Path) -> None:
    async def talk() -> list[object]:
        context = zmq.asyncio.Context()
        hub: Hub[Any] = Hub(zmq.Context.shadow(context), f"ipc://{tmp_path}/s", FromFrontend)
        link: AsyncLink[Any] = AsyncLink(context, hub.address, ToFrontend)
        await link.send(HELLO)
        ((peer, _),) = await asyncio.to_thread(heard, hub)
        told: list[object] = []
        for epoch in (8, 9, 10):
            hub.send(peer, Heartbeat(epoch))
            if epoch == 9:
                await link.socket.recv()
            else:
                told.append(await link.receive())
        await link.send(HELLO)
        told += [message for _, message in await asyncio.to_thread(heard, hub, 2)]
        link.close()
        hub.close()
        context.term()
        return told

    assert asyncio.run(talk()) == [Heartbeat(8), LOST, LOST, HELLO]


# --- frames that are none ---------------------------------------------------------------------------------------------


def raw(context: zmq.Context[Any], hub: Hub[Any], identity: bytes = b"q-raw") -> zmq.Socket[Any]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(hub.address)
    return socket


def test_garbage_is_counted_and_the_next_message_arrives(context: zmq.Context[Any], hub: Hub[Any]) -> None:
    stranger = raw(context, hub)
    conversation = Conversation(1)
    header = conversation.header
    for frames in (
        [b"\xc1"],
        [b"a", b"b", b"c"],
        [header() + b"\x91\xa5Hello"],
        [b"\1\0\0\0" + bytes(8) + encode(HELLO)],
    ):
        stranger.send_multipart(frames)
    stranger.send(header() + encode(HELLO))
    stranger.send(header() + b"\xc1")
    stranger.send(header() + encode(Abort([1])))
    assert [message for _, message in heard(hub, 2)] == [HELLO, Abort([1])]
    assert hub.codec.bad_frames == 5


def test_frames_that_come_twice_or_late_are_counted_and_not_heard(context: zmq.Context[Any], hub: Hub[Any]) -> None:
    peer, old, new = raw(context, hub), Conversation(1), Conversation(2)
    first = [old.header() + encode(HELLO), old.header() + encode(Abort([1]))]
    for frame in (*first, first[1], new.header() + encode(HELLO), *first, new.header() + encode(Abort([2]))):
        peer.send(frame)
    assert [message for _, message in heard(hub, 5)] == [HELLO, Abort([1]), LOST, HELLO, Abort([2])]
    assert hub.codec.bad_frames == 3


def test_frames_of_another_conversation_are_counted_at_the_link(hub: Hub[Any], link: Link[Any]) -> None:
    peer = greet(hub, link)
    other = Conversation(2)
    hub.socket.send_multipart((peer, other.header() + encode(Heartbeat(1))))
    hub.send(peer, Heartbeat(2))
    assert answer(link) == Heartbeat(2)
    assert link.codec.bad_frames == 1


def test_a_peer_without_a_name_is_not_heard(context: zmq.Context[Any], hub: Hub[Any]) -> None:
    """ZeroMQ gives it one, as it does to what is left of a connection that was replaced."""
    nameless = context.socket(zmq.DEALER)
    nameless.connect(hub.address)
    nameless.send(Conversation(1).header() + encode(HELLO))
    pump(hub, lambda: hub.codec.bad_frames)
    assert hub.codec.bad_frames == 1
    assert not nameless.poll(100)


def test_a_flood_does_not_hold_a_hub_and_fills_neither_log_nor_memory(
    context: zmq.Context[Any], hub: Hub[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """However much is waiting, one call looks at so many frames and returns."""
    stranger, good = raw(context, hub), Link(context, hub.address, ToFrontend)
    forged = encode(HELLO).replace(b"Hello", b"He\n\0o")
    for _ in range(5000):
        stranger.send(Conversation(1).header() + forged)
    good.send(HELLO)
    seen: list[object] = []
    end = time.monotonic() + 20
    with caplog.at_level(logging.WARNING):
        while not seen or hub.codec.bad_frames < 5000:
            assert time.monotonic() < end
            before = hub.codec.bad_frames
            seen += hub.received(100)
            assert hub.codec.bad_frames - before <= 100
    assert len(seen) == 1
    assert len(caplog.records) <= 14
    assert all(line.isprintable() for line in caplog.messages)


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "tcp://*:5000",
        "tcp://0.0.0.0:5000",
        "tcp://[::]:5000",
        "http://x",
        "tcp://host",
        "tcp://host:65536",
        "tcp://host:\u00b2",
        "ipc://",
        "ipc:///" + "x" * 120,
    ],
)
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        check_address(address)


@pytest.mark.parametrize("host", ["0", "0x0", "000.0.0.0", "[0::0]", "[::ffff:0.0.0.0]"])
def test_no_spelling_of_every_interface_is_listened_on(context: zmq.Context[Any], host: str) -> None:
    with pytest.raises(ConfigError, match="every interface"):
        Hub(context, f"tcp://{host}:0", FromFrontend)


def test_one_address_names_both_wires() -> None:
    assert wires("tcp://10.0.0.1:5555") == ("tcp://10.0.0.1:5555", "tcp://10.0.0.1:5556")
    for port in (0, 65535):
        with pytest.raises(ConfigError, match="65534"):
            wires(f"tcp://10.0.0.1:{port}")
    assert wires("ipc:///run/q") == ("ipc:///run/q/frontends", "ipc:///run/q/workers")


def test_an_address_in_use_is_a_config_error(context: zmq.Context[Any]) -> None:
    hub: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend)
    with pytest.raises(ConfigError, match="cannot listen"):
        Hub(context, hub.address, FromFrontend)


def test_an_address_that_nobody_can_have_is_a_config_error(context: zmq.Context[Any]) -> None:
    for end in (Hub, Link):
        with pytest.raises(ConfigError, match="cannot"):
            end(context, "tcp:// host:5000", FromFrontend)


def test_addresses_of_ipv6(context: zmq.Context[Any]) -> None:
    try:
        hub: Hub[Any] = Hub(context, "tcp://[::1]:0", FromFrontend)
    except ConfigError:
        pytest.skip("no IPv6 here")
    greet(hub, Link(context, hub.address, ToFrontend))
