"""A worker and a frontend without model or HTTP, over real sockets, for tests of the scheduler's process."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq

from quire.common.channel import Link, wires
from quire.common.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from quire.common.messages import (
    PROTOCOL,
    Allocate,
    Allocated,
    Heartbeat,
    Hello,
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


def config(*, ranks: int = 1, **scheduler: int) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model="test"),
        cache=CacheConfig(block_size=4, num_gpu_blocks_override=NUM_BLOCKS),
        scheduler=SchedulerConfig(**scheduler),
        parallel=ParallelConfig(tensor_parallel_size=ranks),
    )


class Peer:
    """The connecting end of a wire; what comes in is kept by type."""

    def __init__(self, address: str, union: Any) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.link: Link[Any] = Link(self.context, address, union)
        self.seen: defaultdict[type, list[Any]] = defaultdict(list)

    def send(self, message: Message) -> None:
        self.link.send(message)

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
    """Rank `rank`. Answers each plan with tokens 10, 11, ...; `step` says with what instead."""

    def __init__(self, address: str, rank: int = 0) -> None:
        super().__init__(wires(address)[1], ToWorker)
        self.rank = rank
        self.epoch = 0
        self.step: Callable[[StepPlan], list[Message]] = self.answer
        self.token = 10
        self.released: list[int] = []

    def start(self, *, fingerprint: str = "fingerprint") -> None:
        """From Hello to Allocated."""
        self.send(Hello(PROTOCOL, "worker", f"worker {self.rank}", self.rank))
        self.epoch = self.until(Welcome).epoch
        self.send(Progress("loading", 0.5, "halfway"))
        self.send(WorkerReady(self.rank, fingerprint, "none", "float32", 100, 10**6))

    def allocate(self) -> Allocate:
        allocate: Allocate = self.until(Allocate)
        self.send(Progress("warming up", 0.0))
        self.send(Allocated(self.rank))
        return allocate

    def answer(self, plan: StepPlan) -> list[Message]:
        count = sum(plan.samples)
        tokens = [10 + (self.token + i) % 80 for i in range(count)]
        self.token += count
        return [StepResult(plan.epoch, plan.step, pack([1] * count), pack(tokens))]

    def serve(self, timeout_s: float = 0.01) -> StepPlan | None:
        """Hear one message; answer it if it is a plan."""
        plan = self.hear(timeout_s)
        if not isinstance(plan, StepPlan):
            return None
        self.released += plan.released
        if self.rank == 0:
            for message in self.step(plan):
                self.send(message)
        return plan


class FakeFrontend(Peer):
    def __init__(self, address: str, role: str = "frontend") -> None:
        super().__init__(wires(address)[0], ToFrontend)
        self.role = role

    def greet(self) -> Welcome:
        self.send(Hello(PROTOCOL, self.role, self.role))
        welcome: Welcome = self.until(Welcome)
        return welcome

    def submit(self, id: int, prompt: list[int], *, output: bytes = b"", **sampling: Any) -> None:
        self.send(Submit(id, pack(prompt), SamplingParams(**{"seed": 0, "max_tokens": 4, **sampling}), output=output))

    def outputs(self, id: int) -> list[Output]:
        return [output for message in self.seen[Outputs] for output in message.outputs if output.id == id]

    def finish(self, id: int) -> str | None:
        outputs = self.outputs(id)
        return outputs[-1].finish if outputs else None

    def tokens(self, id: int) -> list[int]:
        return [token for output in self.outputs(id) for token in output.tokens]

    def metrics(self) -> dict[str, float]:
        """Asks for the metrics; label sets of one name are summed."""
        from quire.common.messages import GetStats

        count = len(self.seen[Stats])
        self.send(GetStats())
        values: dict[str, float] = defaultdict(float)
        for line in self.until(Stats, count + 1).text.decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name.partition("{")[0]] += float(value)
        return values


class Engine:
    """A scheduler process in a thread, and its peers."""

    def __init__(self, run_dir: Path, config: EngineConfig) -> None:
        self.address = f"ipc://{run_dir}"
        self.process = Process(config, INFO, address=self.address, run_dir=run_dir)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._peers: list[Peer] = []
        self._thread.start()

    def _run(self) -> None:
        self.code = self.process.run()

    def worker(self, rank: int = 0) -> FakeWorker:
        worker = FakeWorker(self.address, rank)
        self._peers.append(worker)
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
        deadline = time.monotonic() + 10
        while not frontend.seen[Status] or frontend.seen[Status][-1].phase != "ready":
            assert time.monotonic() < deadline
            frontend.hear()
        return worker, frontend

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


def turn(worker: FakeWorker, frontend: FakeFrontend, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Let both live until something has happened."""
    deadline, beat = time.monotonic() + timeout_s, 0.0
    while not until():
        now = time.monotonic()
        assert now < deadline, f"frontend heard {dict(frontend.seen)}"
        if now - beat > 1.0:
            frontend.send(Heartbeat(1))
            beat = now
        worker.serve(0.002)
        frontend.hear(0.002)
