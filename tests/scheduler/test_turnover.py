"""What is told of waiting is true: of a simulated queue, who comes back when it was told to finds a place."""

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.scheduler.turnover import KNOWN, KNOWN_S, LONGEST_WAIT_S, MEMORY_S, SHORTEST_WAIT_S, Turnover

NEVER = float("inf")


class Queue:
    """`num_rows` served at once, `num_queued` that wait, and a crowd of patient clients that come back when told to."""

    def __init__(self, num_rows: int, num_queued: int, service_s: float, seed: int) -> None:
        self.turnover = Turnover()
        self.random = random.Random(seed)
        self.num_rows, self.room, self.service_s = num_rows, num_rows + num_queued, service_s
        self.ends: list[float] = []  # of those that are served
        self.num_waiting = 0
        self.events: list[tuple[float, int, int]] = []  # when a client comes, serial, for which time
        self.returned = self.found = 0

    def comes(self, at: float, visit: int = 0) -> None:
        heapq.heappush(self.events, (at, len(self.events) + self.returned, visit))

    def run(self, until: float = NEVER) -> None:
        while self.events and self.events[0][0] <= until:
            now, _, visit = heapq.heappop(self.events)
            self._serve(now)
            full = len(self.ends) + self.num_waiting >= self.room
            if visit == 1:
                self.returned += 1
                self.found += not full
            if full:
                self.comes(now + self.turnover.turn_s(now), visit + 1)
                continue
            if not self.ends:
                self.turnover.begins(now)
            self.num_waiting += 1
            self._serve(now)

    def _serve(self, now: float) -> None:
        """All that happens up to `now`."""
        while True:
            while self.num_waiting and len(self.ends) < self.num_rows:
                self.num_waiting -= 1
                heapq.heappush(self.ends, max(now, 0.0) + self.random.expovariate(1 / self.service_s))
            if not self.ends or self.ends[0] > now:
                return
            ended = heapq.heappop(self.ends)
            self.turnover.ended(ended)
            if self.num_waiting:
                self.num_waiting -= 1
                heapq.heappush(self.ends, ended + self.random.expovariate(1 / self.service_s))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("num_rows", "service_s"), [(4, 0.5), (64, 8.0), (256, 10.0)])
def test_who_comes_back_when_told_finds_a_place(num_rows: int, service_s: float, seed: int) -> None:
    """A crowd comes at once to an engine that has served for a while: as many as are served in half a minute, beyond
    what the queue holds."""
    rate = num_rows / service_s
    queue = Queue(num_rows, 4 * num_rows, service_s, seed)
    for i in range(int(60 * rate)):
        queue.comes(i / rate)
    queue.run(60.0)
    crowd = queue.room + int(30 * rate)
    for _ in range(crowd):
        queue.comes(60.0)
    queue.run()
    assert queue.returned >= 0.8 * (crowd - queue.room), "the crowd was too small to be refused"
    assert queue.found >= 0.8 * queue.returned


@pytest.mark.parametrize("seed", range(10))
def test_newcomers_leave_room_for_those_who_were_promised_it(seed: int) -> None:
    """The crowd comes back while others come for the first time, half as many as can be served."""
    num_rows, service_s = 32, 4.0
    queue = Queue(num_rows, 4 * num_rows, service_s, seed)
    for i in range(480):
        queue.comes(i * 0.25)  # 4 a second, of 8 that are served
    for _ in range(queue.room + 100):
        queue.comes(60.0)
    queue.run()
    assert queue.returned >= 90 and queue.found >= 0.9 * queue.returned


def test_an_engine_that_has_just_begun_promises_a_place_a_second() -> None:
    turnover = Turnover()
    turnover.begins(0.0)
    told = [turnover.turn_s(0.1) for _ in range(100)]
    assert told == sorted(told) and told[0] < 2.0 and told[-1] == LONGEST_WAIT_S


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.sampled_from("bemta")), max_size=50))
def test_whatever_happens_it_is_between_a_second_and_a_minute(events: list[tuple[float, str]]) -> None:
    turnover, now = Turnover(), 0.0
    for later, kind in events:
        now += later
        match kind:
            case "b":
                turnover.begins(now)
            case "e":
                turnover.ended(now)
            case "m":
                turnover.moved(now, 1, left=int(later) % 2)
            case "t":
                assert SHORTEST_WAIT_S <= turnover.turn_s(now) <= LONGEST_WAIT_S
            case _:
                assert SHORTEST_WAIT_S <= turnover.shorter_s(int(later), later, now) <= LONGEST_WAIT_S


@given(st.floats(0.05, 200.0), st.integers(1, 5000), st.integers(8, 500))
def test_a_queue_takes_as_long_as_its_length_and_the_rate_say(rate: float, queued: int, moves: int) -> None:
    turnover = Turnover()
    turnover.moved(0.0, 100, left=1)
    for i in range(1, moves + 1):
        turnover.moved(i / rate, 1, left=1)
    now = moves / rate
    drain_s = turnover.drain_s(queued, now)
    if drain_s is None:
        assert moves < 2 * KNOWN or rate < 2 * KNOWN / MEMORY_S or now < KNOWN_S
    else:
        assert queued / rate * 0.5 <= drain_s <= queued / rate * 2


def test_time_in_which_nobody_has_to_stay_does_not_count_and_a_standstill_does() -> None:
    turnover = Turnover()
    turnover.moved(0.0, 5, left=1)
    for i in range(1, 1001):
        turnover.moved(i / 10, 1, left=1)
    busy = turnover.drain_s(100, 100.0)
    assert busy is not None and 8 < busy < 12
    assert (turnover.drain_s(100, 150.0) or 0.0) > 3 * busy, "nobody was let in for 50 seconds"
    assert turnover.drain_s(100, 220.0) is None, "too long ago"
    assert turnover.shorter_s(100, 4.0, 100.0) == pytest.approx(busy - 4.0)
    turnover.moved(100.0, 0, left=0)
    assert turnover.drain_s(100, 100.0) is None and turnover.shorter_s(0, 4.0, 100.0) == 4.0
    for second in range(200, 300):
        turnover.moved(float(second), 1, left=0)  # as many as come, and fewer than could
    turnover.moved(5000.0, 0, left=1)
    assert turnover.drain_s(100, 5000.0) == pytest.approx(busy)


def test_a_standstill_of_all_that_run_makes_promises_later() -> None:
    turnover = Turnover()
    turnover.begins(0.0)
    for i in range(1, 1001):
        turnover.ended(i / 10)
    soon = [turnover.turn_s(100.0) for _ in range(50)][-1]
    assert 5.0 < soon < 7.5, "ten places a second, of which eight are promised"
    turnover.begins(5000.0)
    assert [turnover.turn_s(5000.0) for _ in range(50)][-1] == pytest.approx(soon)
    assert [turnover.turn_s(5060.0) for _ in range(50)][-1] > 4 * soon, "nothing has ended for a minute"
