"""Tenants against each other, on a scheduler whose device is a formula."""

import random
from array import array
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import StepResult, pack, unpack
from quire.common.sampling import SamplingParams
from quire.scheduler import fairness
from quire.scheduler.fairness import OUTPUT_COST, victim
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step import Step

BLOCK = 4
MAX_MODEL_LEN = 96


def engine(num_blocks: int = 400, rows: int = 8, budget: int = 64, **options: float) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_num_queued_reqs=100_000,
        **options,  # type: ignore[arg-type]
    )
    return Scheduler(config, CacheConfig(block_size=BLOCK, enable_prefix_caching=False), num_blocks, MAX_MODEL_LEN)


def request(id: int, tenant: str, prompt: int, output: int, *, weight: float = 1.0, priority: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=output, seed=0)
    return Request(id, array("i", [1]) * prompt, prompt, sampling, priority, tenant=tenant, weight=weight)


def answer(step: Step) -> StepResult:
    count = len(step.sampled)
    load = step.load
    took_us = 2000 + 50 * load.rows + load.context + 100 * load.tokens + 2 * int(load.pairs)
    return StepResult(1, step.plan.step, pack([1] * count), pack([7] * count), took_us)


def steps(scheduler: Scheduler, depth: int = 2) -> Iterator[Step]:
    """As they are answered, for as long as there are any."""
    while True:
        while len(scheduler.dispatched) < depth and scheduler.schedule():
            pass
        if not scheduler.dispatched:
            return
        step = scheduler.dispatched[0]
        scheduler.update(answer(step))
        scheduler.check(range(1, 2))
        yield step


@pytest.fixture(autouse=True)
def saved(monkeypatch: pytest.MonkeyPatch) -> float:
    """As small as the requests here are."""
    monkeypatch.setattr(fairness, "SAVED", 40.0)
    return fairness.SAVED


class Service:
    """What tenants have had, counted from plans and not from the scheduler's books."""

    def __init__(self) -> None:
        self.of: defaultdict[str, float] = defaultdict(float)
        self._ends: dict[Request, int] = {}

    def count(self, step: Step) -> None:
        starts, counts = unpack(step.plan.starts), unpack(step.plan.counts)
        for request, start, count in zip(step.requests, starts, counts, strict=True):
            new = min(start + count, request.num_prompt) - max(start, self._ends.get(request, 0))
            self.of[request.tenant] += max(0, new) / request.weight
            self._ends[request] = max(start + count, self._ends.get(request, 0))
        for request in step.sampled:
            self.of[request.tenant] += OUTPUT_COST / request.weight


def backlogged(seed: int) -> tuple[float, float, Service]:
    """Tenants of random weights that never run out of requests. Returns the largest difference of their service, what it
    must be within, and the service."""
    rng = random.Random(seed)
    rows, num_blocks = rng.randint(2, 8), rng.choice((48, 100, 400))
    scheduler = engine(num_blocks, rows, rng.choice((16, 64)), target_itl=rng.choice((0.0, 5.0)))
    weights = {tenant: rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)) for tenant in "abcd"[: rng.randint(2, 4)]}
    shapes = {tenant: (rng.randint(1, 40), rng.randint(1, 40)) for tenant in weights}
    service, largest, added = Service(), 0.0, 0
    for number, step in enumerate(_fed(scheduler, depth=rng.randint(1, 3))):
        waiting = Counter(request.tenant for request in scheduler.waiting)
        for tenant, (prompt, output) in shapes.items():
            while waiting[tenant] < 5:
                scheduler.add(
                    request(added, tenant, rng.randint(1, prompt), rng.randint(1, output), weight=weights[tenant])
                )
                waiting[tenant], added = waiting[tenant] + 1, added + 1
        service.count(step)
        values = [service.of[tenant] for tenant in weights]
        largest = max(largest, max(values) - min(values))
        if number == 1500:
            break
    longest = max(prompt for prompt, _ in shapes.values())
    running = min(rows * max(output for _, output in shapes.values()), num_blocks * BLOCK)
    return largest, (longest + OUTPUT_COST * running) / min(weights.values()) + fairness.SAVED, service


def _fed(scheduler: Scheduler, depth: int) -> Iterator[Step]:
    scheduler.add(request(-1, "a", 1, 1))
    yield from steps(scheduler, depth)


def test_backlogged_tenants_are_served_by_their_weights_but_for_a_constant() -> None:
    """Theorem 4.4 of the paper, tightened: nobody gets further ahead than by what it came with, one prompt, and the
    outputs that run."""
    for seed in range(25):
        largest, bound, service = backlogged(seed)
        assert largest <= bound, (seed, largest, bound)
        assert min(service.of.values()) > bound, "too short to tell"


def _by_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    one: Callable[[fairness.Tenants, Request], None] = fairness.Tenants.enter

    def enter(self: fairness.Tenants, request: Request) -> None:
        tenant, request.tenant = request.tenant, ""
        one(self, request)
        request.tenant = tenant

    monkeypatch.setattr(fairness.Tenants, "enter", enter)
    monkeypatch.setattr("quire.scheduler.queue.WaitingQueue.check", lambda *_: None)


def _free_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "OUTPUT_COST", 0.0)


def _free_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.scheduler.step.charge_prompt", lambda _: None)


def _equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one: Callable[[fairness.Tenants, Request], None] = fairness.Tenants.enter

    def enter(self: fairness.Tenants, request: Request) -> None:
        one(self, request)
        request.account.output_cost = OUTPUT_COST

    def charge(request: Request) -> None:
        weight, request.weight = request.weight, 1.0
        fairness.charge_prompt(request)
        request.weight = weight

    monkeypatch.setattr(fairness.Tenants, "enter", enter)
    monkeypatch.setattr("quire.scheduler.step.charge_prompt", charge)


@pytest.mark.parametrize("fault", [_by_arrival, _free_outputs, _free_prompts, _equal_weights])
def test_planted_fault_breaks_the_bound(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert any(largest > bound for largest, bound, _ in map(backlogged, range(10)))


def waits(with_flood: bool, seed: int) -> list[int]:
    """Steps to the first token of each request of a tenant that sends one at a time."""
    rng = random.Random(seed)
    scheduler = engine(rows=16, budget=64)
    if with_flood:
        for id in range(3000):
            scheduler.add(request(id, "flood", rng.randint(10, 60), rng.randint(5, 30)))
    found: list[int] = []
    number, sent_at, quiet = 10_000, 0, request(9_999, "quiet", 20, 10)
    scheduler.add(quiet)
    for now, step in enumerate(steps(scheduler), 1):
        if quiet in step.sampled and quiet.num_output == 1:
            found.append(now - sent_at)
        if quiet.finish:
            if len(found) == 40:
                break
            quiet, number, sent_at = request(number, "quiet", 20, 10), number + 1, now
            scheduler.add(quiet)
    return found


def test_a_flood_slows_others_by_the_wait_for_a_row() -> None:
    for seed in range(3):
        alone, flooded = waits(False, seed), waits(True, seed)
        assert len(alone) == len(flooded) == 40
        assert max(flooded[1:]) <= max(alone) + 14, "a row of 16 comes free every other step, and a prompt is 1 more"


def test_rows_are_kept_for_others_that_were_here_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "SAVED", 1e6)
    scheduler = engine(1000, rows=32, budget=640)
    for id in range(100):
        scheduler.add(request(id, "flood", 10, 50))
    stepping = steps(scheduler)
    next(stepping)
    assert len(scheduler.running) == 32, "nobody else is here"
    assert not any(claim.crowds for claim in scheduler.waiting.claims(scheduler.running, 32))
    quiet = request(100, "quiet", 10, 4)
    scheduler.add(quiet)
    while not quiet.finish:
        next(stepping)
    for _ in range(3):
        next(stepping)
    assert len(scheduler.running) == 30
    assert all(claim.crowds for claim in scheduler.waiting.claims(scheduler.running, 32))
    for id in range(101, 105):
        scheduler.add(request(id, "quiet", 10, 4))
    assert [one.id for _ in range(3) for one in next(stepping).admitted] == [101, 102]
    crowds = {
        one.tenant: claim.crowds
        for one, claim in zip(scheduler.running, scheduler.waiting.claims(scheduler.running, 32), strict=True)
    }
    assert crowds == {"flood": True, "quiet": False}


@settings(deadline=None)
@given(st.data())
def test_who_comes_back_has_saved_nothing_up(data: st.DataObject) -> None:
    scheduler = engine(rows=1)
    for id in range(40):
        scheduler.add(request(id, "steady", 4, 4))
    stepping = steps(scheduler)
    for _ in range(data.draw(st.integers(1, 60))):
        next(stepping)
    for id in range(40, 60):
        scheduler.add(request(id, "late", 4, 4))
    order = [r.tenant for _ in range(60) for r in next(stepping).admitted]
    ahead = [order[:i].count("late") - order[:i].count("steady") for i in range(len(order))]
    cost = 4 + 4 * OUTPUT_COST
    assert order.count("steady") > 4 and max(ahead) <= fairness.SAVED / cost + 2, order


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30))
def test_one_tenant_is_served_by_priority_and_arrival(shapes: list[tuple[int, int, int]]) -> None:
    scheduler = engine(rows=3)
    requests = [request(id, "", prompt, output, priority=p) for id, (p, prompt, output) in enumerate(shapes)]
    for one in requests:
        scheduler.add(one)
    order = [one.id for step in steps(scheduler) for one in step.admitted]
    assert order == [one.id for one in sorted(requests, key=lambda one: (one.priority, one.id))]


# --- who yields -------------------------------------------------------------------------------------------------------


def test_a_flood_pays_for_the_blocks_it_lacks() -> None:
    """A tenant with one request is not the one that yields, though it came last."""
    for seed in range(10):
        rng = random.Random(seed)
        scheduler = engine(num_blocks=60, rows=16)
        for id in range(40):
            scheduler.add(request(id, "flood", rng.randint(4, 16), 60))
        stepping, quiet = steps(scheduler), request(100, "quiet", 8, 60)
        for _ in range(30):
            next(stepping)
        scheduler.add(quiet)
        preempted = 0
        while not quiet.finish:
            held = quiet.row is not None
            preempted += next(stepping).num_preempted
            assert quiet.row is not None or quiet.finish or not held, "it was preempted"
        assert preempted > 0


running = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from("abc"), st.integers(0, 9), st.sampled_from((1.0, 3.0))),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(running, st.data())
def test_victims(shapes: list[tuple[int, str, int, float]], data: st.DataObject) -> None:
    requests: list[Request] = []
    for arrival, (priority, tenant, blocks, weight) in enumerate(shapes):
        one = request(arrival, tenant, 1, 1, weight=weight, priority=priority)
        one.arrival, one.blocks = arrival, list(range(blocks))
        insort(requests, one, key=lambda one: one.rank)
    index = data.draw(st.integers(-1, len(requests) - 1))
    chosen = victim(requests, index)
    behind = requests[index + 1 :]
    if not behind:
        assert chosen is None
        return
    worst = max(one.priority for one in behind)
    held: defaultdict[str, float] = defaultdict(float)
    for one in requests:
        held[one.tenant] += len(one.blocks) / one.weight if one.priority == worst else 0.0
    if chosen is None:
        assert index > 0 and requests[index].priority == worst
        assert all(held[one.tenant] < held[requests[index].tenant] for one in behind)
        return
    assert chosen in behind and chosen.priority == worst
    among = [one for one in behind if one.priority == worst]
    assert held[chosen.tenant] == pytest.approx(max(held[one.tenant] for one in among))
    assert all(one.rank < chosen.rank for one in among if one.tenant == chosen.tenant and one is not chosen)


def test_requests_that_preempt_each_other_come_to_an_end() -> None:
    """Blocks for two of sixteen, and four tenants that take turns in holding most: everybody ends, and soon."""
    for seed in range(40):
        rng = random.Random(seed)
        scheduler = engine(num_blocks=MAX_MODEL_LEN // BLOCK + rng.randint(0, 24), rows=16, budget=rng.choice((8, 64)))
        requests = [
            request(id, rng.choice("abcd"), rng.randint(1, 30), rng.randint(20, 60), weight=rng.choice((1.0, 2.0)))
            for id in range(30)
        ]
        for one in requests:
            scheduler.add(one)
        # The first of those that run always gets on: in the worst case one after the other, a prompt at a time.
        bound = sum(one.limit + one.num_prompt for one in requests)
        taken = preempted = 0
        for step in steps(scheduler):
            taken, preempted = taken + 1, preempted + step.num_preempted
            assert taken <= bound, "no progress"
        assert all(one.finish == "length" for one in requests) and preempted > 0


# --- no starvation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenants", [("",), ("a", "b")])
@pytest.mark.parametrize("target_itl", [0.0, 4.0])
def test_a_long_prompt_gets_its_first_token_in_a_stream_of_short_ones(
    tenants: tuple[str, ...], target_itl: float
) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        scheduler = engine(rows=8, budget=16, target_itl=target_itl)
        long, id, number = request(0, tenants[0], 80, 5), 1, 0
        for number, _ in enumerate(_fed(scheduler, 2)):
            if number == 20:
                scheduler.add(long)
            while len(scheduler.waiting) < 6:
                scheduler.add(request(id, tenants[-1], rng.randint(2, 8), rng.randint(1, 4)))
                id += 1
            if long.num_output:
                break
            assert number < 150, "starved"


@pytest.mark.parametrize("target_itl", [0.0, 4.0])
def test_short_prompts_get_theirs_in_a_stream_of_long_ones(target_itl: float) -> None:
    """Behind one long prompt a short one need not wait; behind two it does, and no longer than for those."""
    medians: list[int] = []
    for seed in range(5):
        rng = random.Random(seed)
        scheduler = engine(rows=8, budget=16, target_itl=target_itl)
        added_at: dict[Request, int] = {}
        waited: list[int] = []
        for number, step in enumerate(_fed(scheduler, 2)):
            waited += [number - added_at.pop(one) for one in step.sampled if one in added_at and one.num_prompt < 10]
            if rng.random() < 1 / 7 or scheduler.idle:
                scheduler.add(request(2 * number, "", 80, 3))
            if rng.random() < 1 / 7 or not scheduler.running:
                short = request(2 * number + 1, "", rng.randint(2, 6), 3)
                added_at[short] = number
                scheduler.add(short)
            if number == 1000:
                break
        medians.append(sorted(waited)[len(waited) // 2])
        assert len(waited) > 100 and max(waited) <= 60, sorted(waited)[-5:]
    assert sum(medians) <= 16, "by arrival alone it is 40"


def test_who_fills_the_queue_does_not_keep_others_out() -> None:
    """Each tenant has its part of the places, whoever came first; and there is an end to it."""
    places, rows = 36, 4
    config = SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=8, max_num_queued_reqs=places - rows)
    scheduler = Scheduler(config, CacheConfig(block_size=BLOCK), 400, MAX_MODEL_LEN)

    def accepted(tenant: str, count: int) -> int:
        taken = 0
        for _ in range(count):
            new = request(scheduler._num_added + 1, tenant, 4, 4)
            if scheduler.rejection(new) is None:
                assert scheduler.add(new) is None
                taken += 1
        return taken

    assert accepted("flood", 100) == places
    assert accepted("a", 100) == places // 2
    assert accepted("flood", 1) == 0
    assert accepted("b", 100) == places // 3
    assert accepted("a", 1) == 0
    sum(accepted(f"made up {i}", 3) for i in range(200))
    assert len(scheduler.waiting) <= 2 * places
