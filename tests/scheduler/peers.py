"""A worker and a frontend without model or HTTP, over real sockets, for tests of the scheduler's process."""

import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

from quire.common.channel import LOST, Link, wires
from quire.common.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RecoveryConfig,
    SchedulerConfig,
)
from quire.common.curve import PeerKeys, SchedulerKeys
from quire.common.messages import (
    PROTOCOL,
    Allocate,
    Allocated,
    GetStats,
    Heartbeat,
    Hello,
    Left,
    Message,
    Output,
    Outputs,
    Progress,
    Stats,
    Status,
    StepPlan,
    StepResult,
    Submit,
    ToFrontend,
    ToWorker,
    Welcome,
    WorkerReady,
    pack,
)
from quire.common.model_info import ModelInfo
from quire.common.sampling import SamplingParams
from quire.scheduler.process import Process
from quire.scheduler.request import Request

from .simulation import Device, Outcome, expected

INFO = ModelInfo(
    model="test",
    architecture="None",
    vocab_size=100,
    context_length=64,
    max_model_len=64,
    eos_token_ids=(2,),
    fingerprint="fingerprint",
)
NUM_BLOCKS = 40


BLOCK_SIZE = 4


def config(*, ranks: int = 1, stall_timeout: float = 30.0, **scheduler: int) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model="test"),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_gpu_blocks_override=NUM_BLOCKS),
        scheduler=SchedulerConfig(**scheduler),
        parallel=ParallelConfig(tensor_parallel_size=ranks),
        recovery=RecoveryConfig(stall_timeout=stall_timeout),
    )


class Peer:
    """The connecting end of a wire; what comes in is kept by type."""

    def __init__(self, address: str, union: Any, keys: PeerKeys | None = None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.link: Link[Any] = Link(self.context, address, union, keys)
        self.seen: defaultdict[type, list[Any]] = defaultdict(list)
        self.beat_at = 0.0

    def send(self, message: Message) -> None:
        self.link.send(message)

    def beat(self, sign: Message) -> None:
        """A sign of life, when one is due."""
        if time.monotonic() - self.beat_at > 0.5:
            self.beat_at = time.monotonic()
            self.send(sign)

    def skip(self) -> None:
        """The next frame is lost on its way."""
        self.link._conversation.sent += 1

    def die(self) -> None:
        """As the kernel ends it: the connection closes, nothing is said."""
        self.link.socket.close(linger=0)

    def send_bytes(self, frame: bytes) -> None:
        self.link.socket.send(frame)

    def hear(self, timeout_s: float = 0.01) -> Any:
        message = self.link.receive(timeout_s)
        if message is not None:
            self.seen[type(message)].append(message)
        return message

    def until(self, kind: type, count: int = 1, timeout_s: float = 10.0) -> Any:
        """Hear until `count` messages of a kind have come; the last of them."""
        deadline = time.monotonic() + timeout_s
        while len(self.seen[kind]) < count:
            assert time.monotonic() < deadline, f"no {kind.__name__}; heard {dict(self.seen)}"
            self.hear()
        return self.seen[kind][count - 1]

    def close(self) -> None:
        self.link.close()
        self.context.term()


class FakeWorker(Peer):
    """Rank `rank`, as the real one behaves. Answers each plan with tokens 10, 11, ...; `step` says with what instead.

    `start` and `allocate` go through a start step by step; `say_hello` and `serve` live through any.
    """

    def __init__(self, address: str, rank: int = 0, keys: PeerKeys | None = None) -> None:
        super().__init__(wires(address)[1], ToWorker, keys)
        self.rank = rank
        self.epoch = 0
        self.left = 0
        self.step: Callable[[StepPlan], list[Message]] = self.answer
        self.device: Device | None = None
        self.token = 10
        self.released: list[int] = []

    @property
    def ready(self) -> WorkerReady:
        return WorkerReady(self.rank, "fingerprint", "none", "float32", 100, 10**6)

    @property
    def hello(self) -> Hello:
        return Hello(PROTOCOL, "worker", f"worker {self.rank}", self.rank)

    def say_hello(self) -> None:
        self.beat_at = time.monotonic()
        self.send(self.hello)

    def start(self, *, fingerprint: str = "fingerprint") -> None:
        """From Hello to WorkerReady."""
        self.say_hello()
        self.epoch = self.until(Welcome).epoch
        self.send(Progress("loading", 0.5, "halfway"))
        self.send(msgspec.structs.replace(self.ready, fingerprint=fingerprint))

    def allocate(self) -> Allocate:
        allocate: Allocate = self.until(Allocate)
        self.send(Progress("warming up", 0.0))
        self.send(Allocated(self.rank))
        return allocate

    def compute(self) -> None:
        """From now on answer as a model would: a token follows from those before it. Every KV read is checked."""
        self.device = Device(NUM_BLOCKS, BLOCK_SIZE, 256, 2048)
        self.device.epoch = self.epoch
        self.step = self.run

    def run(self, plan: StepPlan) -> list[Message]:
        assert self.device is not None
        return [self.device.run(plan)]

    def answer(self, plan: StepPlan) -> list[Message]:
        count = sum(plan.samples)
        tokens = [10 + (self.token + i) % 80 for i in range(count)]
        self.token += count
        return [StepResult(plan.epoch, plan.step, pack([1] * count), pack(tokens))]

    def resume(self) -> None:
        """Answer what has been held back, and go on."""
        self.step = self.answer if self.device is None else self.run
        for plan in self.seen[StepPlan]:
            if plan.epoch == self.epoch:
                for message in self.step(plan):
                    self.send(message)

    def leave(self, why: str = "", *, out_of_memory: bool = False) -> None:
        """The group is over for this rank."""
        left, self.left, self.epoch = self.epoch, self.epoch, 0
        if why:
            self.send(Left(self.rank, left, why, out_of_memory))
        self.say_hello()

    def serve(self, timeout_s: float = 0.01) -> Any:
        """Hear one message, do what it asks for, return it."""
        self.beat(Heartbeat(self.epoch) if self.epoch else self.hello)
        message = self.hear(timeout_s)
        match message:
            case StepPlan(epoch) if epoch == self.epoch:
                self.released += message.released
                for answer in self.step(message):
                    if self.rank == 0 or not isinstance(answer, StepResult):
                        self.send(answer)
            case Welcome(epoch) if epoch not in (self.epoch, self.left):
                self.epoch = epoch
                self.send(self.ready)
            case Allocate(epoch) if epoch == self.epoch:
                if self.device is not None:
                    self.device.forget(epoch)
                self.send(Allocated(self.rank))
            case Heartbeat(epoch) if self.epoch and epoch != self.epoch:
                self.leave()
            case _ if message is LOST:
                self.leave("frames were lost")
        return message


class FakeFrontend(Peer):
    def __init__(self, address: str, role: str = "frontend", keys: PeerKeys | None = None) -> None:
        super().__init__(wires(address)[0], ToFrontend, keys)
        self.role = role
        self.wanted: dict[int, Outcome] = {}

    def greet(self) -> Welcome:
        count = len(self.seen[Welcome])
        self.send(Hello(PROTOCOL, self.role, self.role))
        welcome: Welcome = self.until(Welcome, count + 1)
        return welcome

    def submit(self, id: int, prompt: list[int], *, output: bytes = b"", attempts: int = 0, **sampling: Any) -> None:
        params = SamplingParams(**{"seed": 0, "max_tokens": 4, **sampling})
        self.wanted[id] = expected(Request(id, array("i", prompt), len(prompt), params))
        self.send(Submit(id, pack(prompt), params, output=output, attempts=attempts))

    def phases(self) -> list[str]:
        """Each when it changed."""
        names = [status.phase for status in self.seen[Status]]
        return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]

    def outputs(self, id: int) -> list[Output]:
        return [output for message in self.seen[Outputs] for output in message.outputs if output.id == id]

    def finish(self, id: int) -> str | None:
        outputs = self.outputs(id)
        return outputs[-1].finish if outputs else None

    def tokens(self, id: int) -> list[int]:
        return [token for output in self.outputs(id) for token in output.tokens]

    def outcome(self, id: int) -> Outcome:
        """What a client has by now; its ids must have come in order, none of them twice."""
        found = Outcome([])
        for output in self.outputs(id):
            assert output.first_index == len(found.tokens), ("a gap or a repetition", self.outputs(id))
            found.tokens += output.tokens
            found.finish = output.finish
        return found

    def undisturbed(self) -> bool:
        """Whether every request has ended, each as if nobody else had been there."""
        ended = all(self.finish(id) for id in self.wanted)
        assert not ended or {id: self.outcome(id) for id in self.wanted} == self.wanted
        return ended

    def metrics(self) -> dict[str, float]:
        """Asks for the metrics; label sets of one name are summed, and there under their own names besides."""
        count = len(self.seen[Stats])
        self.send(GetStats())
        values: dict[str, float] = defaultdict(float)
        for line in self.until(Stats, count + 1).text.decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0]] += float(value)
                values[name] = float(value)
        return values


class Engine:
    """A scheduler process in a thread, and its peers."""

    def __init__(self, run_dir: Path, config: EngineConfig, keys: SchedulerKeys | None = None) -> None:
        self.address = f"ipc://{run_dir}"
        self.run_dir, self.config, self.keys = run_dir, config, keys
        self._peers: list[Peer] = []
        self.start()

    def start(self) -> None:
        """A scheduler; another one, where the last one has ended."""
        self.code: int | None = None
        self.process = Process(self.config, INFO, address=self.address, run_dir=self.run_dir, keys=self.keys)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.process.run()

    def worker(self, rank: int = 0) -> FakeWorker:
        worker = FakeWorker(self.address, rank)
        self._peers.append(worker)
        return worker

    def computing(self, rank: int = 0) -> FakeWorker:
        """A worker that has just been started, with a model."""
        worker = self.worker(rank)
        worker.compute()
        worker.say_hello()
        return worker

    def frontend(self, role: str = "frontend") -> FakeFrontend:
        frontend = FakeFrontend(self.address, role)
        self._peers.append(frontend)
        return frontend

    def ready(self) -> tuple[FakeWorker, FakeFrontend]:
        """One worker and one frontend of an engine that serves."""
        worker, frontend = self.worker(), self.frontend()
        frontend.greet()
        worker.start()
        worker.allocate()
        turn(worker, frontend, lambda: frontend.phases()[-1:] == ["ready"])
        return worker, frontend

    def all_ready(self, ranks: int) -> tuple[list[FakeWorker], FakeFrontend]:
        """As many workers, with models, and one frontend of an engine that serves."""
        frontend = self.frontend()
        frontend.greet()
        workers = [self.computing(rank) for rank in range(ranks)]
        turn(workers, frontend, lambda: frontend.phases()[-1:] == ["ready"])
        return workers, frontend

    def join(self, timeout_s: float = 10.0) -> int | None:
        self._thread.join(timeout_s)
        return self.code

    def close(self) -> None:
        self.process.stop()
        self._thread.join(10)
        for peer in self._peers:
            peer.close()
        assert not self._thread.is_alive()


@contextmanager
def running(run_dir: Path, config: EngineConfig) -> Iterator[Engine]:
    engine = Engine(run_dir, config)
    try:
        yield engine
    finally:
        engine.close()


def turn(
    workers: FakeWorker | list[FakeWorker],
    frontend: FakeFrontend,
    until: Callable[[], bool],
    timeout_s: float = 10.0,
) -> None:
    """Let all of them live until something has happened."""
    workers = workers if isinstance(workers, list) else [workers]
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, f"frontend heard {dict(frontend.seen)}"
        for worker in workers:
            worker.serve(0.002)
        frontend.beat(Heartbeat(1))
        frontend.hear(0.002)
