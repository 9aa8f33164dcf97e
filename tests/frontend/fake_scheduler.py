"""A scheduler that speaks the real wire, and real frontend processes in front of it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import zmq

from quire.common import curve
from quire.common.channel import LOST, Hub, Lost, encode, wires
from quire.common.config import EngineConfig, ModelConfig, ServerConfig
from quire.common.conversation import Conversation
from quire.common.curve import SchedulerKeys
from quire.common.messages import (
    HEARTBEAT_S,
    PEER_TIMEOUT_S,
    PROTOCOL,
    Abort,
    Capacity,
    FromFrontend,
    GetStats,
    Heartbeat,
    Hello,
    Message,
    Output,
    Outputs,
    Refused,
    Stats,
    Status,
    Submit,
    Welcome,
    unpack,
)
from quire.common.model_info import read_model_info
from quire.common.pins import GetPins, Pinned, PinnedPrefix
from quire.common.process import END

CONTEXT = 512  # tokens, of the tiny model
http = httpx.Client(verify=False, timeout=20)  # reading certificates takes 40 ms, and there is no TLS here


class FakeScheduler:
    """Answers as an engine whose model repeats the prompt: output id i is prompt[(seed + i) % len(prompt)], without the
    seed when the temperature is 0.

    Runs in a thread. `delay_s` is the time of a step; `hold` stops steps; `submits` and `aborts` are what came. As the
    real one does, it forgets what a frontend asked when its conversation is over.
    """

    def __init__(
        self,
        directory: Path,
        model_dir: Path,
        server: ServerConfig | None = None,
        *,
        address: str | None = None,
        keys: SchedulerKeys | None = None,
    ) -> None:
        self.address = address or f"ipc://{directory}"
        self._keys = keys
        self.config = EngineConfig(
            model=ModelConfig(model=str(model_dir), served_model_name=("tiny", "org/tiny")),
            server=server or ServerConfig(),
        )
        self.info = read_model_info(str(model_dir), model_dir)
        self.status = Status(
            "ready", 1.0, capacity=Capacity(num_blocks=64, block_size=16, max_model_len=CONTEXT, max_num_seqs=16)
        )
        self.epoch = 1
        self.delay_s = 0.0
        self.tokens_per_step = 1
        self.hold = threading.Event()
        self.hold.set()
        self.awake = threading.Event()  # cleared, the whole scheduler stands still, as after SIGSTOP
        self.awake.set()
        self.submits: list[Submit] = []
        self.pins: list[PinnedPrefix] = []
        self.asked_pins: list[GetPins] = []
        self.submitted_at: list[float] = []
        self.aborts: list[int] = []
        self.abort_messages = 0
        self.hellos: list[Hello] = []
        self.heartbeats: list[Heartbeat] = []
        self.bound_at = 0.0
        self.answer: Callable[[Submit], Output | None] = lambda submit: None  # an answer of its own in place of tokens
        self._commands: list[Callable[[], None]] = []
        self._running: dict[tuple[bytes, int], tuple[Submit, list[int]]] = {}
        self._peers: set[bytes] = set()
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._admitting = contextlib.ExitStack()
        self._admitting.enter_context(curve.admit(self._context, keys))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._bind()
        self._thread.start()

    def _bind(self) -> None:
        self._hub: Hub = Hub(self._context, wires(self.address)[0], FromFrontend, self._keys)
        self.bound_at = time.monotonic()

    def __enter__(self) -> "FakeScheduler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.awake.set()
        self._thread.join(5)
        self._hub.close()
        self._admitting.close()
        self._context.term()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def shortest(self) -> int:
        """Tokens of the running sequence that has the fewest."""
        return min(len(output) for _, output in list(self._running.values()))

    def do(self, act: Callable[[], None]) -> None:
        """Run `act` in the scheduler's thread and wait for it."""
        done = threading.Event()
        self._commands.append(lambda: (act(), done.set()))
        assert done.wait(5)

    def restart(self, *, down_s: float = 0.05, status: Status | None = None) -> None:
        """End, and start again under a new epoch. With a `status`, one that is to be told when to become ready."""

        def act() -> None:
            self._hub.close()
            self._running.clear()
            self._peers.clear()
            self.epoch += 1
            self.status = status or self.status
            time.sleep(down_s)
            self._bind()

        self.do(act)

    def forget(self) -> None:
        """Drop every peer and its requests, as if they had been silent."""

        def act() -> None:
            for peer in list(self._peers):
                self._drop(peer)
                self._hub.forget(peer)

        self.do(act)

    def mute(self, seconds: float) -> None:
        """Neither receive nor send for a while; afterwards, every peer and its requests are forgotten."""
        self.do(lambda: time.sleep(seconds))
        self.forget()

    def lose_frame(self) -> None:
        """The next frame to each peer has a number that is not the next."""
        self.do(lambda: [conversation.header() for conversation in self._conversations()])

    def lose_frame_of_peers(self) -> None:
        """As if a frame of each peer had been lost on its way here."""

        def act() -> None:
            for conversation in self._conversations():
                conversation.received -= 1

        self.do(act)

    def tell_twice(self, message: Message) -> None:
        """The same frame, number and all, two times to each peer."""

        def act() -> None:
            for peer in self._peers:
                frame = self._hub._conversations[peer].header() + encode(message)
                self._hub._send(peer, frame)
                self._hub._send(peer, frame)

        self.do(act)

    def _conversations(self) -> list[Conversation]:
        return list(self._hub._conversations.values())

    def tell(self, message: Message) -> None:
        self.do(lambda: [self._hub.send(peer, message) for peer in self._peers])

    def tell_bytes(self, frame: bytes) -> None:
        self.do(lambda: [self._hub.send_frame(peer, frame) for peer in self._peers])

    def set_status(self, status: Status) -> None:
        self.status = status
        self.tell(status)

    def _run(self) -> None:
        beat_at = 0.0
        while not self._stop.is_set():
            self.awake.wait()
            self._hub.socket.poll(1 if self._running else 10)
            for received in self._hub.received(1000):
                self._handle(*received)
            while self._commands:
                self._commands.pop(0)()
            if self.hold.is_set() and self._running:
                time.sleep(self.delay_s)
                self._step()
            if time.monotonic() - beat_at > HEARTBEAT_S / 2:
                beat_at = time.monotonic()
                for peer in self._peers:
                    self._hub.send(peer, Heartbeat(self.epoch))

    def _drop(self, peer: bytes) -> None:
        self._peers.discard(peer)
        for key in [key for key in self._running if key[0] == peer]:
            del self._running[key]

    def _handle(self, peer: bytes, message: FromFrontend | Lost) -> None:
        if message is LOST:
            self._drop(peer)
            return
        if isinstance(message, Hello):
            self.hellos.append(message)
            if message.protocol != PROTOCOL:
                self._hub.send(peer, Refused("protocol"))
                self._hub.forget(peer)
                return
            self._peers.add(peer)
            self._hub.send(peer, Welcome(self.epoch, self.config, self.info))
            self._hub.send(peer, self.status)
            return
        match message:
            case Heartbeat():
                self.heartbeats.append(message)
            case Submit():
                self.submits.append(message)
                self.submitted_at.append(time.monotonic())
                if (output := self.answer(message)) is not None:
                    self._hub.send(peer, Outputs([output]))
                else:
                    self._running[peer, message.id] = (message, unpack(message.output))
            case Abort():
                self.aborts += message.ids
                self.abort_messages += 1
                for id in message.ids:
                    self._running.pop((peer, id), None)
            case GetPins(serial):
                self.asked_pins.append(message)
                self._hub.send(peer, Pinned(serial, self.pins, len(self.pins), 5, 8))
            case GetStats():
                self._hub.send(peer, Stats(b"quire:fake 1\n"))

    def _step(self) -> None:
        outputs: dict[bytes, list[Output]] = {}
        for (peer, id), (submit, output) in list(self._running.items()):
            prompt, params, first, new, finish = unpack(submit.prompt), submit.sampling, len(output), [], None
            shift = params.seed if params.temperature else 0
            while finish is None and len(new) < self.tokens_per_step:
                new.append(prompt[(shift + first + len(new)) % len(prompt)])
                length = first + len(new)
                if new[-1] in params.stop_token_ids and length > params.min_tokens:
                    finish = "stop"
                elif length >= params.max_tokens:
                    finish = "length"
            output += new
            outputs.setdefault(peer, []).append(Output(id, first, new, finish, num_cached=len(prompt) // 2))
            if finish:
                del self._running[peer, id]
        for peer, batch in outputs.items():
            self._hub.send(peer, Outputs(batch))


@contextmanager
def frontend_process(
    scheduler_address: str,
    *,
    supervised: bool = True,
    peer_timeout_s: float = PEER_TIMEOUT_S,
    log: Path | None = None,
    send_buffer: int | None = None,
) -> Iterator[tuple[subprocess.Popen, str]]:
    """A frontend in a process of its own, on a free port: the process and its base URL.

    `log` is where its stderr goes; `send_buffer` bytes of an answer the kernel takes for a client that does not read.
    """
    sock = socket.create_server(("127.0.0.1", 0), backlog=512)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = sock.getsockname()[1]
    code = (
        "import socket, sys; from quire.common.log import configure; configure('frontend');"
        f"from quire.frontend import scheduler_link; scheduler_link.PEER_TIMEOUT_S = {peer_timeout_s};"
        "from quire.frontend.process import main;"
        f"sys.exit(main(scheduler={scheduler_address!r}, sock=socket.socket(fileno={sock.fileno()}), supervised={supervised}, log_level='info'))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as files:
        stderr = files.enter_context(log.open("wb")) if log else None
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[sock.fileno()], env=environment, stderr=stderr
        )
    sock.close()
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(END if supervised else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def never_reading(url: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has sent a request and takes nothing of the answer."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        send_request(client, body)
        yield client


def send_request(client: socket.socket, body: dict[str, Any]) -> None:
    content = msgspec.json.encode(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for `condition`; fails when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def wait_ready(url: str, timeout_s: float = 20.0, headers: dict[str, str] | None = None) -> None:
    def ready() -> bool:
        try:
            return http.get(f"{url}/ready", headers=headers, timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    until(ready, timeout_s)
