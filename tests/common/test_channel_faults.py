"""What a channel makes of broken connections, restarted and absent ends, and frames that are too large."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from quire.common.channel import LOST, Hub, Link, encode
from quire.common.conversation import HEADER_BYTES
from quire.common.messages import MAX_FRAME_BYTES, Abort, FromFrontend, Heartbeat, Stats, ToFrontend
from quire.common.sockets import HUB_BACKLOG

from . import wire
from .wire import HELLO, HELLO_PLEASE, WELCOME, Cable, answer, greet, heard, hub_again, pump, quiet, told


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with wire.context() as made:
        yield made


@pytest.fixture
def hub(context: zmq.Context[Any]) -> Hub[Any]:
    return Hub(context, "tcp://127.0.0.1:0", FromFrontend)


@pytest.fixture
def cable(hub: Hub[Any]) -> Iterator[Cable]:
    with wire.cable(hub.address) as made:
        yield made


@pytest.fixture
def link(context: zmq.Context[Any], cable: Cable) -> Link[Any]:
    return Link(context, cable.address, ToFrontend)


def welcomed(hub: Hub[Any], link: Link[Any]) -> bytes:
    peer = greet(hub, link)
    hub.send(peer, WELCOME)
    assert answer(link) == WELCOME
    return peer


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_hub_that_comes_back_asks_for_hello_before_its_peers_speak(
    context: zmq.Context[Any], tmp_path: Path, scheme: str
) -> None:
    first: Hub[Any] = Hub(context, f"ipc://{tmp_path}/s" if scheme == "ipc" else "tcp://127.0.0.1:0", FromFrontend)
    link: Link[Any] = Link(context, first.address, ToFrontend)
    peer = welcomed(first, link)
    first.close()
    time.sleep(0.1)  # an outage
    second = hub_again(context, first.address)
    since = time.monotonic()
    message = None
    while message is None:
        assert time.monotonic() - since < 1.0  # far less than a heartbeat would take, were it only that
        assert list(second.received(10)) == []
        message = link.receive(0.002)
    assert message == HELLO_PLEASE
    link.send(HELLO)
    assert heard(second) == [(peer, HELLO)]


def test_what_is_said_while_the_hub_is_away_does_not_pass_for_a_conversation(
    context: zmq.Context[Any], tmp_path: Path
) -> None:
    first: Hub[Any] = Hub(context, f"ipc://{tmp_path}/s", FromFrontend)
    link: Link[Any] = Link(context, first.address, ToFrontend)
    peer = welcomed(first, link)
    first.close()
    link.send(Abort([1]))
    second = hub_again(context, first.address)
    link.send(Abort([2]))
    assert quiet(second, 500)
    link.send(HELLO)
    assert heard(second) == [(peer, HELLO)]


def test_a_connection_that_breaks_with_frames_of_the_peer_under_way(
    hub: Hub[Any], link: Link[Any], cable: Cable
) -> None:
    peer = welcomed(hub, link)
    cable.swallow()
    link.send(Abort([1]))
    pump(hub, lambda: cable.swallowed)
    cable.cut()
    link.send(Abort([2]))
    assert heard(hub) == [(peer, LOST)]
    assert told(link) == HELLO_PLEASE
    link.send(HELLO)
    assert heard(hub) == [(peer, HELLO)]


def test_a_connection_that_breaks_with_frames_of_the_hub_under_way(
    hub: Hub[Any], link: Link[Any], cable: Cable
) -> None:
    peer = welcomed(hub, link)
    cable.swallow()
    hub.send(peer, Heartbeat(1))
    pump(hub, lambda: cable.swallowed)
    cable.cut()
    pump(hub, lambda: link.receive(0) is LOST or (hub.send(peer, Heartbeat(2)) and False))
    link.send(HELLO)
    assert heard(hub, 2) == [(peer, LOST), (peer, HELLO)]


def test_a_connection_that_breaks_with_nothing_under_way_is_not_felt(
    hub: Hub[Any], link: Link[Any], cable: Cable
) -> None:
    peer = welcomed(hub, link)
    cable.cut()
    link.send(Abort([1]))
    assert heard(hub) == [(peer, Abort([1]))]
    hub.send(peer, Heartbeat(1))
    assert answer(link) == Heartbeat(1)


def test_what_was_left_unread_of_a_broken_connection_makes_no_second_peer(
    hub: Hub[Any], link: Link[Any], cable: Cable
) -> None:
    """ZeroMQ gives it a name of its own then. A worker that took the rank under that name would keep the real one out."""
    peer = greet(hub, link)
    for _ in range(4):
        link.send(HELLO)
    assert hub.socket.poll(5000)
    time.sleep(0.1)  # until they lie there
    cable.cut()
    time.sleep(0.5)  # until it has connected again
    link.send(HELLO)
    found = heard(hub)
    while not quiet(hub):
        pass
    assert {identity for identity, _ in found} == {peer}


# --- frames that are too large ----------------------------------------------------------------------------------------


def frame_of(size: int) -> Stats:
    message = Stats(bytes(size))
    return Stats(bytes(2 * size - len(encode(message))))


def test_the_largest_frame_passes(hub: Hub[Any], link: Link[Any]) -> None:
    peer = welcomed(hub, link)
    largest = frame_of(MAX_FRAME_BYTES)
    assert len(encode(largest)) == MAX_FRAME_BYTES
    assert hub.send(peer, largest)
    assert answer(link) == largest


def test_a_frame_that_is_too_large_ends_the_connection_and_is_found_missing(hub: Hub[Any], link: Link[Any]) -> None:
    peer = welcomed(hub, link)
    link.send(frame_of(MAX_FRAME_BYTES + 1))
    link.send(Abort([1]))
    assert heard(hub) == [(peer, LOST)]
    link.send(HELLO)
    assert heard(hub) == [(peer, HELLO)]
    hub.send(peer, WELCOME)
    assert answer(link) == WELCOME

    hub.send(peer, frame_of(MAX_FRAME_BYTES + HEADER_BYTES + 1))
    found: Any = None
    end = time.monotonic() + 20
    while found is not LOST:
        assert time.monotonic() < end
        hub.send(peer, Heartbeat(1))
        found = link.receive(0.05)
        list(hub.received(10))
    link.send(HELLO)
    assert heard(hub)[-1] == (peer, HELLO)


# --- peers that do not read -------------------------------------------------------------------------------------------

PROCESS = """
import sys, zmq
from quire.common.channel import LOST, Link
from quire.common.messages import PROTOCOL, STRANGER_EPOCH, Heartbeat, Hello, ToFrontend
link = Link(zmq.Context(), sys.argv[1], ToFrontend)
link.send(Hello(PROTOCOL, "frontend", "test"))
while (message := link.receive()) is not LOST:
    if isinstance(message, Heartbeat) and message.epoch != STRANGER_EPOCH:
        print("heard", flush=True)
print("lost", flush=True)
"""


@contextlib.contextmanager
def process(hub: Hub[Any]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", PROCESS, hub.address], stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_a_peer_that_does_not_read_is_gone_in_the_end_and_costs_little_memory(
    context: zmq.Context[Any], tmp_path: Path
) -> None:
    hub: Hub[Any] = Hub(context, f"ipc://{tmp_path}/s", FromFrontend)
    with process(hub) as child:
        assert child.stdout
        ((peer, _),) = heard(hub)
        assert hub.send(peer, Heartbeat(1))
        assert child.stdout.readline() == "heard\n"
        child.send_signal(signal.SIGSTOP)
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        before = psutil.Process().memory_info().rss
        count = 0
        while hub.send(peer, Stats(bytes(1000))):
            count += 1
            assert count < 2 * HUB_BACKLOG
        assert psutil.Process().memory_info().rss - before < 2 * HUB_BACKLOG * 1500
        child.send_signal(signal.SIGCONT)
        end = time.monotonic() + 20
        while not hub.send(peer, Heartbeat(2)):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert child.stdout.readline() == "lost\n"


def test_a_stranger_that_floods_and_reads_nothing_costs_no_more(context: zmq.Context[Any], tmp_path: Path) -> None:
    hub: Hub[Any] = Hub(context, f"ipc://{tmp_path}/s", FromFrontend)
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.IDENTITY, b"q-stranger")
    stranger.setsockopt(zmq.RCVHWM, 1)
    stranger.setsockopt(zmq.SNDHWM, 0)
    stranger.connect(hub.address)
    frame = bytes(HEADER_BYTES) + encode(Abort([1]))
    before = psutil.Process().memory_info().rss
    for _ in range(30):
        for _ in range(1000):
            stranger.send(frame)
        while hub.socket.poll(20):
            assert list(hub.received(1000)) == []
    assert psutil.Process().memory_info().rss - before < HUB_BACKLOG * 2000
    greet(hub, Link(context, hub.address, ToFrontend))
