"""Pinned prefixes: as trees of blocks against plain sets, in random runs of the scheduler, and by the clock."""

import random
from array import array
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import pytest

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import StepResult, Submit, pack
from quire.common.pins import GetPins
from quire.common.sampling import SamplingParams
from quire.scheduler import intake
from quire.scheduler.blocks import BlockPool
from quire.scheduler.kv_cache import KvCache
from quire.scheduler.pins import LATEST_S, Pins
from quire.scheduler.recorder import Recorder
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.serving import Serving

from .journaled import journaled, replayed
from .peers import INFO
from .simulation import Losses, Outcome, Run, expected

CLIENT = b"client"
SEEDS = 250


# --- trees of blocks --------------------------------------------------------------------------------------------------


class Cache:
    """A pool full of published prefixes, each a path in one random tree."""

    def __init__(self, seed: int, *, make: type[Pins] = Pins) -> None:
        self.random = random.Random(seed)
        self.num_blocks = self.random.randint(1, 30)
        self.pool = BlockPool(self.num_blocks)
        blocks = self.pool.take(self.num_blocks)
        self.parents = {block: self.random.choice([0, *blocks[:place][-3:]]) for place, block in enumerate(blocks)}
        for block in blocks:
            self.pool.publish(block, bytes([block]), bytes([block]))
        self.pool.release(blocks)
        self.pins = make(self.pool, self.random.randint(0, self.num_blocks))
        self.held: list[list[int]] = []
        self.weights = {tenant: self.random.choice((0.5, 1.0, 3.0)) for tenant in "abc"}

    def path(self, end: int) -> list[int]:
        path = []
        while end:
            path.append(end)
            end = self.parents[end]
        return path[::-1]

    def paths(self) -> dict[str, set[int]]:
        """What is pinned for each tenant, from nothing but the ends of its pins."""
        found: dict[str, set[int]] = {tenant: set() for tenant in "abc"}
        for pin in self.pins:
            assert len(self.path(pin.end)) == pin.num_blocks
            found[pin.tenant].update(self.path(pin.end))
        return found

    def check(self) -> None:
        self.pins.check()
        self.pool.check(self.held)
        paths = self.paths()
        assert Counter(block for blocks in paths.values() for block in blocks) == self.pool.pinned
        ends = Counter((pin.tenant, pin.end) for pin in self.pins)
        assert not ends or max(ends.values()) == 1, "equal prefixes share one pin"

    def step(self) -> None:
        choose = self.random
        end, tenant = choose.randint(1, self.num_blocks), choose.choice("aab" if choose.random() < 0.8 else "c")
        before = self.paths()
        match choose.choice(["ask", "ask", "ask", "drop", "hold", "release", "free", "forget"]):
            case "ask":
                self.pins.hold(tenant, self.weights[tenant], self.path(end), 1.0)
                self._check_quotas(tenant, before, self.path(end)[: self.pins.most])
            case "drop":
                self.pins.drop([choose.randint(1, 50)], "asked")
            case "hold":
                self.held.append(self.path(end))
                self.pool.share(self.held[-1])
            case "release" if self.held:
                self.pool.release(self.held.pop(choose.randrange(len(self.held))))
            case "free" if self.pool.num_idle:
                count = self.pool.num_free + choose.randint(1, self.pool.num_idle)
                in_use = {pin.end for pin in self.pins if not self.pool.is_idle(pin.end)}
                self.pins.free(count)
                assert self.pool.num_free == count, "neither less nor more is given up than is needed"
                assert in_use <= {pin.end for pin in self.pins}, "a pin was given up that frees nothing"
            case "forget" if self.pool.pinned:
                lost = choose.choice(list(self.pool.pinned))
                self.pins.forget({lost})
                assert lost not in self.pool.pinned

    def _check_quotas(self, asking: str, before: dict[str, set[int]], wanted: list[int]) -> None:
        most, after = self.pins.most, self.paths()
        active = {tenant for tenant in "abc" if before[tenant] or tenant == asking}
        weights = sum(self.weights[tenant] for tenant in active)
        for tenant in active:
            part = most * self.weights[tenant] / weights
            if tenant != asking and not before[tenant] <= after[tenant]:
                assert len(after[tenant]) > part - 1, "who keeps to his part loses nothing to others"
            if tenant == asking and len(wanted) <= part:
                assert after[tenant] >= set(wanted), "what fits the tenant's part is pinned"


@pytest.mark.parametrize("seed", range(300))
def test_pins_are_paths_and_quotas_hold(seed: int) -> None:
    cache = Cache(seed)
    for _ in range(80):
        cache.step()
        cache.check()
    cache.pins.drop([pin.id for pin in cache.pins], "asked")
    for table in cache.held:
        cache.pool.release(table)
    assert not cache.pool.pinned and cache.pool.num_free == cache.num_blocks and not cache.pins._trees


class ForgetsForks(Pins):
    """A prefix that another one goes on from is given up with that."""

    def drop(self, ids: Any, why: str) -> None:
        for id in ids:
            if (pin := self._pins.get(id)) is not None:
                for block in list(self._path(pin)):
                    self._give_up(self._trees[pin.tenant], block, why)
                del self._trees[pin.tenant].ends[pin.end]
                self._remove(pin)


class FavoursTheLoud(Pins):
    """Whoever asked for longest ago gives way, whoever has too much."""

    def _keep_to_quotas(self) -> None:
        while self.num_blocks > self.most:
            self._shorten(next(iter(self._pins.values())), "quota")


class TakesTheUsed(Pins):
    """Those asked for longest ago go first, though a request holds their blocks anyway."""

    def free(self, count: int) -> None:
        while self._pool.num_free < count:
            self._shorten(next(iter(self._pins.values())), "pressure")


@pytest.mark.parametrize("make", [ForgetsForks, FavoursTheLoud, TakesTheUsed], ids=lambda make: make.__name__)
def test_a_planted_fault_of_trees_is_caught(make: type[Pins]) -> None:
    def caught(seed: int) -> bool:
        cache = Cache(seed, make=make)
        try:
            for _ in range(80):
                cache.step()
                cache.check()
        except (AssertionError, KeyError):
            return True
        return False

    assert any(map(caught, range(100)))


# --- in runs ----------------------------------------------------------------------------------------------------------


class Unpinning(Scheduler):
    """Somebody ends pins now and then; nothing stays behind the last request."""

    chance = random.Random(0)
    rate = 0.1

    def check(self, blocks: range | None = None) -> None:
        super().check(blocks)
        pins = self.kv.pins
        pins.told(0.0)
        if pins and self.chance.random() < self.rate:
            self.unpin([self.chance.choice(list(pins)).id], "asked")
        if self.idle:
            self.unpin([pin.id for pin in pins], "asked")


class PinningRun(Run):
    """Most requests ask for a pin."""

    def __init__(self, seed: int, depth: int, *, make: Any = Unpinning, **options: Any) -> None:
        super().__init__(seed, depth, make=make, **options)
        self.chance = random.Random(seed + 1)
        kv = self.scheduler.kv
        kv.pins.most = int(kv.num_blocks * self.chance.choice((0.1, 0.3, 0.7, 1.0))) * kv.caching
        if make is Unpinning:
            self.scheduler.chance = self.chance  # type: ignore[attr-defined]

    def _add(self, request: Request) -> None:
        if self.chance.random() < 0.7:
            request.pin_s, request.pin_tokens = 1.0, self.chance.randint(0, request.num_prompt)
        super()._add(request)


def test_pins_change_no_token_and_hold_nobody_up() -> None:
    given_up: Counter[str] = Counter()
    for seed in range(SEEDS):
        wanted = {request.id: expected(request) for request in PinningRun(seed, 1).todo}
        for depth in (1, 2, 3):
            run = PinningRun(seed, depth)
            losses = Losses(0.03 * (seed % 3 == 0))
            for id, outcome in run.play(aborts=seed % 2 > 0, faults=seed % 5 == 0, losses=losses).items():
                if outcome.finish in ("abort", "error"):
                    assert outcome.tokens == wanted[id].tokens[: len(outcome.tokens)], (seed, depth, id)
                else:
                    assert outcome == wanted[id], (seed, depth, id)
            given_up += run.scheduler.kv.pins.given_up
    assert all(given_up[why] > 50 for why in ("asked", "pressure", "quota", "lost")), given_up


def test_beams_pin_as_well() -> None:
    for seed in range(60):
        run = PinningRun(seed, 1 + seed % 3, beams=0.5)
        wanted = {request.id: expected(request) for request in run.todo}
        assert run.play() == wanted, seed


@pytest.mark.parametrize("redacted", [False, True])
def test_a_journal_with_pins_replays(tmp_path: Path, redacted: bool) -> None:
    total: Counter[str] = Counter()
    for seed in range(50):
        run = PinningRun(seed, 2, make=journaled(1 << 26))
        run.scheduler.kv.prefill_s = lambda start, count: None  # that of the run is no part of it
        scheduler, check, chance = run.scheduler, run.scheduler.check, random.Random(seed)

        def checked(scheduler: Any = scheduler, check: Any = check, chance: random.Random = chance) -> None:
            check()
            pins = scheduler.kv.pins
            ids = [pin.id for pin in pins if scheduler.idle or chance.random() < 0.03]
            if ids:
                scheduler.unpin(ids, "asked")

        scheduler.check = checked  # type: ignore[method-assign]
        run.play(losses=Losses(0.02))
        total += scheduler.kv.pins.given_up
        replay = replayed(scheduler.journal, tmp_path / "journal", redacted=redacted)  # type: ignore[attr-defined]
        assert replay.difference is None and replay.plan > 0, (seed, replay.difference)
    assert total["asked"] > 20 and total["pressure"] > 0, total


# --- planted faults ---------------------------------------------------------------------------------------------------


class HoldsPins(KvCache):
    """Pins are never given up."""

    def _unpin_for(self, needed: int, found: list[int]) -> None:
        pass

    @property
    def num_free(self) -> int:
        return self.pool.num_free


class PinsEarly(Pins):
    """What is to be computed is pinned before it is, if somebody else's is there: a prefix with a hole."""

    def ask(self, request: Request, block_size: int) -> None:
        if request.pin_s and request.blocks:
            request.pin_s = 0.0
            self.hold(request.tenant, 1.0, request.blocks[: request.pin_tokens // block_size], 1.0)


class KeepsTheLost(Pins):
    """Workers that are gone are thought to hold what they held."""

    def lose(self, pool: BlockPool) -> None:
        self._pool = pool


class TrustsTheWrong(Pins):
    """What is wrong stays pinned."""

    def forget(self, blocks: set[int]) -> None:
        pass


def with_fault(fault: type) -> type[Scheduler]:
    class Faulty(Unpinning):
        rate = 0.0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            if issubclass(fault, KvCache):
                self.kv.__class__ = fault  # type: ignore[assignment]
            else:
                self.kv.pins = fault(self.kv.pool, 0)  # `most` is the run's

    return Faulty


@pytest.mark.parametrize(
    "fault", [HoldsPins, PinsEarly, KeepsTheLost, TrustsTheWrong], ids=lambda fault: fault.__name__
)
def test_a_planted_fault_is_caught(fault: type) -> None:
    for seed in range(SEEDS):
        run = PinningRun(seed, 2, make=with_fault(fault))
        wanted = {request.id: expected(request) for request in run.todo}
        try:
            losses = Losses(0.0 if fault is HoldsPins else 0.03)  # a loss frees whoever is stuck
            outcomes = run.play(losses=losses, faults=True)
        except (AssertionError, KeyError, IndexError):
            return
        if any(outcome not in (wanted[id], Outcome(outcome.tokens, "error")) for id, outcome in outcomes.items()):
            return
    raise AssertionError("nothing was caught")


# --- by the clock -----------------------------------------------------------------------------------------------------


class Engine:
    """`Serving` with a worker that answers at once. Blocks of four tokens; half of them may be pinned."""

    def __init__(
        self, num_blocks: int = 24, *, max_pinned: float = 0.5, caching: bool = True, budget: int = 2048
    ) -> None:
        cache = CacheConfig(block_size=4, max_pinned=max_pinned, enable_prefix_caching=caching)
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget)
        scheduler = Scheduler(config, cache, num_blocks, 64)
        self.recorder = Recorder("test", caching=True)
        self.serving = Serving(scheduler, INFO, self.recorder, 1)
        self.pins = scheduler.kv.pins
        self.now, self.last_id = 100.0, 0

    def submit(self, prompt: list[int], *, max_tokens: int = 1, **fields: Any) -> None:
        self.last_id += 1
        sampling = SamplingParams(max_tokens=max_tokens, seed=0)
        self.serving.submit(CLIENT, Submit(self.last_id, pack(prompt), sampling, **fields), self.now)

    def step(self) -> None:
        plan = self.serving.plan(self.now)
        assert plan is not None
        count = sum(plan.samples)
        self.serving.result(StepResult(plan.epoch, plan.step, pack([1] * count), pack([9] * count)), self.now)
        self.serving.scheduler.check()

    def serve(self, prompt: list[int], **fields: Any) -> int:
        """How many tokens of the prompt were cached."""
        self.submit(prompt, **fields)
        while not self.serving.scheduler.idle:
            self.step()
        [(_, outputs)] = self.serving.take_outputs()
        return outputs.outputs[-1].num_cached

    def flood(self) -> None:
        """More prompts, none like another, than there is room for."""
        for start in range(20, 100, 2):
            self.serve([start, *range(8)] * 2)

    def metric(self, name: str) -> float:
        self.recorder.levels(self.serving.scheduler)
        lines = self.recorder.metrics.render().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and "why" not in name)


PREFIX = list(range(17))  # four blocks and a token


def test_what_is_pinned_survives_a_flood_and_what_is_not_does_not() -> None:
    engine = Engine()
    engine.serve(PREFIX)
    engine.flood()
    assert engine.serve(PREFIX) == 0
    engine.serve(PREFIX, pin_s=300.0)
    engine.flood()
    assert engine.serve(PREFIX) == 16 and engine.metric("quire:kv_blocks_pinned{") == 4


def test_a_pin_ends_when_its_time_is_over_and_asking_again_moves_that() -> None:
    engine = Engine()
    engine.serve(PREFIX, pin_s=300.0)
    assert engine.serving.next_deadline == 400.0
    engine.now = 300.0
    engine.serve(PREFIX, pin_s=300.0)
    engine.serve(PREFIX, pin_s=60.0)  # takes nothing from it
    engine.now = 599.0
    engine.serving.expire(engine.now)
    engine.flood()
    assert len(engine.pins) == 1 and engine.serve(PREFIX) == 16
    engine.now = 600.0
    assert engine.serving.next_deadline <= engine.now
    engine.serving.expire(engine.now)
    assert not engine.pins and engine.serving.next_deadline == inf
    assert engine.pins.given_up == {"expired": 4} and engine.metric("quire:kv_blocks_pinned{") == 0
    engine.flood()
    assert engine.serve(PREFIX) == 0


@pytest.mark.parametrize("seed", range(20))
def test_pins_last_as_long_as_the_longest_that_was_asked_for(seed: int) -> None:
    """And `LATEST_S` more at most, while there is room."""
    choose, engine = random.Random(seed), Engine(200, max_pinned=1.0)
    until: dict[tuple[str, int], float] = {}  # by tenant and blocks
    for _ in range(150):
        engine.now += choose.choice((0.0, 0.3, 5.0, 100.0))
        tenant, count, seconds = choose.choice("ab"), choose.randint(1, 5), choose.choice((0.0, 50.0, 300.0))
        if seconds:
            name = tenant, count
            until[name] = max(until.get(name, 0.0), engine.now + seconds)
        engine.serve([count] * (4 * count), tenant=tenant, pin_s=seconds)
        engine.now += choose.choice((0.0, 0.3, 5.0, 100.0))
        engine.serving.expire(engine.now)
        there = {(pin.tenant, pin.num_blocks) for pin in engine.pins}
        assert there >= {name for name, end in until.items() if end > engine.now}
        assert not there & {name for name, end in until.items() if end <= engine.now - LATEST_S}
        ends = [end for name, end in until.items() if name in there]
        assert engine.serving.next_deadline <= min(ends, default=inf) + LATEST_S
        until = {name: end for name, end in until.items() if name in there}
    assert engine.pins.given_up.keys() == {"expired"}


def test_time_counts_from_the_computation_of_the_prompt() -> None:
    engine = Engine()
    engine.submit(PREFIX, pin_s=300.0)
    engine.now = 500.0  # it has waited
    engine.step()
    assert engine.serving.next_deadline == 800.0


def test_the_border_of_a_pin_is_a_block() -> None:
    engine = Engine()
    engine.serve(PREFIX, pin_s=300.0, pin_tokens=11)
    engine.flood()
    assert engine.serve(PREFIX) == 8
    engine.serve([50, 51, 52], pin_s=300.0)
    assert len(engine.pins) == 1, "less than a block is nothing"


@pytest.mark.parametrize("budget", [1, 3, 4, 6, 8, 100])
def test_a_prompt_that_is_computed_in_chunks_is_pinned_as_a_whole(budget: int) -> None:
    engine = Engine(budget=budget)
    engine.serve(PREFIX[:16], pin_s=300.0)
    assert engine.pins.num_blocks == 4
    engine.serve(PREFIX[:8], pin_s=300.0)
    assert engine.pins.num_blocks == 4 and len(engine.pins) == 2


def test_a_request_that_needs_the_room_has_it() -> None:
    engine = Engine(16, max_pinned=1.0)
    for start in range(4):
        engine.serve([start, *PREFIX[2:]], pin_s=300.0)
    assert len(engine.pins) == 4 and engine.serving.scheduler.kv.pool.num_free == 0
    assert engine.serve([60] * 40, max_tokens=24) == 0  # takes all blocks there are, the last ones as it grows
    assert not engine.pins and engine.pins.given_up["pressure"] == 16


def test_pins_wait_for_those_who_run_to_make_room_and_yield_before_these_do() -> None:
    engine = Engine(16)
    engine.serve(PREFIX, pin_s=300.0)
    engine.submit([40] * 24, max_tokens=25)  # 6 blocks, later 12
    engine.step()
    engine.submit([41] * 32)  # 8 blocks: room for it would be there without the pin
    engine.step()
    scheduler = engine.serving.scheduler
    assert len(scheduler.waiting) == 1 and len(engine.pins) == 1
    while scheduler.running:
        engine.step()
    assert engine.pins.num_blocks == 4, "there was room for the running one"
    engine = Engine(16)
    engine.serve(PREFIX, pin_s=300.0)
    for token in (40, 41):
        engine.submit([token] * 22, max_tokens=10)  # 6 blocks each, later 8
    while not engine.serving.scheduler.idle:
        engine.step()
    assert engine.pins.given_up == {"pressure": 4}
    assert engine.metric("vllm:num_preemptions_total") == 0


def test_a_request_of_better_priority_takes_from_pins_before_it_takes_from_others() -> None:
    engine = Engine(16)
    engine.serve(PREFIX, pin_s=300.0)
    engine.submit([40] * 24, max_tokens=25, priority=1)
    engine.step()
    engine.submit([41] * 32, priority=0)
    engine.step()
    assert engine.metric("vllm:num_preemptions_total") == 0 and engine.pins.given_up == {"pressure": 2}


def test_lost_workers_take_pins_along_and_the_next_request_brings_them_back() -> None:
    engine = Engine()
    engine.serve(PREFIX, pin_s=300.0)
    engine.serving.regroup(2, engine.now, out_of_memory=False)
    assert not engine.pins and engine.serving.next_deadline == inf
    engine.serve(PREFIX, pin_s=300.0)
    assert len(engine.pins) == 1


def test_tenants_have_pins_of_their_own() -> None:
    engine = Engine()
    for tenant in "ab":
        engine.serve(PREFIX, pin_s=300.0, tenant=tenant, salt=f"{tenant}:")
    told = engine.serving.pins(GetPins(7), engine.now)
    assert (told.serial, told.count, told.num_blocks, told.most_blocks) == (7, 2, 8, 12)
    assert [(pin.tenant, pin.num_tokens, pin.num_blocks, pin.left_s) for pin in told.pins] == [
        ("b", 16, 4, 300.0),
        ("a", 16, 4, 300.0),
    ]
    ended = engine.serving.pins(GetPins(8, unpin=True, tenant="a"), engine.now)
    assert [pin.tenant for pin in ended.pins] == ["a"] and ended.num_blocks == 4
    assert engine.serving.pins(GetPins(9, unpin=True, id=told.pins[1].id), engine.now).count == 0
    assert engine.serving.pins(GetPins(9, unpin=True), engine.now).count == 1 and not engine.pins


@pytest.mark.parametrize("options", [{"max_pinned": 0.0}, {"caching": False}])
def test_nothing_is_pinned_where_nothing_may_be(options: dict[str, Any]) -> None:
    engine = Engine(**options)
    engine.serve(PREFIX, pin_s=300.0)
    assert not engine.pins and engine.serving.next_deadline == inf


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, inf, 1e300])
@pytest.mark.parametrize("tokens", [-1, 0, 5, 2**40])
def test_nothing_is_believed(seconds: float, tokens: int) -> None:
    submit = Submit(1, pack(PREFIX), SamplingParams(max_tokens=1, seed=0), pin_s=seconds, pin_tokens=tokens)
    request = intake.request(submit, CLIENT, 100, 0.0)
    assert 0.0 <= request.pin_s <= intake.MAX_PIN_S and 1 <= request.pin_tokens <= len(PREFIX)


def test_a_pin_costs_the_same_however_many_there_are() -> None:
    """Of prefixes that begin alike, what is kept grows with their blocks, not with their lengths."""
    pool = BlockPool(2000)
    blocks = pool.take(2000)
    for block in blocks:
        pool.publish(block, pack([block]), b"")
    pool.release(blocks)
    pins = Pins(pool, 2000)
    for end in range(1, 2000):
        pins.hold("a", 1.0, blocks[:end], 1.0)
    assert len(pins) == 1999 == pins.num_blocks and sum(map(len, pins._trees["a"].needs.items())) == 2 * 1999
    assert array("i", pool.pinned.values()).tolist() == [1] * 1999
