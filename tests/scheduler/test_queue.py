"""The waiting queue against a sorted list."""

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.common.sampling import SamplingParams
from quire.scheduler.queue import WaitingQueue
from quire.scheduler.request import Request


def waiting(arrival: int, priority: int) -> Request:
    request = Request(arrival, array("i", [0]), 1, SamplingParams(), priority)
    request.arrival = arrival
    return request


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.model: list[Request] = []
        self.outside: list[Request] = []
        self.arrivals = 0

    @rule(priority=st.integers(-2, 2))
    def push_new(self, priority: int) -> None:
        self._push(waiting(self.arrivals, priority))
        self.arrivals += 1

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def push_again(self, data: st.DataObject) -> None:
        self._push(self.outside.pop(data.draw(st.integers(0, len(self.outside) - 1))))

    def _push(self, request: Request) -> None:
        self.queue.push(request)
        self.model.append(request)
        self.model.sort(key=lambda request: request.rank)

    @rule()
    def pop(self) -> None:
        if not self.model:
            with pytest.raises(IndexError):
                self.queue.pop()
            return
        request = self.model.pop(0)
        assert self.queue.pop() is request
        self.outside.append(request)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
        self.queue.remove(request)
        self.outside.append(request)
        with pytest.raises(KeyError):
            self.queue.remove(request)

    @invariant()
    def same_as_the_model(self) -> None:
        assert len(self.queue) == len(self.model) and set(self.queue) == set(self.model)
        assert self.queue.peek() is (self.model[0] if self.model else None)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_removed_requests_do_not_pile_up() -> None:
    queue = WaitingQueue()
    queue.push(waiting(0, -1))
    for arrival in range(1, 10_000):
        request = waiting(arrival, 0)
        queue.push(request)
        queue.remove(request)
    assert len(queue._heap) < 100 and len(queue) == 1
