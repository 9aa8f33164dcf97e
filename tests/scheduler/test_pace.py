"""The step-time model against devices of a known one, and what a step is given by it."""

import random
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quire.scheduler.pace import AIM, Claim, Load, Pace, chunk_pairs

MS = 1e-3


@dataclass(frozen=True)
class Device:
    """Seconds, as `pace` has them."""

    step: float
    row: float
    context: float
    token: float
    pair: float
    mixed: float

    def took(self, load: Load) -> float:
        decode = self.step + self.row * load.rows + self.context * load.context
        return decode + (self.mixed + self.token * load.tokens + self.pair * load.pairs if load.tokens else 0.0)


GPU = Device(4 * MS, 0.02 * MS, 3e-8, 0.02 * MS, 1e-9, 1 * MS)
CPU = Device(20 * MS, 1 * MS, 1e-7, 0.8 * MS, 2e-8, 0.0)


def some_load(rng: random.Random, *, chunk: bool) -> Load:
    rows = rng.randint(0, 100)
    load = Load(rows, rows * rng.randint(50, 4000))
    if not chunk and rows:
        return load
    start, count = rng.choice((0, 0, rng.randint(0, 30_000))), rng.randint(2, 2048)
    return Load(load.rows, load.context, count, chunk_pairs(start, count))


def taught(device: Device, seed: int, steps: int = 400, *, late: float = 0.0, noise: float = 0.0) -> Pace:
    rng, pace = random.Random(seed), Pace(50 * MS)
    for _ in range(steps):
        load = some_load(rng, chunk=rng.random() < 0.5)
        factor = rng.uniform(10, 1000) if rng.random() < late else rng.uniform(1 - noise, 1 + noise)
        pace.learn(load, device.took(load) * factor)
    return pace


@pytest.mark.parametrize("device", [GPU, CPU], ids=["GPU", "CPU"])
@pytest.mark.parametrize(("late", "noise"), [(0.0, 0.0), (0.05, 0.1)])
def test_a_step_is_predicted_from_those_before_it(device: Device, late: float, noise: float) -> None:
    for seed in range(5):
        pace, rng = taught(device, seed, late=late, noise=noise), random.Random(-seed)
        for _ in range(50):
            load = some_load(rng, chunk=rng.random() < 0.5)
            assert pace.step_s(load) == pytest.approx(device.took(load), rel=0.15 if noise else 0.02)


def test_a_device_that_changes_is_followed() -> None:
    pace, rng = taught(GPU, 0), random.Random(1)
    for _ in range(1200):
        load = some_load(rng, chunk=rng.random() < 0.5)
        pace.learn(load, 2 * GPU.took(load))
    assert pace.step_s(load) == pytest.approx(2 * GPU.took(load), rel=0.05)


def test_decoding_for_hours_wears_nothing_away() -> None:
    pace = taught(GPU, 0)
    before = pace.prefill_s(1000, 500)
    for step in range(20_000):
        pace.learn(Load(64, 64 * (step % 1000)), 9 * MS)
    assert before is not None and pace.prefill_s(1000, 500) == before


def test_a_first_step_that_takes_a_thousand_times_as_long_is_forgotten_at_once() -> None:
    pace = Pace(50 * MS)
    pace.learn(Load(0, 0, 512, chunk_pairs(0, 512)), 10.0)
    pace.learn(Load(8, 4000), 10.0)
    for _ in range(20):
        pace.learn(Load(8, 4000), GPU.took(Load(8, 4000)))
        small = Load(8, 4000, 16, chunk_pairs(512, 16))
        pace.learn(small, GPU.took(small))
    assert pace.step_s(small) == pytest.approx(GPU.took(small), rel=0.2)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 60.0), st.integers(1, 200))
def test_whatever_it_is_told_it_stays_sane(seed: int, took_s: float, steps: int) -> None:
    rng, pace = random.Random(seed), Pace(50 * MS)
    for _ in range(steps):
        pace.learn(some_load(rng, chunk=rng.random() < 0.5), rng.choice((took_s, rng.random(), 1e-6)))
    for load in (some_load(rng, chunk=True), some_load(rng, chunk=False)):
        assert 0.0 <= pace.step_s(load) < 1e6
    start, count = rng.randint(0, 30_000), rng.randint(1, 2048)
    seconds = pace.prefill_s(start, count)
    assert seconds is None or 0.0 <= seconds <= (pace.prefill_s(start, count + 1) or 0.0) < 1e6
    assert pace.chunk(start, pace.spare_s(3, 1000)) >= 0


@settings(deadline=None)
@given(st.integers(0, 40_000), st.floats(1e-4, 1.0))
def test_a_chunk_fills_its_time_and_no_more(start: int, spare_s: float) -> None:
    pace = taught(GPU, 3)
    count = pace.chunk(start, spare_s)
    took = [pace.prefill_s(start, count), pace.prefill_s(start, count + 1)]
    assert took[0] is not None and took[1] is not None
    assert took[0] <= spare_s * 1.000001 and took[1] >= spare_s * 0.999999


def test_prefill_has_what_decoding_leaves_of_the_target_or_as_much_as_decoding() -> None:
    pace = taught(GPU, 0)
    quick, slow = Load(10, 10_000), Load(100, 1_000_000)
    for load, bound in ((quick, AIM * 50 * MS), (slow, 2 * GPU.took(slow))):
        spare = pace.spare_s(load.rows, load.context)
        count = pace.chunk(20_000, spare)
        step = Load(load.rows, load.context, count, chunk_pairs(20_000, count))
        assert GPU.took(step) == pytest.approx(bound, rel=0.05)


def test_there_is_no_limit_without_a_target_or_streams_or_knowledge() -> None:
    assert taught(GPU, 0).spare_s(0, 0) == inf
    assert Pace(50 * MS).spare_s(5, 1000) == inf and Pace(50 * MS).prefill_s(0, 10) is None
    pace = taught(GPU, 0)
    pace.target_itl_s = 0.0
    assert pace.spare_s(5, 1000) == inf and pace.chunk(0, inf) > 1 << 30


claims = st.lists(
    st.builds(
        Claim,
        st.integers(0, 30_000),
        st.integers(1, 30_000),
        st.integers(0, 2),
        st.integers(0, 2),
        crowds=st.booleans(),
    ),
    min_size=1,
    max_size=6,
).map(lambda some: [claim._replace(turn=turn) for turn, claim in enumerate(some)])


@settings(deadline=None)
@given(claims, st.integers(1, 4096), st.none() | st.floats(-0.1, 0.5), st.sampled_from((1, 16)))
def test_shares_of_a_step(prompts: list[Claim], budget: int, spare_s: float | None, least: int) -> None:
    pace = taught(GPU, 0)
    spare = inf if spare_s is None else spare_s
    counts = pace.share(prompts, budget, spare, least)
    assert all(0 <= count <= claim.left for count, claim in zip(counts, prompts, strict=True))
    assert 0 < sum(counts) <= budget, "a step that could get on does not"
    seconds = sum(pace.cost_s(claim._replace(left=count)) for claim, count in zip(prompts, counts, strict=True))
    over = sum(pace.cost_s(claim._replace(left=min(least, claim.left))) for claim in prompts)
    assert spare == inf or seconds <= max(0.0, spare) + over
    if spare == inf:
        assert sum(counts) == min(budget, sum(claim.left for claim in prompts)), "room is left"
    first = min(range(len(prompts)), key=lambda i: (prompts[i].priority, prompts[i].level, prompts[i].turn))
    assert counts[first] >= min(prompts[first].left, least, budget, (budget + 1) // 2), "the first of all gets nothing"
    if spare == inf:
        assert counts[first] >= min(prompts[first].left, (budget + 1) // 2)


@settings(deadline=None)
@given(claims, st.floats(0.001, 0.02))
def test_who_crowds_adds_to_no_more_than_half_of_a_step(prompts: list[Claim], spare_s: float) -> None:
    pace = taught(GPU, 0)
    prompts = [claim._replace(level=9 if claim.crowds else claim.level, priority=0) for claim in prompts]
    counts = pace.share(prompts, 1 << 20, spare_s, 0)
    took = [pace.cost_s(claim._replace(left=count)) for claim, count in zip(prompts, counts, strict=True)]
    crowding = sum(seconds for claim, seconds in zip(prompts, took, strict=True) if claim.crowds)
    assert not crowding or sum(took) <= spare_s / 2 * 1.000001
    others = [claim for claim in prompts if not claim.crowds]
    alone = pace.share(others, 1 << 20, spare_s, 0)
    assert alone == [count for claim, count in zip(prompts, counts, strict=True) if not claim.crowds]


@settings(deadline=None)
@given(claims, st.integers(2, 4096))
def test_the_shortest_goes_first(prompts: list[Claim], budget: int) -> None:
    prompts = [claim._replace(priority=0, level=0.0) for claim in prompts]
    shortest = min(prompts, key=lambda claim: (claim.left, claim.turn))
    assume(shortest.left <= budget // 2)
    counts = Pace(0.0).share(prompts, budget, inf, 1)
    assert counts[shortest.turn] == shortest.left
    unfinished = [claim for claim, count in zip(prompts, counts, strict=True) if count < claim.left and claim.turn]
    given_to = sorted((claim for claim in prompts if claim.turn), key=lambda claim: (claim.left, claim.turn))
    flags = [claim in unfinished for claim in given_to]
    assert all(before <= after for before, after in pairwise(flags)), "a longer one was finished before a shorter"
