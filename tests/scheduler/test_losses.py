"""Workers that are lost at any moment change no token, and a request that kills them fails alone."""

import random
from array import array
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import Output, StepResult, pack
from quire.common.sampling import SamplingParams
from quire.scheduler.blocks import BlockPool, blocks_for
from quire.scheduler.request import SUSPECT_AT, Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step import Step
from quire.scheduler.suspects import FAIL_AT, PROOF

from .simulation import Losses, Outcome, Run, Totals, expected

SEEDS = 150


def _add(total: Totals, totals: Totals) -> None:
    for item in fields(Totals):
        setattr(total, item.name, getattr(total, item.name) + getattr(totals, item.name))


def _wanted(seed: int) -> dict[int, Outcome]:
    return {request.id: expected(request) for request in Run(seed, 1).todo}


def _poison(seed: int, ids: list[int]) -> frozenset[int]:
    rng = random.Random(seed)
    return frozenset(rng.sample(ids, min(len(ids), rng.randint(1, 3))))


class Watched(Scheduler):
    """Suspects and others take turns, whenever both can be computed."""

    after_suspect = False  # the last step was one's

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        self.after_suspect = False
        return super().regroup(epoch)

    def schedule(self) -> Step | None:
        suspect = self.suspects.running()
        others = [request for request in self.running if not request.suspect]
        step = super().schedule()
        if step is not None and step.alone and self.after_suspect:
            assert not any(self._could_run(request) for request in others), "others were passed over"
        if step is not None and not step.alone and not self.after_suspect and suspect is not None:
            assert not self._could_run(suspect), "a suspect was passed over"
        if step is not None:
            self.after_suspect = step.alone
        return step

    def _could_run(self, request: Request) -> bool:
        """Without a block that it would have to get first, and might not."""
        target = len(request.tokens) + request.inflight
        held = request.row is not None and blocks_for(target, self.kv.block_size) <= len(request.blocks)
        return held and target < request.limit


def test_losses_at_random_moments_change_no_token() -> None:
    total = Totals()
    for seed in range(SEEDS):
        wanted = _wanted(seed)
        for depth in (1, 2, 3):
            run = Run(seed, depth, make=Watched)
            assert run.play(losses=Losses(0.1)) == wanted, (seed, depth)
            _add(total, run.totals)
    assert total.lost > 500 and total.preempted > 100 and total.cached > 1000, total


def test_losses_among_aborts_resubmissions_and_faults() -> None:
    for seed in range(SEEDS):
        wanted = _wanted(seed)
        for depth in (1, 2, 3):
            outcomes = Run(seed, depth).play(aborts=True, restarts=True, faults=True, losses=Losses(0.1))
            for id, outcome in outcomes.items():
                if outcome.finish in ("abort", "error"):
                    assert outcome.tokens == wanted[id].tokens[: len(outcome.tokens)], (seed, depth, id)
                else:
                    assert outcome == wanted[id], (seed, depth, id)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_poison_fails_alone_and_soon(rate: float) -> None:
    total = Totals()
    for seed in range(SEEDS):
        wanted = _wanted(seed)
        poison = _poison(seed, list(wanted))
        for depth in (1, 2, 3):
            run = Run(seed, depth, make=Watched)
            for id, outcome in run.play(losses=Losses(rate, poison)).items():
                assert outcome == (Outcome([], "error") if id in poison else wanted[id]), (seed, depth, id)
            assert run.totals.killed <= FAIL_AT * len(poison), (seed, depth)
            _add(total, run.totals)
    assert total.killed > 500 and total.alone > 500, total


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_poison_that_acts_where_it_is_decoded_kills_a_few_times(rate: float) -> None:
    """Each time it is computed anew it gets a token, which proves nothing."""
    total = Totals()
    for seed in range(SEEDS):
        wanted = _wanted(seed)
        poison = _poison(seed, list(wanted))
        for depth in (1, 2, 3):
            run = Run(seed, depth, make=Watched)
            for id, outcome in run.play(losses=Losses(rate, poison, slow=poison)).items():
                if outcome.finish == "error":
                    assert id in poison and outcome.tokens == wanted[id].tokens[: len(outcome.tokens)]
                else:
                    assert outcome == wanted[id], (seed, depth, id)
            assert run.totals.killed <= 2 * FAIL_AT * len(poison), (seed, depth)
            _add(total, run.totals)
    assert total.killed > 500, total


# --- planted faults: each must be caught ------------------------------------------------------------------------------


class KeepsInflight(Scheduler):
    """Samples that were under way are still waited for."""

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        inflight = {request: request.inflight for request in (*self.running, *self.waiting)}
        news = super().regroup(epoch)
        for request, count in inflight.items():
            request.inflight = count
        return news


class KeepsCache(Scheduler):
    """What the lost workers held can still be found."""

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        pool = self.kv.pool
        content = [(block, digest, pool._tokens[block]) for digest, block in pool._by_digest.items()]
        news = super().regroup(epoch)
        for block, digest, tokens in content:
            self.kv.pool.publish(block, digest, tokens)
        return news


class TellsOfOldRows(Scheduler):
    """The next workers are told to release what they never had."""

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        released = [request.row for request in self.running if request.row is not None]
        news = super().regroup(epoch)
        self.rows._released = released
        return news


class CountsStepsOn(Scheduler):
    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        step = self._step
        news = super().regroup(epoch)
        self._step = step
        return news


class ForgetsATokenOnRegroup(Scheduler):
    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        for request in self.running:
            if request.num_output:
                request.tokens.pop()
        return super().regroup(epoch)


class BlamesNobody(Scheduler):
    def blame(self) -> list[Request]:
        return []


class KeepsCompany(Scheduler):
    """Suspects run with everybody else."""

    def _next_suspect(self) -> Request | None:
        for request in list(self.suspects._requests):
            self.suspects.drop(request)
            request.strikes = min(request.strikes, 1)
        return None

    def check(self, blocks: range | None = None) -> None:
        """The books are cooked too."""


class BlamesThePatient(Scheduler):
    """Whoever waits gets a strike as well."""

    def blame(self) -> list[Request]:
        return [*super().blame(), *self.suspects.blame(self.waiting)]


class OthersNever(Watched):
    """A suspect does not give way."""

    def schedule(self) -> Step | None:
        self._others_turn = False
        return super().schedule()


class SuspectsNever(Watched):
    """A suspect is computed only when there is nobody else."""

    def schedule(self) -> Step | None:
        self._others_turn = True
        return super().schedule()


PLANTED = [
    KeepsInflight,
    KeepsCache,
    TellsOfOldRows,
    CountsStepsOn,
    ForgetsATokenOnRegroup,
    BlamesNobody,
    KeepsCompany,
    BlamesThePatient,
]


def _caught(make: type[Scheduler], seeds: int = 60) -> bool:
    for seed in range(seeds):
        wanted = _wanted(seed)
        poison = _poison(seed, list(wanted))
        try:
            outcomes = Run(seed, 2, make=make).play(losses=Losses(0.1, poison))
        except (AssertionError, KeyError, IndexError):
            return True
        if any(outcomes[id] != wanted[id] for id in wanted if id not in poison):
            return True
    return False


@pytest.mark.parametrize("make", PLANTED, ids=lambda make: make.__name__)
def test_planted_fault_is_caught(make: type[Scheduler]) -> None:
    assert _caught(make)


@pytest.mark.parametrize("make", [OthersNever, SuspectsNever], ids=lambda make: make.__name__)
def test_unfairness_is_caught(make: type[Scheduler]) -> None:
    assert _caught(make)


@pytest.mark.parametrize("make", [Scheduler, Watched], ids=lambda make: make.__name__)
def test_nothing_is_caught_without_a_fault(make: type[Scheduler]) -> None:
    assert not _caught(make)


# --- decisions --------------------------------------------------------------------------------------------------------


def _scheduler(**config: int) -> Scheduler:
    return Scheduler(SchedulerConfig(**config), CacheConfig(block_size=4), 400, 100)


def _request(id: int, prompt: int = 3, *, strikes: int = 0, max_tokens: int = 50) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    return Request(id, array("i", [id % 50] * prompt), prompt, sampling, strikes=strikes)


def _ids(step: Step | None) -> list[int]:
    return [request.id for request in step.requests] if step else []


def _answer(scheduler: Scheduler) -> None:
    step = scheduler.dispatched[0]
    count = len(step.sampled)
    scheduler.update(StepResult(scheduler.epoch, step.plan.step, pack([1] * count), pack([9] * count)))


def test_a_suspect_is_computed_alone_and_every_second_step() -> None:
    engine = _scheduler()
    for id in (0, 1):
        engine.add(_request(id))
    engine.add(_request(2, strikes=SUSPECT_AT))
    engine.add(_request(3))
    seen = []
    for _ in range(6):
        seen.append(_ids(engine.schedule()))
        assert engine.schedule() is None or 2 not in seen[-1] or len(seen) > 4, "nothing else is in flight with it"
        while engine.dispatched:
            _answer(engine)
    assert seen[:4] == [[0, 1], [2], [0, 1, 3], [2]] and sorted(seen[4]) == sorted(seen[5]) == [0, 1, 2, 3]


def test_two_tokens_clear_a_suspect_and_one_does_not() -> None:
    engine = _scheduler()
    suspect = _request(0, strikes=SUSPECT_AT)
    engine.add(suspect)
    for _ in range(PROOF):
        assert suspect.suspect and engine.suspects
        engine.schedule()
        _answer(engine)
    assert not suspect.strikes and not engine.suspects
    engine.check()


def test_strikes_are_for_those_in_flight_once_a_loss() -> None:
    engine = _scheduler(max_num_seqs=2)
    requests = [_request(id) for id in range(4)]
    for request in requests:
        engine.add(request)
    assert engine.schedule() and engine.schedule(), "two steps of the same two requests"
    engine.abort(requests[1])
    assert engine.blame() == [] and [request.strikes for request in requests] == [1, 0, 0, 0]
    engine.regroup(2)
    engine.schedule()
    assert engine.blame() == [requests[0]] and [request.strikes for request in requests] == [2, 0, 1, 0]


def test_who_brings_too_many_strikes_is_not_tried() -> None:
    engine = _scheduler()
    end = engine.add(_request(0, strikes=FAIL_AT))
    assert end is not None and end.finish == "error" and "failed 4 times" in end.error and engine.idle
    assert engine.add(_request(1, strikes=FAIL_AT - 1)) is None and _ids(engine.schedule()) == [1]
    engine.blame()
    ((request, output),) = engine.regroup(2)
    assert request.id == output.id == 1 and output.finish == "error" and engine.idle
    engine.check()


def test_who_ran_waits_in_the_order_there_was() -> None:
    engine = _scheduler(max_num_seqs=3, max_num_batched_tokens=8)
    for id, priority in enumerate((1, 0, 1, 0, 0)):
        request = _request(id)
        request.priority = priority
        engine.add(request)
    engine.schedule()
    engine.schedule()
    engine.blame()
    engine.regroup(2)
    order = []
    while engine.waiting:
        order.append(engine.waiting.pop().id)
    assert order == [1, 3, 4, 0, 2]


def test_thirty_two_innocents_and_two_culprits_all_suspect() -> None:
    """Each innocent is cleared by its own two steps, and nobody else is ever in flight with a culprit."""
    engine = _scheduler()
    requests = [_request(id, strikes=SUSPECT_AT, max_tokens=10) for id in range(34)]
    for request in requests:
        engine.add(request)
    failed, losses, steps = [], 0, 0
    while not engine.idle:
        while len(engine.dispatched) < 2 and (step := engine.schedule()):
            steps += 1
            assert len(step.requests) == 1 or not {5, 20} & set(_ids(step))
        if {5, 20} & set(_ids(engine.dispatched[0])):
            losses += 1
            engine.blame()
            failed += [request.id for request, _ in engine.regroup(1 + losses)]
        else:
            _answer(engine)
        engine.check()
    assert failed == [5, 20] and losses == 2 * (FAIL_AT - SUSPECT_AT)
    assert all(request.finish == "length" for request in requests if request.id not in failed)
    assert steps < 34 * 2 * 2 + 30, "no more than two steps each, and as many for the others"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 64), st.integers(1, 100))
def test_steps_shrink_to_what_fits_in_few_losses(prompts: list[int], block_size: int, fits: int) -> None:
    engine = Scheduler(SchedulerConfig(max_num_batched_tokens=128), CacheConfig(block_size=block_size), 1000, 1000)
    for id, prompt in enumerate(prompts):
        engine.add(_request(id, prompt, max_tokens=2))
    losses = 0
    while not engine.idle:
        while len(engine.dispatched) < 2 and engine.schedule():
            pass
        if engine.dispatched[0].num_tokens > max(fits, block_size):
            losses += 1
            before = engine.budget
            assert engine.shrink() and engine.budget < before
            assert engine.regroup(1 + losses) == []
        else:
            _answer(engine)
    assert losses <= 7 and engine.budget >= min(128, block_size)


def test_steps_that_are_as_small_as_they_can_be_do_not_shrink() -> None:
    engine = _scheduler(max_num_batched_tokens=64)
    assert not engine.shrink() and engine.budget == 64, "nothing was in flight"
    engine.add(_request(0, 4))
    engine.schedule()
    assert not engine.shrink() and engine.budget == 64, "four tokens are a block"


def test_no_more_run_than_a_step_has_tokens() -> None:
    engine = _scheduler(max_num_seqs=64)
    for id in range(40):
        engine.add(_request(id, 1))
    engine.schedule()
    assert engine.shrink() and engine.budget == 20
    engine.regroup(2)
    for _ in range(5):
        step = engine.schedule()
        assert step and len(step.requests) == len(engine.running) == 20
        _answer(engine)


def test_a_part_of_the_books_is_looked_at() -> None:
    pool = BlockPool(10)
    (block,) = pool.take(1)
    pool.publish(block, b"digest", b"")
    pool._refs[7] = 1
    pool.check([[block]], range(1, 7))
    with pytest.raises(AssertionError, match="block 7"):
        pool.check([[block]], range(7, 11))
    pool._refs[7] = 0
    pool._by_digest[b"digest"] = 9
    with pytest.raises(AssertionError, match="not found"):
        pool.check([[block]])
