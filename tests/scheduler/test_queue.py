"""The waiting queue against its definition: everything is remembered, and the next in turn is looked for among all."""

from array import array
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.common.sampling import SamplingParams
from quire.scheduler.fairness import LATELY, MOST_REMEMBERED, SAVED
from quire.scheduler.queue import WaitingQueue
from quire.scheduler.request import Request


def waiting(arrival: int, priority: int = 0, tenant: str = "") -> Request:
    request = Request(arrival, array("i", [0]), 1, SamplingParams(), priority, tenant=tenant)
    request.arrival = arrival
    return request


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.model: list[Request] = []
        self.outside: list[Request] = []  # that run
        self.levels: dict[tuple[int, str], float] = {}
        self.last: dict[int, tuple[int, str]] = {}
        self.arrivals = 0

    @rule(priority=st.integers(0, 1), tenant=st.sampled_from("abc"))
    def enter(self, priority: int, tenant: str) -> None:
        key = priority, tenant
        waiting_of = [(r.priority, r.tenant) for r in self.model if r.priority == priority]
        if key not in waiting_of:
            last = self.levels.get(self.last.get(priority, (-1, "")), 0.0)  # who waited last was not forgotten since
            least = min((self.levels[other] for other in waiting_of), default=last)
            self.levels[key] = max(self.levels.get(key, -inf), least - SAVED)
        request = waiting(self.arrivals, priority, tenant)
        self.arrivals += 1
        self.queue.enter(request)
        self.model.append(request)

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def push_again(self, data: st.DataObject) -> None:
        request = self._choose(self.outside, data)
        self.queue.push(request)
        self.model.append(request)

    @rule()
    def pop(self) -> None:
        if not self.model:
            with pytest.raises(IndexError):
                self.queue.pop()
            return
        self._gone(request := self.queue.pop())
        self.outside.append(request)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.model))
        self.queue.remove(request)
        self._gone(request)
        self.outside.append(request)
        with pytest.raises(KeyError):
            self.queue.remove(request)

    @precondition(lambda self: self.outside)
    @rule(data=st.data(), cost=st.sampled_from((1, 2, SAVED, 20 * SAVED)))
    def charge(self, data: st.DataObject, cost: float) -> None:
        request = data.draw(st.sampled_from(self.outside))
        request.account.level += cost
        self.levels[request.priority, request.tenant] += cost

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = self._choose(self.outside, data)
        self.queue.leave(request)
        if all(other.priority != request.priority for other in self.model + self.outside):
            self.levels = {key: level for key, level in self.levels.items() if key[0] != request.priority}
            self.last.pop(request.priority, None)
        elif tenants := self.queue._tenants.get(request.priority):
            here = {account.tenant for account in tenants.accounts}
            for key in [key for key in self.levels if key[0] == request.priority and key[1] not in here]:
                assert self.levels.pop(key) <= max(self.levels.values()) - LATELY * SAVED, "forgotten too early"

    def _choose(self, requests: list[Request], data: st.DataObject) -> Request:
        return requests.pop(data.draw(st.integers(0, len(requests) - 1)))

    def _gone(self, request: Request) -> None:
        self.model.remove(request)
        if all((r.priority, r.tenant) != (request.priority, request.tenant) for r in self.model):
            self.last[request.priority] = request.priority, request.tenant

    @invariant()
    def same_as_the_model(self) -> None:
        assert len(self.queue) == len(self.model) and set(self.queue) == set(self.model)
        turns = [(r.priority, self.levels[r.priority, r.tenant], r.arrival) for r in self.model]
        head = self.queue.peek()
        assert (head.priority, head.account.level, head.arrival) == min(turns) if head else not self.model
        self.queue.check(self.outside)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_nothing_piles_up() -> None:
    queue = WaitingQueue()
    queue.enter(waiting(-1, -1))
    for arrival in range(10_000):
        request = waiting(arrival, 0, f"tenant {arrival}")
        queue.enter(request)
        request.account.level += arrival % 7
        queue.remove(request)
        queue.leave(request)
        for priority in (arrival + 1, 0):  # a tenant that stays while others come and go, and priorities that do
            other = waiting(-arrival - 2, priority, "others")
            queue.enter(other)
            queue.remove(other)
            queue.leave(other)
    assert len(queue) == 1 and len(queue._tenants) == 1 and len(queue._heap) < 10


def test_of_tenants_that_have_left_few_are_remembered() -> None:
    queue = WaitingQueue()
    queue.enter(waiting(-1, 0, "stays"))
    for arrival in range(2 * MOST_REMEMBERED):
        request = waiting(arrival, 0, f"tenant {arrival}")
        queue.enter(request)
        request.account.level += 1 + arrival % 7
        queue.remove(request)
        queue.leave(request)
    tenants = queue._tenants[0]
    assert len(tenants.accounts) <= MOST_REMEMBERED + 2 and len(tenants._order) < 100
    queue.pop().account.level += 100 + LATELY * SAVED
    assert queue.peek() is None
    queue.enter(waiting(arrival + 1, 0, "next"))
    queue.enter(waiting(arrival + 2, 0, "new"))
    request = queue.pop()
    queue.leave(request)
    assert len(tenants.accounts) < 5, "all of them have had less than whoever waits"
