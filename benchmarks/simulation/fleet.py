"""Replicas in virtual time: a scheduler and a device each, behind a router.

A device takes one step after the other; a scheduler hears of a result `latency_s` after the device has it, and a plan
takes as long to get there, so that a pipeline of depth 2 hides both. Nothing here reads a clock.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quire.common.messages import Output, StepPlan, StepResult, pack
from quire.scheduler.request import Request

from .gpu import StepTime, features
from .router import Router
from .work import STOP, TOKEN, Arrival, Job, follow_up, job

KEY_TOKENS = 64  # of a prompt, by which the router tells prefixes apart
WEIGHT_TOKENS = 2048  # of a prompt take about as long as the decoding of a usual output


class Planned(Protocol):
    """A step that was sent."""

    plan: StepPlan
    requests: list[Request]
    sampled: list[Request]
    admitted: list[Request]  # for the first time
    num_preempted: int

    @property
    def num_tokens(self) -> int: ...


class Policy(Protocol):
    """What the simulator asks of a scheduler."""

    @property
    def kv(self) -> Any: ...  # has num_blocks and num_free

    @property
    def waiting(self) -> Any: ...  # sized, iterable

    @property
    def dispatched(self) -> Sequence[Planned]: ...

    running: list[Request]

    def rejection(self, request: Request) -> str | None: ...
    def add(self, request: Request) -> Output | None: ...
    def abort(self, request: Request) -> None: ...
    def schedule(self) -> Planned | None: ...
    def update(self, result: StepResult) -> list[tuple[Request, Output]]: ...


class Watch(Protocol):
    """Is told of everything, in the order of time."""

    def arrived(self, job: Job, now: float) -> None: ...
    def planned(self, replica: "Replica", step: Planned, used: int, took_s: float, now: float) -> None: ...
    def ended(self, job: Job, how: str, now: float) -> None: ...


@dataclass(frozen=True)
class Setup:
    """What all replicas of a fleet have in common."""

    make: Callable[[], Policy]
    step_time: StepTime
    max_model_len: int
    block_size: int = 16
    host_blocks: int = 0
    depth: int = 2
    latency_s: float = 100e-6  # a message over IPC and half of what schedule() and update() take for 256 rows
    max_queue_s: float = 0.0  # a request that has no row by then is given up; 0: never


class Replica:
    """One scheduler and its device."""

    def __init__(self, index: int, setup: Setup, watch: Watch) -> None:
        self.index, self.setup, self.watch = index, setup, watch
        self.policy = setup.make()
        self.load = 0  # weights of the requests that have not ended
        self.busy_s = 0.0
        self._free_at = 0.0
        self._taken: deque[int] = deque()  # microseconds of each step in flight

    def fill(self, now: float) -> Iterator[float]:
        """Plan what may be in flight. Yields when the result of each step is heard of."""
        policy, kv = self.policy, self.policy.kv
        while len(policy.dispatched) < self.setup.depth:
            used = kv.num_blocks - kv.num_free
            step = policy.schedule()
            if step is None:
                return
            took_s = self.setup.step_time.seconds(features(step.plan, kv.num_blocks, self.setup.host_blocks))
            self._free_at = max(now + self.setup.latency_s, self._free_at) + took_s
            self.busy_s += took_s
            self._taken.append(max(round(took_s * 1e6), 1))
            self.watch.planned(self, step, used, took_s, now)
            yield self._free_at + self.setup.latency_s

    def land(self, now: float) -> list[Job]:
        """Take the oldest result in. Returns who ended by it."""
        step = self.policy.dispatched[0]
        tokens = [STOP if job.num_output + 1 >= job.output else TOKEN for job in step.sampled]  # type: ignore[attr-defined]
        result = StepResult(
            step.plan.epoch, step.plan.step, pack([1] * len(tokens)), pack(tokens), self._taken.popleft()
        )
        ended = []
        for request, output in self.policy.update(result):
            assert isinstance(request, Job)
            if output.tokens:
                request.times.append(now)
            if output.finish is not None:
                self.load -= weight(request)
                self.watch.ended(request, output.finish, now)
                ended.append(request)
        return ended


def weight(job: Job) -> int:
    """Of a request for the router: a long prompt is as much work as several short ones."""
    return 1 + job.num_prompt // WEIGHT_TOKENS


class Fleet:
    """`replicas` of the same kind. `run` once."""

    def __init__(self, setup: Setup, router: Router, watch: Watch, replicas: int = 1) -> None:
        self.setup, self.router, self.watch = setup, router, watch
        self.replicas = [Replica(index, setup, watch) for index in range(replicas)]
        self.now = 0.0
        self.num_open = 0  # that have neither ended nor been rejected
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = 0
        self._num_jobs = 0

    def run(
        self, arrivals: Iterator[Arrival], progress: Callable[[float], None] = lambda _: None, until: float = math.inf
    ) -> None:
        """Until every request has ended, or `until`. `arrivals` in the order of time."""
        self._next(arrivals)
        while self._events and self._events[0][0] <= until:
            at, _, act, argument = heapq.heappop(self._events)
            assert at >= self.now, "time went back"
            self.now = at
            act(argument)
            progress(at)
        assert not self.num_open or self._events, f"{self.num_open} requests wait for ever"

    def _at(self, when: float, act: Callable[[Any], None], argument: object) -> None:
        self._order += 1  # what is due at one time happens in the order in which it was asked for
        heapq.heappush(self._events, (when, self._order, act, argument))

    def _next(self, arrivals: Iterator[Arrival]) -> None:
        if arrival := next(arrivals, None):
            self._at(arrival.at, self._arrive, (arrival, arrivals))

    def _arrive(self, what: tuple[Arrival, Iterator[Arrival]]) -> None:
        arrival, arrivals = what
        self._num_jobs += 1
        self._submit(job(self._num_jobs, arrival, self.setup.max_model_len))
        self._next(arrivals)

    def _follow(self, before: Job) -> None:
        self._num_jobs += 1
        self._submit(follow_up(self._num_jobs, before, self.now, self.setup.max_model_len))

    def _submit(self, job: Job) -> None:
        self.watch.arrived(job, self.now)
        key = job.tokens[:KEY_TOKENS].tobytes()
        job.replica = self.router.choose(key, self.loads)
        replica = self.replicas[job.replica]
        if reason := replica.policy.rejection(job):
            self.watch.ended(job, reason, self.now)
            return
        replica.load += weight(job)
        self.num_open += 1
        replica.policy.add(job)
        if self.setup.max_queue_s:
            self._at(self.now + self.setup.max_queue_s, self._give_up, job)
        self._fill(replica)

    @property
    def loads(self) -> Sequence[int]:
        return [replica.load for replica in self.replicas]

    def _give_up(self, job: Job) -> None:
        if job.num_cached is None:
            replica = self.replicas[job.replica]
            replica.policy.abort(job)
            replica.load -= weight(job)
            self.num_open -= 1
            self.watch.ended(job, "expired", self.now)
            self._fill(replica)

    def _fill(self, replica: Replica) -> None:
        for heard_at in replica.fill(self.now):
            self._at(heard_at, self._land, replica)

    def _land(self, replica: Replica) -> None:
        for ended in replica.land(self.now):
            self.num_open -= 1
            if ended.turns:
                self._at(self.now + ended.turns[0].think_s, self._follow, ended)
        self._fill(replica)
