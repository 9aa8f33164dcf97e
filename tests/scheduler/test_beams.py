"""Beam searches in the scheduler: the same hypotheses at any depth, whoever else runs, and nothing left behind."""

from array import array
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import pack
from quire.common.sampling import SamplingParams
from quire.scheduler import prefix_cache
from quire.scheduler.beams import Search, candidates_of
from quire.scheduler.groups import Groups
from quire.scheduler.kv_cache import KvCache
from quire.scheduler.request import Request
from quire.scheduler.rows import Rows
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.suspects import FAIL_AT

from .simulation import MAX_MODEL_LEN, Device, Losses, Outcome, Run, Totals, expected

SEEDS = 200
MANY = 0.6  # of the requests


class Watched(Run):
    """Counts what becomes of beams."""

    def __init__(self, seed: int, depth: int, make: type[Scheduler] = Scheduler) -> None:
        super().__init__(seed, depth, make=make, beams=MANY)
        self.wanted = {request.id: expected(request) for request in self.todo}
        self.searching = {request.id for request in self.todo if request.sampling.beam_width > 1}


def add(total: Totals, run: Run) -> None:
    for item in fields(Totals):
        setattr(total, item.name, getattr(total, item.name) + getattr(run.totals, item.name))


def test_every_depth_gives_the_hypotheses_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    take_over, last_held = Groups._take_over, Groups.last_held

    def watched(self: Groups, request: Request, parent: Request) -> None:
        take_over(self, request, parent)
        seen["forked" if request.row is not None else "waits"] += 1
        anew = replace(request, tokens=request.tokens[:], digests=[])
        named = [prefix_cache.name(anew, i, self._kv.block_size)[0] for i in range(len(request.digests))]
        assert request.private or request.digests == named, "names of what another beam held"

    def parked(self: Groups) -> Request | None:
        found = last_held(self)
        seen["gave way"] += found is not None
        return found

    monkeypatch.setattr(Groups, "_take_over", watched)
    monkeypatch.setattr(Groups, "last_held", parked)
    total = Totals()
    for seed in range(SEEDS):
        for depth in (1, 2, 3):
            run = Watched(seed, depth)
            assert run.play() == run.wanted, (seed, depth)
            add(total, run)
    assert total.preempted > 100 and seen["forked"] > 1000 and seen["waits"] > 100 and seen["gave way"] > 10, (
        total,
        seen,
    )


def test_aborts_deadlines_resubmissions_and_faults_disturb_nobody() -> None:
    total = Totals()
    for seed in range(SEEDS):
        for depth in (1, 2, 3):
            run = Watched(seed, depth)
            hurts = {
                "aborts": seed % 2 == 0,
                "expiries": seed % 2 == 1,
                "restarts": seed % 3 == 0,
                "faults": seed % 5 == 0,
            }
            for id, outcome in run.play(**hurts).items():
                if outcome.finish in ("abort", "timeout", "error"):
                    assert outcome.tokens == run.wanted[id].tokens[: len(outcome.tokens)], (seed, depth, id)
                    assert id not in run.searching or not outcome.tokens, "a part of a search"
                else:
                    assert outcome == run.wanted[id], (seed, depth, id)
            add(total, run)
    assert total.aborted > 50 and total.expired > 50 and total.resubmitted > 50 and total.faulted > 50, total


def test_losses_change_no_hypothesis_and_poison_fails_alone() -> None:
    total = Totals()
    for seed in range(SEEDS):
        for depth in (1, 2, 3):
            run = Watched(seed, depth)
            poison = frozenset(sorted(run.wanted)[: seed % 2])
            for id, outcome in run.play(losses=Losses(0.1, poison)).items():
                assert outcome == (Outcome([], "error") if id in poison else run.wanted[id]), (seed, depth, id)
            widest = max((request.sampling.num_sequences for request in Run(seed, 1, beams=MANY).todo), default=1)
            assert run.totals.killed <= FAIL_AT * widest * len(poison), (seed, depth)
            add(total, run)
    assert total.lost > 300 and total.killed > 100, total


# --- what is shared ---------------------------------------------------------------------------------------------------

BLOCK_SIZE, NUM_BLOCKS, BUDGET = 4, 60, 64
PROMPT = [i % 11 for i in range(18)]


class Engine:
    """A scheduler and its device, one step at a time."""

    def __init__(self, max_num_seqs: int = 8, **scheduling: int) -> None:
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=BUDGET, **scheduling)
        self.scheduler = Scheduler(config, CacheConfig(block_size=BLOCK_SIZE), NUM_BLOCKS, MAX_MODEL_LEN)
        self.device = Device(NUM_BLOCKS, BLOCK_SIZE, max_num_seqs, BUDGET)
        self.computed = self.most_held = 0

    def add(self, id: int, **sampling: Any) -> Request:
        request = asked(id, **sampling)
        assert self.scheduler.rejection(request) is None and self.scheduler.add(request) is None
        return request

    def run(self) -> None:
        while step := self.scheduler.schedule():
            self.computed += step.num_tokens
            self.scheduler.update(self.device.run(step.plan))
            self.scheduler.check()
            self.most_held = max(self.most_held, NUM_BLOCKS - self.scheduler.kv.num_free)


def asked(id: int, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 12, "seed": 0, "ignore_eos": True} | sampling)
    return Request(id, array("i", PROMPT), len(PROMPT), params)


def test_choices_of_a_request_share_its_prompt() -> None:
    engine = Engine()
    engine.scheduler.kv.worth_waiting = BLOCK_SIZE
    for id in range(4):
        engine.add(id)
    engine.run()
    shared = len(PROMPT) // BLOCK_SIZE
    longest = -(-(len(PROMPT) + 11) // BLOCK_SIZE)
    assert engine.computed == len(PROMPT) + 3 * (len(PROMPT) - shared * BLOCK_SIZE) + 4 * 11
    assert engine.most_held <= shared + 4 * (longest - shared)


def test_beams_compute_the_prompt_once_and_copy_on_write() -> None:
    engine = Engine()
    engine.add(1, beam_width=4)
    engine.run()
    shared = len(PROMPT) // BLOCK_SIZE
    longest = -(-(len(PROMPT) + 11) // BLOCK_SIZE)
    assert engine.computed == len(PROMPT) + 4 * 11, "a token was computed twice"
    assert engine.device.num_copies > 0
    assert engine.most_held <= shared + 4 * (longest - shared)


def test_beams_count_as_sequences() -> None:
    assert Engine(3).scheduler.rejection(asked(1, beam_width=4)) == "too_long"
    assert Engine(20).scheduler.rejection(asked(1, beam_width=4, max_tokens=22)) is None
    assert Engine(20).scheduler.rejection(asked(1, beam_width=9, max_tokens=22)) is None  # 4 blocks shared, 9 times 6
    assert Engine(20).scheduler.rejection(asked(1, beam_width=10, max_tokens=22)) == "too_long"
    engine = Engine(4, max_num_queued_reqs=4)
    engine.add(1, beam_width=4)
    assert engine.scheduler.rejection(asked(2, beam_width=4)) is None
    engine.add(2, beam_width=2)
    assert engine.scheduler.rejection(asked(3, beam_width=3)) == "overloaded"
    assert engine.scheduler.rejection(asked(3, beam_width=2)) is None


def test_candidates_that_make_no_sense_are_none() -> None:
    good = pack([5, 3]), array("f", [-1.0, -2.0]).tobytes()
    assert candidates_of(*good, [2]) == [[(5, -1.0), (3, -2.0)]]
    assert candidates_of(*good, [1, 1]) == [[(5, -1.0)], [(3, -2.0)]]
    for ids, logprobs, counts in (
        (good[0], good[1], [3]),
        (b"abc", good[1], [2]),
        (good[0], good[1][:4], [2]),
        (pack([5, 5]), good[1], [2]),
        (pack([5, -3]), good[1], [2]),
        (good[0], array("f", [-2.0, -1.0]).tobytes(), [2]),
        (good[0], array("f", [float("nan"), -1.0]).tobytes(), [2]),
    ):
        assert not any(candidates_of(ids, logprobs, counts)), (ids, logprobs)


# --- planted faults: each must be caught ------------------------------------------------------------------------------


def shares_what_is_written(self: KvCache, request: Request, parent: Request) -> bool:
    """The last block is shared too, though each beam goes on writing to it."""
    if not parent.blocks:
        return False
    request.blocks = parent.blocks[:]
    self.pool.share(request.blocks[parent.retired :])
    request.computed, request.retired, request.publish_at = parent.computed, parent.retired, parent.publish_at
    return True


fork = KvCache.fork


def copies_nothing(self: KvCache, request: Request, parent: Request) -> bool:
    forked = fork(self, request, parent)
    self._copies.clear()
    return forked


def holds_twice(self: KvCache, request: Request, parent: Request) -> bool:
    forked = fork(self, request, parent)
    if forked:
        self.pool.share(request.blocks[parent.retired :])
    return forked


def says_nothing(self: Rows, request: Request) -> None:
    """The row of a beam is taken for what it should be."""
    if request.row is None:
        self.give(request)


def goes_on(self: Groups, request: Request, token: int, following: object) -> bool:
    """A beam does not wait for the others."""
    over = hear(self, request, token, following)  # type: ignore[arg-type]
    request.limit += 1
    return over


def forgets(self: Groups, request: Request) -> None:
    """An answer is lost with the row."""
    if request.group is not None:
        request.group.answers.pop(request, None)
    self._waiting.push(request)


def ignores_penalty(self: Search, *given: Any) -> object:
    self.sampling = SamplingParams(**{name: getattr(self.sampling, name) for name in ("beam_width", "n", "stop_token_ids", "early_stopping")})  # fmt: skip
    return advance(self, *given)


hear, advance = Groups.hear, Search.advance
PLANTED = {
    "fork": (KvCache, [shares_what_is_written, copies_nothing, holds_twice]),
    "rewrite": (Rows, [says_nothing]),
    "hear": (Groups, [goes_on]),
    "requeue": (Groups, [forgets]),
    "advance": (Search, [ignores_penalty]),
}


def caught(seeds: int = 80) -> bool:
    for seed in range(seeds):
        run = Watched(seed, 1 + seed % 3)
        try:
            if run.play(losses=Losses(0.03 * (seed % 2))) != run.wanted:
                return True
        except (AssertionError, KeyError, IndexError):
            return True
    return False


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [(owner, name, fault) for name, (owner, faults) in PLANTED.items() for fault in faults],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, fault: object) -> None:
    monkeypatch.setattr(owner, name, fault)
    assert caught()


def test_nothing_is_caught_without_a_fault() -> None:
    assert not caught()
