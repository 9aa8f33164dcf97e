"""A hub's socket without ZeroMQ, one peer, and what is under way between them, which a test may meddle with."""

from collections import deque
from typing import Any

import zmq

ADDRESS = "ipc:///nowhere"
PEER = b"q-peer"


class Network:
    """Passes for a zmq.Context. `up` and `down` are the frames under way, oldest first; `seen` all that were ever sent."""

    def __init__(self) -> None:
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.at_hub: deque[bytes] = deque()
        self.at_peer: deque[bytes] = deque()
        self.seen: dict[str, list[bytes]] = {"up": [], "down": []}

    def socket(self, kind: int) -> "Router":
        assert kind == zmq.ROUTER
        return Router(self)

    def connect(self) -> None:
        """The peer has a connection, and says so."""
        self.up.append(b"")

    def send(self, frame: bytes) -> None:
        """The peer's."""
        self.up.append(frame)
        self.seen["up"].append(frame)

    def deliver(self, direction: str, count: int = 10**9) -> None:
        source, target = (self.up, self.at_hub) if direction == "up" else (self.down, self.at_peer)
        for _ in range(min(count, len(source))):
            target.append(source.popleft())

    def under_way(self, direction: str) -> deque[bytes]:
        return self.up if direction == "up" else self.down


class Router:
    def __init__(self, network: Network) -> None:
        self.network = network

    def setsockopt(self, option: int, value: Any) -> None:
        """There is nothing to tune."""

    def getsockopt_string(self, option: int) -> str:
        return ADDRESS

    def bind(self, address: str) -> None:
        """There is one address."""

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.network.at_hub:
            raise zmq.Again
        return [PEER, self.network.at_hub.popleft()]

    def send_multipart(self, parts: tuple[bytes, bytes], flags: int) -> None:
        self.network.down.append(parts[1])
        self.network.seen["down"].append(parts[1])
