"""Ends of a wire that mean no good, before real processes of launch/: a scheduler that says anything, and a worker that does."""

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import zmq

from quire.common.channel import LOST, Codec, Link, encode, wires
from quire.common.config import EngineConfig, ModelConfig, SchedulerConfig
from quire.common.conversation import HEADER_BYTES, outside
from quire.common.messages import (
    HEARTBEAT_S,
    PROTOCOL,
    STRANGER_EPOCH,
    Admitted,
    Allocate,
    Allocated,
    Capacity,
    FromFrontend,
    FromWorker,
    GetStats,
    Heartbeat,
    Hello,
    Left,
    Message,
    Output,
    Outputs,
    Progress,
    Refused,
    RequestFault,
    Shutdown,
    Stats,
    Status,
    StepPlan,
    StepResult,
    Submit,
    ToFrontend,
    ToWorker,
    Welcome,
    WorkerFault,
    WorkerReady,
    pack,
    unpack,
)
from quire.common.model_info import model_path, read_model_info
from quire.common.sampling import SamplingParams

from ..common.attack import FakeScheduler
from ..common.mutation import Mutator
from ..conftest import Sizes
from ..e2e.server import script, wait_until
from ..ports import free_port

MODEL = model_path("demo")
INFO = read_model_info("demo", MODEL, max_model_len=256)
CONFIG = EngineConfig(
    model=ModelConfig(model="demo", device="cpu", dtype="float32"), scheduler=SchedulerConfig(max_num_seqs=4)
)
READY = Status("ready", 1.0, capacity=Capacity(64, 16, 256, 4))
FREE = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PLAN = StepPlan(
    epoch=1,
    step=1,
    released=[],
    admitted=[Admitted(0, pack([40, 41, 42]), 3, FREE, [1])],
    new_blocks=[],
    copies=b"",
    rows=pack([0]),
    starts=pack([0]),
    counts=pack([3]),
    samples=b"\1",
)
TO_FRONTENDS: list[Message] = [
    Heartbeat(1),
    READY,
    Outputs([Output(1, 0, [40, 41]), Output(2, 0, [42], "stop", 1)]),
    Outputs([Output(3, 0, [], "error", 0, "why", "overloaded", 1.0)]),
    Stats(b"quire:fake 1\n"),
]
TO_WORKERS: list[Message] = [Heartbeat(1), Allocate(1, 64, 16), PLAN]


def is_order(message: Any) -> bool:
    """What ends a process or makes it another one's. It is not for the process to doubt it, however odd it is."""
    return isinstance(message, Shutdown | Refused | Welcome | Allocate) or (
        isinstance(message, Status) and message.phase == "failed"
    )


LOG_LINES = 25  # that any number of bad frames may cost: one at each doubling


class Script:
    """A process of launch/. Ends it with the block, after which it must have had no fault, nor much to complain of."""

    def __init__(self, name: str, *args: object) -> None:
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(script(name, *args), stderr=self._printed)
        self.rss = psutil.Process(self.process.pid).memory_info

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        code = self.process.wait(30)
        self._printed.seek(0)
        lines = self._printed.read().splitlines()
        self._printed.close()
        assert code == 0, "\n".join(lines[-20:])
        assert sum("dropped a frame" in line for line in lines) < LOG_LINES, "\n".join(lines[-LOG_LINES:])
        assert not [line for line in lines if "Traceback" in line]

    def has_not_grown(self, before: int) -> bool:
        return self.process.poll() is None and self.rss().rss - before < 24 << 20


def harass(scheduler: FakeScheduler, mutator: Mutator, union: Any, count: int) -> None:
    """Bad frames in conversation, and others: without a header, of other conversations, out of order, of many parts."""
    codec: Codec[Any] = Codec(union)
    chance = mutator.random

    def one() -> None:
        body = mutator.next()
        if is_order(codec.decode(body)):
            return
        match chance.randrange(12):
            case 0:
                scheduler.send(body)
            case 1:
                scheduler.send(chance.randbytes(HEADER_BYTES) + body)
            case 2:
                scheduler.send(outside(0) + body)
            case 3:
                scheduler.send(body, body)
            case 4 if chance.random() < 0.05:  # ends the conversation, and the next has to begin first
                conversation = scheduler.hub._conversations.get(scheduler.peer or b"")
                if conversation is not None:
                    conversation.sent += chance.choice((-1, 1))
            case _:
                scheduler.say(body)

    for _ in range(count // 100):
        scheduler.do(lambda: [one() for _ in range(100)])


def test_a_frontend_whose_scheduler_says_anything(tmp_path: Path, sizes: Sizes) -> None:
    def answer(scheduler: FakeScheduler, peer: bytes, message: Any) -> None:
        match message:
            case Hello():
                scheduler.hub.send(peer, Welcome(1, CONFIG, INFO))
                scheduler.hub.send(peer, READY)
            case Submit(id, prompt):
                scheduler.hub.send(peer, Outputs([Output(id, 0, unpack(prompt), "length")]))
            case GetStats():
                scheduler.hub.send(peer, Stats(b"quire:fake 1\n"))

    def ask() -> str:
        body = {"model": "demo", "prompt": "import os", "max_tokens": 64}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def is_ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        return False

    port, address = free_port(), f"ipc://{tmp_path}"
    with (
        FakeScheduler(wires(address)[0], FromFrontend, answer) as scheduler,
        Script("frontend", "--scheduler", address, "--port", port) as frontend,
    ):
        wait_until(is_ready, 60)
        golden = ask()
        before = frontend.rss().rss
        harass(scheduler, Mutator(4, TO_FRONTENDS), ToFrontend, sizes.frames)
        scheduler.do(lambda: scheduler.say(READY))
        wait_until(is_ready, 30)
        assert ask() == golden
        assert frontend.has_not_grown(before)
        wait_until(lambda: scheduler.bad_frames > sizes.frames * 0.3)


def test_a_worker_whose_scheduler_says_anything(tmp_path: Path, sizes: Sizes) -> None:
    results: list[StepResult] = []
    allocated = threading.Event()

    def answer(scheduler: FakeScheduler, peer: bytes, message: Any) -> None:
        match message:
            case Hello():
                allocated.clear()
                scheduler.epoch += 1
                scheduler.hub.send(peer, Welcome(scheduler.epoch, CONFIG, INFO))
            case WorkerReady():
                scheduler.hub.send(peer, Allocate(scheduler.epoch, 64, 16))
            case Allocated():
                allocated.set()
            case StepResult():
                results.append(message)

    def step() -> bytes:
        """What a fresh group samples first."""
        scheduler.do(lambda: scheduler.hub.ask_for_hello(scheduler.peer or b""))
        allocated.clear()
        assert allocated.wait(30)
        results.clear()
        plan = msgspec.structs.replace(PLAN, epoch=scheduler.epoch)
        scheduler.do(lambda: scheduler.say(plan))
        wait_until(lambda: results, 30)
        return results[0].tokens

    address = f"ipc://{tmp_path}"
    with (
        FakeScheduler(wires(address)[1], FromWorker, answer) as scheduler,
        Script("worker", "--scheduler", address) as worker,
    ):
        assert allocated.wait(60)
        golden = step()
        before = worker.rss().rss
        for round in range(4):
            plan = msgspec.structs.replace(PLAN, epoch=scheduler.epoch)
            harass(scheduler, Mutator(5 + round, [*TO_WORKERS, plan]), ToWorker, sizes.frames // 4)
            assert step() == golden
        assert worker.has_not_grown(before)
        wait_until(lambda: scheduler.bad_frames > sizes.frames * 0.3)


class FalseWorker:
    """A worker without a model. `step` says what it answers a plan with."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.link: Link[Any] = Link(context, wires(address)[1], ToWorker)
        self.epoch = 0
        self.groups = 0  # that it was in
        self.step = self.answer
        self._beat_at = 0.0

    def turn(self) -> None:
        """Live for a moment."""
        message = self.link.receive(0.002)
        match message:
            case Welcome(epoch) if epoch != self.epoch:
                self.epoch, self.groups = epoch, self.groups + 1
                self.link.send(WorkerReady(0, INFO.fingerprint, "none", "float32", 1000, 10**6))
            case Allocate():
                self.link.send(Allocated(0))
            case StepPlan():
                self.step(message)
            case Heartbeat(epoch) if epoch == STRANGER_EPOCH:
                self.hello()
            case _ if message is LOST:
                self.hello()
        if time.monotonic() - self._beat_at > HEARTBEAT_S / 2:
            self._beat_at = time.monotonic()
            self.link.send(Heartbeat(self.epoch)) if self.epoch else self.hello()

    def hello(self) -> None:
        self.epoch = 0
        self.link.send(Hello(PROTOCOL, "worker", "false worker"))

    def answer(self, plan: StepPlan) -> None:
        """As a real one does: token 40 + n for step n."""
        count = sum(plan.samples)
        self.link.send(StepResult(plan.epoch, plan.step, pack([1] * count), pack([40 + plan.step % 10] * count)))


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def test_a_scheduler_whose_worker_says_anything(tmp_path: Path, context: zmq.Context[Any], sizes: Sizes) -> None:
    """What it says of a step is believed or not; the scheduler stays, and goes on with the worker when it behaves."""
    codec: Codec[Any] = Codec(FromWorker)
    mutator = Mutator(9, [Heartbeat(1)])
    address = f"ipc://{tmp_path}"
    frontend: Link[Any] = Link(context, wires(address)[0], ToFrontend)
    worker = FalseWorker(context, address)
    finished: dict[int, str | None] = {}
    phase = ""

    def lie(plan: StepPlan) -> None:
        count = sum(plan.samples)
        mutator.bodies = [
            encode(StepResult(plan.epoch, plan.step, pack([1] * count), pack([40] * count))),
            encode(RequestFault(plan.epoch, plan.step, 0, "why")),
            encode(Progress("loading", 0.5)),
            encode(Left(0, plan.epoch, "why")),
            encode(WorkerFault(0, "why", 70)),
        ]
        for _ in range(20):
            body = mutator.next()
            message = codec.decode(body)
            if not isinstance(message, WorkerFault | WorkerReady):  # with some it gives up, or ends the engine
                worker.link._send(worker.link._conversation.header() + body)
        worker.answer(plan)

    def turn() -> None:
        nonlocal phase
        worker.turn()
        match frontend.receive(0.002):
            case Status(word):
                phase = word
            case Outputs(outputs):
                finished.update({output.id: output.finish for output in outputs if output.finish})
            case Heartbeat(epoch) if epoch == STRANGER_EPOCH:
                frontend.send(Hello(PROTOCOL, "frontend", "test"))

    def until(condition: Any) -> None:
        end, beat_at = time.monotonic() + 60, 0.0
        while not condition():
            assert time.monotonic() < end
            if time.monotonic() - beat_at > HEARTBEAT_S / 2:
                beat_at = time.monotonic()
                frontend.send(Heartbeat(1))
            turn()

    model = ("--model", "demo", "--dtype", "float32", "--max-model-len", 256)
    with Script("scheduler", *model, "--listen", address) as scheduler:
        frontend.send(Hello(PROTOCOL, "frontend", "test"))
        until(lambda: phase == "ready")
        before = scheduler.rss().rss
        worker.step = lie
        for id in range(sizes.frames // 40):
            frontend.send(Submit(id, pack([5] * 20), FREE))
            until(lambda id=id: id in finished)
        worker.step = worker.answer
        until(lambda: phase == "ready")
        frontend.send(Submit(10**6, pack([5] * 20), FREE))
        until(lambda: finished.get(10**6) == "length")
        assert scheduler.has_not_grown(before)
        assert worker.groups > 1
        worker.link.send(WorkerFault(0, "no more", 70))
        until(lambda: phase == "recovering")
