"""Any run at any depth gives every request the output that its definition says, and leaves nothing behind."""

from dataclasses import fields

import pytest

from quire.common.config import CacheConfig
from quire.common.messages import pack
from quire.scheduler import prefix_cache
from quire.scheduler.blocks import BlockPool
from quire.scheduler.kv_cache import Hit
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

from .simulation import Run, Totals, expected

SEEDS = 800


def _add(total: Totals, totals: Totals) -> None:
    for item in fields(Totals):
        setattr(total, item.name, getattr(total, item.name) + getattr(totals, item.name))


def test_every_depth_gives_the_same_right_tokens() -> None:
    total = Totals()
    for seed in range(SEEDS):
        wanted = {request.id: expected(request) for request in Run(seed, 1).todo}
        for depth in (1, 2, 3):
            run = Run(seed, depth)
            assert run.play() == wanted, (seed, depth)
            _add(total, run.totals)
    assert total.preempted > 100 and total.cached > 1000, total


def test_aborts_deadlines_and_resubmissions_disturb_nobody() -> None:
    total = Totals()
    for seed in range(SEEDS):
        wanted = {request.id: expected(request) for request in Run(seed, 1).todo}
        for depth in (1, 2, 3):
            run = Run(seed, depth)
            for id, outcome in run.play(aborts=seed % 2 == 0, expiries=seed % 2 == 1, restarts=seed % 3 == 0).items():
                if outcome.finish in ("abort", "timeout"):
                    assert outcome.tokens == wanted[id].tokens[: len(outcome.tokens)], (seed, depth, id)
                else:
                    assert outcome == wanted[id], (seed, depth, id)
            _add(total, run.totals)
    assert total.aborted > 100 and total.expired > 100 and total.resubmitted > 100, total


def test_a_faulty_row_ends_alone() -> None:
    total = Totals()
    for seed in range(SEEDS):
        wanted = {request.id: expected(request) for request in Run(seed, 1).todo}
        for depth in (1, 2, 3):
            run = Run(seed, depth)
            for id, outcome in run.play(faults=True).items():
                if outcome.finish == "error":
                    assert outcome.tokens == wanted[id].tokens[: len(outcome.tokens)], (seed, depth, id)
                else:
                    assert outcome == wanted[id], (seed, depth, id)
            _add(total, run.totals)
    assert total.faulted > 100, total


# --- planted faults: each must be caught ------------------------------------------------------------------------------


class ForgetsInflight(Scheduler):
    """A preempted request may run again while its token is under way, which then comes twice."""

    def _preempt(self, request: Request) -> None:
        super()._preempt(request)
        request.inflight = 0


class PublishesEarly(Scheduler):
    """Blocks are shared before the plan that writes them is out."""

    def _admit(self, draft, request, shared) -> None:  # type: ignore[no-untyped-def]
        super()._admit(draft, request, shared)
        computed, request.computed = request.computed, len(request.tokens)
        self.kv.publish(request)
        request.computed = computed


class PublishesUnwritten(Scheduler):
    """Blocks are shared as soon as their tokens are known, computed or not."""

    def _dispatch(self, draft):  # type: ignore[no-untyped-def]
        for request in draft.ripe:
            computed, request.computed = request.computed, len(request.tokens)
            self.kv.publish(request)
            request.computed = computed
        return super()._dispatch(draft)


class KeepsRowQuiet(Scheduler):
    """The worker is not told of a released row."""

    def _leave_row(self, request: Request) -> None:
        super()._leave_row(request)
        self.rows._released.pop()


class LeaksTail(Scheduler):
    def _leave_row(self, request: Request) -> None:
        request.blocks.pop()
        super()._leave_row(request)


class KeepsComputed(Scheduler):
    """A preempted request goes on where it was, without its KV."""

    def _admit(self, draft, request, shared) -> None:  # type: ignore[no-untyped-def]
        lost = request.num_cached
        super()._admit(draft, request, shared)
        if lost is not None and request.computed < len(request.tokens) + request.inflight - 1:
            request.computed += 1


class SharesWholePrompt(Scheduler):
    """A hit may cover all tokens, so that nothing is left to compute the next one from."""

    def _fitting(self, request: Request) -> Hit | None:
        request.tokens.append(0)
        try:
            return super()._fitting(request)
        finally:
            request.tokens.pop()
            del request.digests[len(request.tokens) // self.kv.block_size :]


class SamplesTooOften(Scheduler):
    def add(self, request: Request):  # type: ignore[no-untyped-def]
        output = super().add(request)
        request.limit += 1
        return output


class AppendsAfterEnd(Scheduler):
    """A token that comes back for an ended request is reported."""

    def update(self, result):  # type: ignore[no-untyped-def]
        ended = [r for r in self.dispatched[0].sampled if r.finish is not None]
        news = super().update(result)
        return news + [(r, _news(r)) for r in ended]


def _news(request: Request):  # type: ignore[no-untyped-def]
    from quire.common.messages import Output

    return Output(request.id, request.num_output, [0])


class GrowsLate(Scheduler):
    """The worker is not told of new blocks."""

    def _grow(self, draft, request, num_tokens) -> bool:  # type: ignore[no-untyped-def]
        grown = super()._grow(draft, request, num_tokens)
        if grown:
            draft.new_blocks.pop()
        return grown


class OverBudget(Scheduler):
    def _admit(self, draft, request, shared) -> None:  # type: ignore[no-untyped-def]
        draft.budget += 1
        super()._admit(draft, request, shared)


class KeepsContent(BlockPool):
    """A block that is handed out again can still be found by what it held."""

    def retract(self, block: int) -> None:
        pass


class HandsOutNull(BlockPool):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        del self._free[1]
        self._free[0] = None


class FreesOnFirstRelease(BlockPool):
    """A shared block is free when the first of its holders leaves."""

    def release(self, blocks) -> None:  # type: ignore[no-untyped-def]
        for block in blocks:
            self._refs[block] = 1
        super().release(blocks)


def _with_pool(pool: type[BlockPool]) -> type[Scheduler]:
    class Faulty(Scheduler):
        def __init__(self, config, cache: CacheConfig, num_blocks: int, max_model_len: int, **_: int) -> None:  # type: ignore[no-untyped-def]
            super().__init__(config, cache, num_blocks, max_model_len)
            self.kv.pool = pool(num_blocks)

        def check(self) -> None:
            """The books are cooked too: the device alone is to find out."""

    Faulty.__name__ = pool.__name__
    return Faulty


def _caught(make: type[Scheduler], seeds: int = 60) -> int:
    caught = 0
    for seed in range(seeds):
        wanted = {request.id: expected(request) for request in Run(seed, 1).todo}
        for depth in (1, 2):
            try:
                caught += Run(seed, depth, make=make).play() != wanted
            except (AssertionError, KeyError, IndexError):
                caught += 1
    return caught


@pytest.mark.parametrize(
    "make",
    [
        ForgetsInflight,
        PublishesEarly,
        PublishesUnwritten,
        KeepsRowQuiet,
        LeaksTail,
        KeepsComputed,
        SharesWholePrompt,
        SamplesTooOften,
        AppendsAfterEnd,
        GrowsLate,
        OverBudget,
        _with_pool(KeepsContent),
        _with_pool(HandsOutNull),
        _with_pool(FreesOnFirstRelease),
    ],
    ids=lambda make: make.__name__,
)
def test_planted_fault_is_caught(make: type[Scheduler]) -> None:
    assert _caught(make) > 0


def test_a_name_that_forgets_its_parent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def extend(request: Request, count: int, block_size: int) -> None:
        for index in range(len(request.digests), count):
            tokens = request.tokens[index * block_size : (index + 1) * block_size].tobytes()
            request.digests.append(pack([index]) + tokens)

    monkeypatch.setattr(prefix_cache, "extend", extend)
    assert _caught(Scheduler, 150) > 0


def test_nothing_is_caught_without_a_fault() -> None:
    assert _caught(Scheduler) == 0
