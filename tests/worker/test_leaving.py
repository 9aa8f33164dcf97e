"""When a worker leaves its group, what it says, and what it lets go of: without processes or sockets."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.common.channel import LOST, memory_pair
from quire.common.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from quire.common.messages import (
    Allocate,
    Allocated,
    FromWorker,
    Heartbeat,
    Hello,
    Left,
    Progress,
    Shutdown,
    StepResult,
    ToWorker,
    Welcome,
    WorkerReady,
)
from quire.common.model_info import read_model_info
from quire.worker import failures, process
from quire.worker.failures import OutOfMemory, StepFailed
from quire.worker.parallel import PeerLost
from quire.worker.process import Worker
from quire.worker.runner import StepOutput

from .plans import admit, make_plan

EPOCH = 5


class Wire:
    """The worker's end of its wire: says what it is given, in this order, and keeps what it hears."""

    def __init__(self, says: Sequence[Any]) -> None:
        self.says, self.heard = [*says, Shutdown()], []
        self.codec = memory_pair(ToWorker, FromWorker)[0].codec

    def receive(self, timeout_s: float | None = None) -> Any:
        return self.says.pop(0)

    def send(self, message: Any) -> None:
        self.heard.append(message)


class Device:
    """Stands in for a runner, whose steps are `ready` at once or not. `fails` is what step 7 raises, when it is launched
    or when it is read."""

    def __init__(self, fails: Exception | None = None, *, when: str = "launch", ready: bool = True) -> None:
        self.fails, self.when, self.ready = fails, when, ready
        self.held: weakref.ref[torch.Tensor] | None = None

    def launch(self, plan: Any) -> Any:
        self._fail(plan.step, "launch")
        return Step(self, plan.step)

    def _fail(self, step: int, when: str) -> None:
        held_by_the_frame = torch.ones(3)
        if self.fails and (step, when) == (7, self.when):
            self.held = weakref.ref(held_by_the_frame)
            raise type(self.fails)(*self.fails.args)  # a new one: nobody else keeps its traceback


class Step:
    def __init__(self, device: Device, step: int) -> None:
        self.device, self.step, self.ready = device, step, device.ready

    def read(self) -> StepOutput:
        self.device._fail(self.step, "read")
        return StepOutput([self.step], [])


def worker_on(wire: Wire, device: Device | None = None) -> Worker:
    """One that has been serving in group EPOCH."""
    worker = Worker(wire, 0, None)  # type: ignore[arg-type]
    worker.epoch, worker.runner = EPOCH, device or Device()  # type: ignore[assignment]
    worker.beat_at = float("inf")
    return worker


def said(*says: Any, device: Device | None = None) -> list[Any]:
    """By a worker that hears this, until the Hello that follows."""
    wire = Wire(says)
    assert worker_on(wire, device).run() == 0
    return wire.heard


def plan(step: int) -> Any:
    return make_plan(step, [], epoch=EPOCH)


def test_plans_count_once_and_in_their_order() -> None:
    heard = said(plan(3), plan(3), plan(4), plan(2), plan(5))
    assert [message.step for message in heard] == [3, 4, 5]


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ([plan(3), plan(5)], "step 5 came behind step 3"),
        ([LOST], "messages of the scheduler were lost"),
        ([plan(3), LOST, plan(4)], "messages of the scheduler were lost"),
    ],
)
def test_what_was_missed_ends_the_group(says: list[Any], why: str) -> None:
    heard = [message for message in said(*says) if not isinstance(message, StepResult)]
    assert [type(message) for message in heard] == [Left, Hello]
    assert (heard[0].rank, heard[0].epoch, heard[0].out_of_memory) == (0, EPOCH, False)
    assert why in heard[0].why


@pytest.mark.parametrize("why", [LOST, Heartbeat(EPOCH + 1)])
def test_what_was_not_read_is_not_answered(why: Any) -> None:
    heard = said(plan(3), plan(4), why, None, None, plan(5), None, device=Device(ready=False))
    assert not [message for message in heard if isinstance(message, StepResult)]


def test_who_is_called_away_only_says_hello() -> None:
    assert [type(message) for message in said(Heartbeat(EPOCH), Heartbeat(EPOCH + 1), plan(1))] == [Hello]


def test_who_is_in_no_group_leaves_none() -> None:
    wire = Wire([LOST, Heartbeat(EPOCH)])
    worker = worker_on(wire)
    worker.epoch, worker.left = 0, EPOCH
    assert worker.run() == 0
    assert [type(message) for message in wire.heard] == [Hello]
    assert worker.left == EPOCH


@pytest.mark.parametrize("when", ["launch", "read"])
@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (IndexError("index out of range in self"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (PeerLost("rank 0 lost the others"), False),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    ],
)
def test_a_failed_step_is_over_before_it_is_told(
    error: Exception, out_of_memory: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are free, so a smaller step may fit; the steps behind it are of a group that is no more."""
    device = Device(error, when=when)
    wire = Wire([plan(6), plan(7), plan(8)])
    worker = worker_on(wire, device)
    monkeypatch.setattr(process.log, "disabled", True)  # pytest keeps what is logged, with its traceback
    freed: list[bool] = []
    keep = wire.send

    def send(message: Any) -> None:
        if isinstance(message, Left):
            freed.append(device.held is not None and device.held() is None)
        keep(message)

    wire.send = send  # type: ignore[method-assign]
    assert worker.run() == 0
    assert [type(message) for message in wire.heard] == [StepResult, Left, Hello]
    assert wire.heard[1].out_of_memory is out_of_memory
    assert str(error) in wire.heard[1].why
    assert freed == [True]
    assert not worker.launched


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_a_lost_device_is_no_failed_step(error: Exception) -> None:
    with pytest.raises(type(error)), failures.step():
        raise error


def test_a_failed_step_says_what_it_was() -> None:
    with pytest.raises(StepFailed, match="IndexError: out of range"), failures.step():
        raise IndexError("out of range")
    with pytest.raises(OutOfMemory), failures.step():
        torch.empty(1 << 50)


@pytest.mark.parametrize(("epoch", "answers"), [(EPOCH, 0), (EPOCH + 1, 1)])
def test_a_group_that_was_left_is_not_joined_again(checkpoint: Callable[[str], Path], epoch: int, answers: int) -> None:
    path = checkpoint("llama")
    welcome = Welcome(EPOCH, EngineConfig(), read_model_info(str(path), path))
    wire = Wire([LOST, Welcome(epoch, welcome.config, welcome.model)])
    worker = worker_on(wire)
    worker.welcome, worker.decoder = welcome, object()  # type: ignore[assignment]
    worker.ready = WorkerReady(0, welcome.model.fingerprint, "CPU", "float32", 1, 1)
    assert worker.run() == 0
    assert sum(isinstance(message, WorkerReady) for message in wire.heard) == answers


def test_a_worker_that_computes_gives_signs_of_life(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before each layer of a step, and before each tensor that is loaded, when they are due: here always."""
    monkeypatch.setattr(process, "HEARTBEAT_S", 0.0)
    path = checkpoint("llama")
    config = EngineConfig(
        model=ModelConfig(model=str(path)),
        cache=CacheConfig(kv_cache_memory=1 << 20),
        scheduler=SchedulerConfig(max_num_seqs=2),
        parallel=ParallelConfig(threads=1),
    )
    step = make_plan(0, [(0, 0, 3, True)], admitted=[admit(0, [1, 2, 3], [1])], epoch=EPOCH)
    wire = Wire(
        [
            Welcome(EPOCH, config, read_model_info(str(path), path, max_model_len=32)),
            Allocate(EPOCH, num_blocks=4, block_size=16),
            step,
            Heartbeat(EPOCH),
        ]
    )
    wire.codec.bad_frames = 2
    assert Worker(wire, 0, None).run() == 0  # type: ignore[arg-type]
    beats = {kind: 0 for kind in (WorkerReady, Allocated, StepResult)}
    count = 0
    for message in wire.heard:
        if isinstance(message, Heartbeat):
            assert message == Heartbeat(EPOCH, 2)
            count += 1
        elif type(message) in beats:
            beats[type(message)], count = count, 0
        else:
            assert isinstance(message, Hello | Progress)
    num_layers, around = 3, 2  # the conversation itself beats once a turn
    assert beats[WorkerReady] >= 3 + num_layers * 6
    assert beats[Allocated] >= num_layers + around - 1
    assert beats[StepResult] >= num_layers + around - 1
