"""When launched steps are read: at once where they are done, otherwise behind the next plan that is there."""

from typing import Any

import pytest

from quire.common.channel import memory_pair
from quire.common.messages import FromWorker, Heartbeat, Hello, Shutdown, StepResult, ToWorker
from quire.worker.process import Worker
from quire.worker.runner import StepOutput

from .plans import make_plan


class Device:
    """Stands in for a runner: writes down what it is asked for. A step of it is `ready` or takes until it is read."""

    def __init__(self, *, ready: bool, last: int, far: Any) -> None:
        self.ready, self.last, self.far = ready, last, far
        self.log: list[tuple[str, int]] = []

    def launch(self, plan: Any) -> Any:
        self.log.append(("launch", plan.step))
        return Step(self, plan.step)


class Step:
    def __init__(self, device: Device, step: int) -> None:
        self.device, self.step, self.ready = device, step, device.ready

    def read(self) -> StepOutput:
        self.device.log.append(("read", self.step))
        if self.step == self.device.last:
            self.device.far.send(Shutdown())
        return StepOutput([self.step], [])


@pytest.mark.parametrize(
    ("ready", "log"),
    [
        (True, [("launch", 0), ("read", 0), ("launch", 1), ("read", 1)]),
        (False, [("launch", 0), ("launch", 1), ("read", 0), ("read", 1)]),
    ],
)
def test_steps_are_read_in_order(ready: bool, log: list[tuple[str, int]]) -> None:
    near, far = memory_pair(ToWorker, FromWorker)
    device: Any = Device(ready=ready, last=1, far=far)
    worker = Worker(near, 0, None)  # type: ignore[arg-type]
    worker.epoch, worker.runner = 1, device
    for step in range(2):
        far.send(make_plan(step, [], epoch=1))
    assert worker.run() == 0
    assert device.log == log
    answers = [message for message in iter(far.receive, None) if not isinstance(message, Heartbeat)]
    assert [message.step for message in answers] == [0, 1]


def test_what_an_epoch_left_unread_is_dropped_with_it() -> None:
    near, far = memory_pair(ToWorker, FromWorker)
    device: Any = Device(ready=False, last=-1, far=far)
    worker = Worker(near, 0, None)  # type: ignore[arg-type]
    worker.epoch, worker.runner = 1, device
    far.send(make_plan(0, [], epoch=1))
    far.send(Heartbeat(2))
    far.send(Shutdown())
    assert worker.run() == 0
    sent = list(iter(far.receive, None))
    assert any(isinstance(message, Hello) for message in sent)
    assert not any(isinstance(message, StepResult) for message in sent)
