"""Hub and link over real sockets."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from quire.common.channel import AsyncLink, Hub, Link, check_address, encode, wires
from quire.common.errors import ConfigError
from quire.common.messages import PROTOCOL, Abort, FromFrontend, Heartbeat, Hello, ToFrontend

HELLO = Hello(PROTOCOL, "frontend", "test")


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


def receive(hub: Hub, seconds: float = 5) -> tuple[bytes, object]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := next(hub.received(1000), None):
            return got
        time.sleep(0.002)
    raise AssertionError("nothing came")


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_messages_go_both_ways(context: zmq.Context, tmp_path: Path, scheme: str) -> None:
    hub: Hub = Hub(context, f"ipc://{tmp_path}/s" if scheme == "ipc" else "tcp://127.0.0.1:0", FromFrontend)
    link: Link = Link(context, hub.address, ToFrontend)
    link.send(HELLO)
    peer, message = receive(hub)
    assert message == HELLO
    assert hub.send(peer, Heartbeat(3))
    assert link.receive(5) == Heartbeat(3)
    assert not hub.send(b"nobody", Heartbeat(3))
    link.close()
    hub.close()


def test_garbage_is_skipped_and_the_next_message_arrives(context: zmq.Context, tmp_path: Path) -> None:
    hub: Hub = Hub(context, f"ipc://{tmp_path}/s", FromFrontend)
    raw = context.socket(zmq.DEALER)
    raw.connect(hub.address)
    for frames in ([b""], [b"\xc1"], [b"a", b"b", b"c"], [b"\x91\xa5Hello"]):
        raw.send_multipart(frames)
    raw.send(encode(Abort([1])))
    assert receive(hub)[1] == Abort([1])
    assert hub.codec.bad_frames == 4
    raw.close(linger=0)
    hub.close()


def test_a_link_outlives_its_hub(context: zmq.Context, tmp_path: Path) -> None:
    """What is sent while the scheduler is away reaches the one that comes back."""
    address = f"ipc://{tmp_path}/s"
    first: Hub = Hub(context, address, FromFrontend)
    link: Link = Link(context, address, ToFrontend)
    link.send(HELLO)
    before = receive(first)[0]
    first.close()
    time.sleep(0.1)
    second: Hub = Hub(context, address, FromFrontend)
    link.send(Abort([7]))
    peer, message = receive(second)
    assert message == Abort([7])
    assert peer == before
    link.close()
    second.close()


def test_async_link(tmp_path: Path) -> None:
    async def talk() -> object:
        context = zmq.asyncio.Context()
        sync = zmq.Context.shadow(context)
        hub: Hub = Hub(sync, f"ipc://{tmp_path}/s", FromFrontend)
        link: AsyncLink = AsyncLink(context, hub.address, ToFrontend)
        await link.send(HELLO)
        peer, _ = await asyncio.to_thread(receive, hub)
        hub.send(peer, Heartbeat(9))
        answer = await link.receive()
        link.close()
        hub.close()
        context.term()
        return answer

    assert asyncio.run(talk()) == Heartbeat(9)


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


def test_one_address_names_both_wires() -> None:
    assert wires("tcp://10.0.0.1:5555") == ("tcp://10.0.0.1:5555", "tcp://10.0.0.1:5556")
    for port in (0, 65535):
        with pytest.raises(ConfigError, match="65534"):
            wires(f"tcp://10.0.0.1:{port}")
    assert wires("ipc:///run/q") == ("ipc:///run/q/frontends", "ipc:///run/q/workers")


def test_an_address_in_use_is_a_config_error(context: zmq.Context) -> None:
    hub: Hub = Hub(context, "tcp://127.0.0.1:0", FromFrontend)
    with pytest.raises(ConfigError, match="cannot listen"):
        Hub(context, hub.address, FromFrontend)
    hub.close()


def test_a_flood_of_garbage_does_not_hold_a_hub(context: zmq.Context, tmp_path: Path) -> None:
    """However much is waiting, one call looks at so many frames and returns."""
    hub: Hub = Hub(context, f"ipc://{tmp_path}/s", FromFrontend)
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.SNDHWM, 0)
    raw.connect(hub.address)
    for _ in range(5000):
        raw.send(b"\xc1")
    raw.send(encode(Abort([1])))
    seen, calls = [], 0
    while not seen:
        before = hub.codec.bad_frames
        seen, calls = list(hub.received(100)), calls + 1
        assert hub.codec.bad_frames - before <= 100
    assert calls >= 51 and seen[0][1] == Abort([1])
    raw.close(linger=0)
    hub.close()
