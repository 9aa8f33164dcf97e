"""The worker process against a scheduler made of a `Hub`, over real sockets."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from quire.common.channel import Hub, wires
from quire.common.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from quire.common.errors import EXIT_CONFIG, EXIT_FATAL
from quire.common.messages import (
    PROTOCOL,
    Allocate,
    Allocated,
    FromWorker,
    Heartbeat,
    Hello,
    Progress,
    Refused,
    RequestFault,
    Shutdown,
    StepResult,
    Welcome,
    WorkerFault,
    WorkerReady,
    unpack,
)
from quire.common.model_info import read_model_info
from quire.common.process import END

from ..checkpoints import oracle_greedy
from .plans import admit, make_plan

PATIENCE_S = 60.0
CODE = """
import sys, logging
from quire.worker.process import main
logging.basicConfig(level="INFO")
sys.exit(main(scheduler=sys.argv[1], rank=int(sys.argv[2]), device=None, supervised=True))
"""
BLOCK_SIZE = 8
PROMPT = [5, 9, 200, 31, 7]


class Scheduler:
    """The scheduler's end of the workers' wire, told what to say by the tests."""

    def __init__(self, folder: Path, path: Path, size: int = 1, **model: Any) -> None:
        self.address = f"ipc://{folder}"
        self.config = EngineConfig(
            model=ModelConfig(model=str(path), dtype="float32", **model),
            cache=CacheConfig(block_size=BLOCK_SIZE, kv_cache_memory=1 << 20),
            scheduler=SchedulerConfig(max_num_seqs=4),
            parallel=ParallelConfig(tensor_parallel_size=size, threads=1),
        )
        self.info = read_model_info(str(path), path, max_model_len=64)
        self.folder, self.size = folder, size
        self.context = zmq.Context()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.epoch = 0
        self.listen(epoch=7)

    def listen(self, epoch: int) -> None:
        """Start, or start anew."""
        if self.epoch:
            self.hub.close()
        self.hub: Hub[FromWorker] = Hub(self.context, wires(self.address)[1], FromWorker)
        self.form_group(epoch)

    def form_group(self, epoch: int) -> None:
        """The workers are to meet anew."""
        self.epoch = epoch
        self.rendezvous = f"file://{self.folder}/rendezvous-{epoch}" if self.size > 1 else ""
        self.peers: dict[int, bytes] = {}
        self.hellos: dict[int, Hello] = {}

    def start_worker(self, rank: int = 0) -> subprocess.Popen[bytes]:
        self.workers.append(subprocess.Popen([sys.executable, "-c", CODE, self.address, str(rank)]))
        return self.workers[-1]

    def expect(self, kind: type, patience_s: float = PATIENCE_S) -> tuple[bytes, Any]:
        """The next message that is of this kind, heartbeats and progress aside."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            received = next(self.hub.received(1000), None)
            if received is None:
                time.sleep(0.002)
            elif isinstance(received[1], StepResult) and received[1].epoch != self.epoch:
                continue  # of a plan of the scheduler before
            elif isinstance(received[1], kind):
                return received
            else:
                assert isinstance(received[1], Heartbeat | Progress | Hello), received[1]
                if received[0] not in self.peers.values() and not isinstance(received[1], Hello):
                    self.hub.send(received[0], Heartbeat(0))  # who are you?
        raise AssertionError(f"no {kind.__name__} came")

    def welcome(self) -> None:
        identity, hello = self.expect(Hello)
        assert hello.protocol == PROTOCOL
        self.peers[hello.rank], self.hellos[hello.rank] = identity, hello
        self.hub.send(identity, Welcome(self.epoch, self.config, self.info, self.rendezvous))

    def meet(self, num_blocks: int = 12) -> list[WorkerReady]:
        """The handshake of all ranks, up to the first plan."""
        while len(self.peers) < self.size:
            self.welcome()
        ready = [self.expect(WorkerReady)[1] for _ in range(self.size)]
        self.tell(Allocate(self.epoch, num_blocks, BLOCK_SIZE))
        for _ in range(self.size):
            self.expect(Allocated)
        return ready

    def tell(self, message: Any) -> None:
        for identity in self.peers.values():
            assert self.hub.send(identity, message)

    def plan(self, *args: Any, **fields: Any) -> None:
        self.tell(make_plan(*args, **{"epoch": self.epoch, **fields}))

    def continue_prompt(self, new_tokens: int) -> list[int]:
        """Two steps in flight: each is planned before the one before it has answered."""
        length = len(PROMPT)
        self.plan(0, [(2, 0, length, True)], admitted=[admit(2, PROMPT, [3, 1, 4, 2])])
        for step in range(1, new_tokens):
            self.plan(step, [(2, length + step - 1, 1, True)])
        ids = []
        for step in range(new_tokens):
            identity, result = self.expect(StepResult)
            assert (identity, result.epoch, result.step) == (self.peers[0], self.epoch, step)
            assert unpack(result.counts) == [1]
            ids += unpack(result.tokens)
        self.plan(new_tokens, [], released=[2])
        assert unpack(self.expect(StepResult)[1].tokens) == []
        return ids

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.hub.close()
        self.context.term()


@pytest.fixture
def scheduler(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(name: str = "qwen3", **options: Any) -> Scheduler:
        made.append(Scheduler(tmp_path, checkpoint(name), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def expected(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]) -> list[int]:
    return oracle_greedy(oracle(checkpoint("qwen3")), PROMPT, 12)


def test_from_hello_to_shutdown(scheduler: Callable[..., Scheduler], expected: list[int]) -> None:
    there = scheduler()
    worker = there.start_worker()
    (ready,) = there.meet()
    assert ready.fingerprint == there.info.fingerprint
    assert ready.dtype == "float32"
    assert ready.block_bytes == 3 * 2 * 2 * BLOCK_SIZE * 32 * 4
    assert ready.available_bytes == 1 << 20
    assert there.continue_prompt(12) == expected
    there.plan(0, [], epoch=there.epoch + 1)  # of another scheduler: not answered
    there.tell(Shutdown())
    assert worker.wait(10) == 0
    for received in there.hub.received(1000):
        assert isinstance(received[1], Heartbeat)


@pytest.mark.parametrize("ending", ["shutdown", "sigterm"])
def test_two_ranks(scheduler: Callable[..., Scheduler], expected: list[int], ending: str) -> None:
    there = scheduler(size=2)
    workers = [there.start_worker(rank) for rank in (1, 0)]
    there.meet()
    assert there.continue_prompt(12) == expected
    if ending == "shutdown":
        there.tell(Shutdown())
    else:
        for worker in workers:
            worker.send_signal(END)
    assert [worker.wait(10) for worker in workers] == [0, 0]


@pytest.mark.parametrize("size", [1, 2])
def test_a_new_scheduler_finds_the_weights_loaded(
    scheduler: Callable[..., Scheduler], expected: list[int], size: int
) -> None:
    """Of two ranks, one waits in the middle of a step whose plan the other never got: the scheduler died between."""
    there = scheduler(size=size)
    workers = [there.start_worker(rank) for rank in range(size)]
    there.meet()
    there.plan(0, [(2, 0, len(PROMPT), True)], admitted=[admit(2, PROMPT, [3])])
    there.expect(StepResult)
    there.hub.send(there.peers[0], make_plan(1, [(2, len(PROMPT), 1, True)], epoch=there.epoch))
    there.listen(epoch=8)
    there.meet()
    assert {hello.fingerprint for hello in there.hellos.values()} == {there.info.fingerprint}
    assert there.continue_prompt(12) == expected  # row 2 was forgotten
    there.tell(Welcome(8, there.config, there.info, there.rendezvous))  # said again: nothing happens
    there.expect(Heartbeat)
    for worker in workers:
        worker.send_signal(END)
    assert [worker.wait(10) for worker in workers] == [0] * size


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_outlives_the_other(scheduler: Callable[..., Scheduler], expected: list[int], lost: int) -> None:
    there = scheduler(size=2)
    workers = [there.start_worker(rank) for rank in range(2)]
    there.meet()
    there.plan(0, [(2, 0, len(PROMPT), True)], admitted=[admit(2, PROMPT, [3])])
    there.expect(StepResult)
    workers[lost].kill()
    workers[lost].wait()
    stayed = there.peers.pop(1 - lost)
    there.peers = {1 - lost: stayed}
    there.plan(1, [(2, len(PROMPT), 1, True)])  # an exchange that nobody else takes part in
    there.expect(Hello)
    there.tell(Welcome(there.epoch, there.config, there.info, there.rendezvous))  # of the group that is no more
    there.expect(Hello)
    there.form_group(epoch=8)
    there.start_worker(lost)
    there.meet()
    assert there.hellos[1 - lost].fingerprint == there.info.fingerprint
    assert there.peers[1 - lost] == stayed
    assert there.continue_prompt(12) == expected


def test_a_rank_that_waits_for_another_hears_what_it_is_told(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler(size=2)
    worker = there.start_worker(0)
    there.welcome()
    there.listen(epoch=8)
    there.welcome()
    there.expect(Heartbeat)
    there.tell(Shutdown())
    assert worker.wait(10) == 0


def test_sigterm_ends_a_worker_that_nobody_welcomes(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    worker = there.start_worker()
    there.expect(Hello)
    there.expect(Hello)  # said again until it is answered
    worker.send_signal(END)
    assert worker.wait(10) == 0


def test_refused(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    worker = there.start_worker()
    identity, _ = there.expect(Hello)
    there.hub.send(identity, Refused("another protocol"))
    assert worker.wait(10) == EXIT_CONFIG


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json"])
def test_a_model_that_cannot_be_served(
    scheduler: Callable[..., Scheduler], checkpoint: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint("qwen3").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    if damage == "config.json":
        config = msgspec.json.decode((broken / damage).read_bytes())
        (broken / damage).write_bytes(msgspec.json.encode({**config, "hidden_act": "tanh"}))
    else:
        (broken / damage).write_bytes((broken / damage).read_bytes()[:-8])
    there = Scheduler(tmp_path, broken)
    try:
        worker = there.start_worker()
        identity, _ = there.expect(Hello)
        there.hub.send(identity, Welcome(there.epoch, there.config, there.info))
        fault = there.expect(WorkerFault)[1]
        assert ("tanh" if damage == "config.json" else damage) in fault.why
        assert worker.wait(10) == EXIT_CONFIG
    finally:
        there.close()


def test_a_plan_that_cannot_be_is_fatal(scheduler: Callable[..., Scheduler]) -> None:
    there = scheduler()
    worker = there.start_worker()
    there.meet()
    there.plan(0, [(1, 0, 3, False)])
    assert "row 1" in there.expect(WorkerFault)[1].why
    assert worker.wait(10) == EXIT_FATAL


def test_a_row_of_nan_is_told_and_its_neighbours_go_on(
    tmp_path: Path, checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]
) -> None:
    """Token 11's embedding is NaN: whoever reads it is lost."""
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path / "poisoned"
    path.mkdir()
    source = checkpoint("qwen3")
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][11] = float("nan")
    save_file(tensors, path / "model.safetensors")
    there = Scheduler(tmp_path, path)
    try:
        there.start_worker()
        there.meet()
        lost = admit(0, [1, 11, 2], [7])
        there.plan(0, [(0, 0, 3, True), (2, 0, 5, True)], admitted=[lost, admit(2, PROMPT, [3, 1])])
        fault = there.expect(RequestFault)[1]
        assert (fault.step, fault.row) == (0, 0)
        result = there.expect(StepResult)[1]
        assert unpack(result.counts) == [0, 1]
        ids = unpack(result.tokens)
        there.plan(1, [(2, 5, 1, True)], released=[0])
        ids += unpack(there.expect(StepResult)[1].tokens)
        there.plan(2, [(1, 0, 5, True)], admitted=[admit(1, PROMPT, [7])])  # in the block that held NaN
        assert unpack(there.expect(StepResult)[1].tokens) == ids[:1]
        assert ids == oracle_greedy(oracle(source), PROMPT, 2)
        assert torch.isnan(tensors["model.embed_tokens.weight"]).any()
    finally:
        there.close()
