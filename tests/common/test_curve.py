"""Keys: how they are made and read, and who gets through with which."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from quire.common import curve
from quire.common.channel import AsyncLink, Hub, Link
from quire.common.curve import PeerKeys, SchedulerKeys
from quire.common.errors import ConfigError
from quire.common.messages import FromFrontend, Heartbeat, ToFrontend

from . import wire
from .wire import HELLO, answer, greet, heard, hub_again, quiet


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return curve.make(tmp_path / "keys")


@pytest.fixture
def scheduler(files: tuple[Path, Path]) -> SchedulerKeys:
    return curve.read_scheduler_keys(files[0])


@pytest.fixture
def peer(files: tuple[Path, Path]) -> PeerKeys:
    return curve.read_peer_keys(files[1])


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with wire.context() as made:
        yield made


@pytest.fixture
def hub(context: zmq.Context[Any], scheduler: SchedulerKeys) -> Iterator[Hub[Any]]:
    with curve.admit(context, scheduler):
        made: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend, scheduler)
        yield made
        made.close()


# --- files ------------------------------------------------------------------------------------------------------------


def test_keys_are_for_their_owner_alone_and_fit_each_other(
    files: tuple[Path, Path], scheduler: SchedulerKeys, peer: PeerKeys
) -> None:
    assert [path.name for path in files] == ["scheduler.keys", "peer.keys"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert scheduler.public == peer.scheduler_public
    assert scheduler.peer_public == peer.public
    assert scheduler.secret not in files[1].read_text()
    assert peer.secret not in files[0].read_text()


@pytest.mark.parametrize("left", ["scheduler.keys", "peer.keys"])
def test_keys_are_never_overwritten_and_no_half_of_a_pair_is_left(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("precious")
    with pytest.raises(ConfigError, match="never overwritten"):
        curve.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_text() == "precious"


def test_a_place_for_keys_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/scheduler\.keys: (Not a directory|File exists)"):
        curve.make(tmp_path / "file")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_keys_that_others_may_read_are_refused(files: tuple[Path, Path], mode: int) -> None:
    files[1].chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        curve.read_peer_keys(files[1])


def test_one_file_is_not_taken_for_the_other(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"calls scheduler\.keys"):
        curve.read_scheduler_keys(files[1])
    with pytest.raises(ConfigError, match=r"calls peer\.keys"):
        curve.read_peer_keys(files[0])


KEY = "x" * 40


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\xff",
        "[" * 100_000,
        '{"role": "peer"}',
        '{"role": "peer", "public": 1, "secret": 2, "scheduler_public": 3}',
        f'{{"role": "peer", "public": "", "secret": "{KEY}", "scheduler_public": "{KEY}"}}',
        f'{{"role": "peer", "public": "{KEY}", "secret": "{" " * 40}", "scheduler_public": "{KEY}"}}',
        f'{{"role": "peer", "public": "{KEY}", "secret": "{"é" * 20}", "scheduler_public": "{KEY}"}}',
        f'{{"role": "peer", "public": "{KEY}", "secret": "{KEY}", "scheduler_public": "{"#" * 40}"}}',
        f'{{"role": "peer", "public": "{KEY}", "secret": "{KEY}", "scheduler_public": "{KEY}", "more": 1}}',
        f'{{"role": "peer", "public": "{KEY}", "secret": "{KEY}", "scheduler_public": "{KEY}"}}',  # no pair
    ],
)
def test_files_that_hold_no_keys_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "peer.keys"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"peer\.keys"):
        curve.read_peer_keys(path)


def test_a_file_that_is_missing_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quire keys DIR"):
        curve.read_peer_keys(tmp_path / "peer.keys")


# --- who gets through -------------------------------------------------------------------------------------------------


def pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def other_peer(peer: PeerKeys) -> PeerKeys:
    """One that knows the scheduler's public key, but has keys of its own."""
    public, secret = pair()
    return msgspec.structs.replace(peer, public=public, secret=secret)


def test_a_peer_of_this_launch_gets_through(context: zmq.Context[Any], hub: Hub[Any], peer: PeerKeys) -> None:
    link: Link[Any] = Link(context, hub.address, ToFrontend, peer)
    assert hub.send(greet(hub, link), Heartbeat(1))
    assert answer(link) == Heartbeat(1)


def test_an_async_peer_gets_through(hub: Hub[Any], peer: PeerKeys) -> None:
    async def talk() -> object:
        context = zmq.asyncio.Context()
        link: AsyncLink[Any] = AsyncLink(context, hub.address, ToFrontend, peer)
        await link.send(HELLO)
        ((identity, _),) = await asyncio.to_thread(heard, hub)
        hub.send(identity, Heartbeat(1))
        message = await link.receive()
        link.close()
        context.term()
        return message

    assert asyncio.run(talk()) == Heartbeat(1)


@pytest.mark.parametrize("stranger", ["without keys", "with keys of its own", "of another launch", "its name alone"])
def test_a_stranger_does_not(
    context: zmq.Context[Any], hub: Hub[Any], peer: PeerKeys, stranger: str, caplog: pytest.LogCaptureFixture
) -> None:
    public, secret = pair()
    keys = {
        "without keys": None,
        "with keys of its own": other_peer(peer),
        "of another launch": PeerKeys(public=public, secret=secret, scheduler_public=pair()[0]),
        "its name alone": msgspec.structs.replace(peer, secret=secret),
    }[stranger]
    link: Link[Any] = Link(context, hub.address, ToFrontend, keys)
    good: Link[Any] = Link(context, hub.address, ToFrontend, peer)
    with caplog.at_level(logging.WARNING):
        link.send(HELLO)
        end = time.monotonic() + 10
        while not caplog.records:
            assert time.monotonic() < end
            assert quiet(hub, 20)
            assert link.receive(0.02) is None
    assert any("cannot talk to" in message or "another key" in message for message in caplog.messages)
    greet(hub, good)
    assert hub.codec.bad_frames == 0


def test_a_peer_with_keys_does_not_talk_to_a_scheduler_without(
    context: zmq.Context[Any], peer: PeerKeys, caplog: pytest.LogCaptureFixture
) -> None:
    hub: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend)
    link: Link[Any] = Link(context, hub.address, ToFrontend, peer)
    link.send(HELLO)
    with caplog.at_level(logging.WARNING):
        end = time.monotonic() + 10
        while not caplog.records:
            assert time.monotonic() < end
            link.receive(0.02)
    assert "only one of the two has keys" in caplog.text
    assert quiet(hub)


def test_nobody_gets_through_while_nobody_admits(
    context: zmq.Context[Any], scheduler: SchedulerKeys, peer: PeerKeys
) -> None:
    """ZeroMQ's own rule is that everybody does."""
    hub: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend, scheduler)
    links = [Link[Any](context, hub.address, ToFrontend, keys) for keys in (peer, other_peer(peer))]
    for link in links:
        link.send(HELLO)
    assert quiet(hub, 300)
    with curve.admit(context, scheduler):
        assert [message for _, message in heard(hub)] == [HELLO]
        assert quiet(hub, 300)
        hub.close()


def test_without_keys_nothing_is_guarded(context: zmq.Context[Any]) -> None:
    with curve.admit(context, None):
        hub: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend)
        greet(hub, Link(context, hub.address, ToFrontend))


@pytest.mark.parametrize("kind", ["link", "async link"])
def test_a_peer_that_was_refused_comes_back_when_the_scheduler_has_the_right_keys(
    context: zmq.Context[Any], scheduler: SchedulerKeys, peer: PeerKeys, kind: str
) -> None:
    """ZeroMQ itself would never try again."""
    wrong: Hub[Any] = Hub(context, "tcp://127.0.0.1:0", FromFrontend)
    address = wrong.address

    def set_right(stack: ExitStack) -> Hub[Any]:
        wrong.close()
        stack.enter_context(curve.admit(context, scheduler))
        hub = hub_again(context, address, scheduler)
        stack.callback(hub.close)
        return hub

    async def talk_async(stack: ExitStack) -> None:
        other = zmq.asyncio.Context()
        link: AsyncLink[Any] = AsyncLink(other, address, ToFrontend, peer)
        await link.send(HELLO)
        await asyncio.sleep(0.3)
        hub = set_right(stack)
        end = time.monotonic() + 10
        while not list(hub.received(10)):
            assert time.monotonic() < end
            await link.send(HELLO)
            await asyncio.sleep(0.05)
        link.close()
        other.term()

    def talk(stack: ExitStack) -> None:
        link: Link[Any] = Link(context, address, ToFrontend, peer)
        link.send(HELLO)
        link.receive(0.3)
        hub = set_right(stack)
        end = time.monotonic() + 10
        while not list(hub.received(10)):
            assert time.monotonic() < end
            link.send(HELLO)
            link.receive(0.05)

    with ExitStack() as stack:
        talk(stack) if kind == "link" else asyncio.run(talk_async(stack))
