"""Ends of a wire that mean no good: a peer that says anything, and a scheduler that does."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from quire.common.channel import LOST, Hub, encode
from quire.common.conversation import HEADER_BYTES, Conversation
from quire.common.messages import HEARTBEAT_S, PROTOCOL, Heartbeat, Hello, Message

_names = itertools.count()


class Stranger:
    """A socket to a scheduler's wire, and a conversation that is kept only if one wants to."""

    def __init__(self, context: zmq.Context[Any], address: str, *, named: bool = True) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 5000)  # what was said arrives, however soon this ends
        if named:
            self.socket.setsockopt(zmq.IDENTITY, b"q-stranger-%d" % next(_names))
        self.socket.connect(address)
        self.conversation = Conversation()
        self.sent: list[bytes] = []  # frames of the conversation, as they were sent
        self.told: list[bytes] = []  # bodies

    def say(self, body: bytes | Message) -> None:
        """In conversation: numbered, and in order."""
        self.sent.append(self.conversation.header() + (body if isinstance(body, bytes) else encode(body)))
        self.send(self.sent[-1])

    def send(self, *parts: bytes) -> None:
        self.drain()
        self.socket.send_multipart(parts)

    def hello(self, role: str, rank: int = 0) -> None:
        """Begin a conversation."""
        self.conversation.begin(self.conversation.session + 1)
        self.say(Hello(PROTOCOL, role, "stranger", rank))

    def drain(self) -> None:
        """Take note of what was said to it meanwhile."""
        with contextlib.suppress(zmq.Again):
            while True:
                self.told.append(self.socket.recv(zmq.NOBLOCK)[HEADER_BYTES:])

    def close(self) -> None:
        self.socket.close()


class FakeScheduler:
    """A hub in a thread, with a heartbeat. `answer` is called in it with what the peer says, LOST too.

    `bad_frames` is what the peer last said of the frames it dropped.
    """

    def __init__(self, address: str, union: Any, answer: Callable[["FakeScheduler", bytes, Any], None]) -> None:
        self.epoch = 1
        self.bad_frames = 0
        self.peer: bytes | None = None
        self.heard: list[Any] = []
        self._answer = answer
        self._todo: list[Callable[[], None]] = []
        self._over = threading.Event()
        self._context: zmq.Context[Any] = zmq.Context()
        self.hub: Hub[Any] = Hub(self._context, address, union)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FakeScheduler":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        self.hub.close()
        self._context.destroy(linger=0)

    def do(self, act: Callable[[], object]) -> None:
        """Run `act` in the hub's thread, and wait for it."""
        done = threading.Event()
        self._todo.append(lambda: (act(), done.set())[1])
        assert done.wait(30)

    def say(self, body: bytes | Message) -> bool:
        """In conversation. To be called in the hub's thread."""
        frame = body if isinstance(body, bytes) else encode(body)
        return self.peer is not None and self.hub.send_frame(self.peer, frame)

    def send(self, *parts: bytes) -> None:
        """Anything, as it is. To be called in the hub's thread."""
        if self.peer is not None:
            with contextlib.suppress(zmq.ZMQError):
                self.hub.socket.send_multipart((self.peer, *parts), zmq.NOBLOCK)

    def _run(self) -> None:
        beat_at = 0.0
        while not self._over.is_set():
            self.hub.socket.poll(5)
            for peer, message in self.hub.received(1000):
                self._hear(peer, message)
            while self._todo:
                self._todo.pop(0)()
            if time.monotonic() - beat_at > HEARTBEAT_S / 2:
                beat_at = time.monotonic()
                self.say(Heartbeat(self.epoch))

    def _hear(self, peer: bytes, message: Any) -> None:
        match message:
            case Heartbeat(_, bad_frames):
                self.bad_frames = bad_frames
            case Hello():
                self.peer = peer
            case lost if lost is LOST:
                self.peer = None
        self.heard.append(message)
        self._answer(self, peer, message)
