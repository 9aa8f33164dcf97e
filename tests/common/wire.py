"""Ends of real sockets for tests: what they hear, and a link between hosts that can be cut."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq

from quire.common.channel import Hub, Link
from quire.common.config import EngineConfig
from quire.common.curve import SchedulerKeys
from quire.common.errors import ConfigError
from quire.common.messages import PROTOCOL, STRANGER_EPOCH, FromFrontend, Heartbeat, Hello, Welcome
from quire.common.model_info import ModelInfo

HELLO = Hello(PROTOCOL, "frontend", "test")
INFO = ModelInfo(
    model="m", architecture="None", vocab_size=9, context_length=9, max_model_len=9, eos_token_ids=(2,), fingerprint="f"
)
WELCOME = Welcome(1, EngineConfig(), INFO)
HELLO_PLEASE = Heartbeat(STRANGER_EPOCH)


def heard(hub: Hub[Any], count: int = 1, seconds: float = 10) -> list[tuple[bytes, Any]]:
    """What the hub hears, as soon as it is so much."""
    end, found = time.monotonic() + seconds, []
    while len(found) < count:
        left = end - time.monotonic()
        assert left > 0, f"heard only {found}"
        hub.socket.poll(int(left * 1000))
        found += hub.received(1000)
    return found


def quiet(hub: Hub[Any], milliseconds: int = 100) -> bool:
    """Whether the hub hears nothing for a while."""
    end = time.monotonic() + milliseconds / 1000
    while (left := end - time.monotonic()) > 0:
        if hub.socket.poll(int(left * 1000) + 1) and list(hub.received(1000)):
            return False
    return True


def pump(hub: Hub[Any], condition: Callable[[], Any], seconds: float = 10) -> None:
    """Let the hub look at what comes until something has happened. It must hear nothing."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        hub.socket.poll(5)
        assert list(hub.received(1000)) == []


def told(link: Link[Any], seconds: float = 10) -> Any:
    """The next thing the link is told."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if (message := link.receive(left)) is not None:
            return message
    raise AssertionError("nothing came")


def answer(link: Link[Any], seconds: float = 10) -> Any:
    """The next thing the link is told, unless it is to say Hello."""
    while (message := told(link, seconds)) == HELLO_PLEASE:
        pass
    return message


def greet(hub: Hub[Any], link: Link[Any]) -> bytes:
    """A conversation begins; the peer's identity."""
    link.send(HELLO)
    ((peer, message),) = heard(hub)
    assert message == HELLO
    return peer


def hub_again(context: "zmq.Context[Any]", address: str, keys: SchedulerKeys | None = None) -> Hub[Any]:
    """Another hub at the address of one that was closed, which takes ZeroMQ a moment."""
    end = time.monotonic() + 10
    while True:
        try:
            return Hub(context, address, FromFrontend, keys)
        except ConfigError:
            assert time.monotonic() < end
            time.sleep(0.01)


class Cable:
    """Forwards TCP connections to `target`, until it is cut."""

    def __init__(self, target: str) -> None:
        self._target = target.removeprefix("tcp://").rsplit(":", 1)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._deaf: set[socket.socket] = set()  # those of which nothing arrives
        self.swallowed = 0  # bytes
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection((self._target[0], int(self._target[1])))
                self._connections += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source in self._deaf:
                    self.swallowed += len(data)
                else:
                    target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def swallow(self) -> None:
        """From now on nothing arrives on the connections that there are."""
        self._deaf.update(self._connections)

    def cut(self) -> None:
        """End the connections; those that are made anew work."""
        cut, self._connections = self._connections, []
        for connection in cut:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def close(self) -> None:
        self._server.close()
        self.cut()


@contextlib.contextmanager
def cable(target: str) -> Iterator[Cable]:
    made = Cable(target)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def context() -> Iterator[zmq.Context[Any]]:
    """One whose sockets do not outlive it, however the test ends."""
    made: zmq.Context[Any] = zmq.Context()
    made.linger = 0
    try:
        yield made
    finally:
        made.destroy(linger=0)
