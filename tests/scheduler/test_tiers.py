"""What the device has no room for: saved, found and brought back, or computed again; no token is another for it."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.scheduler.blocks import BlockPool
from quire.scheduler.kv_cache import KvCache
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.tiers import Copies, Tier, Worth, Written

from .simulation import Losses, Outcome, Run, expected

SEEDS = 300


def runs(seed: int, **options: object) -> Run:
    return Run(seed, 1 + seed % 3, **options)  # type: ignore[arg-type]


def test_swapping_changes_no_token() -> None:
    moved: Counter[str] = Counter()
    for seed in range(SEEDS):
        run = runs(seed)
        wanted = {request.id: expected(request) for request in run.todo}
        assert run.play(losses=Losses(0.03 * (seed % 2))) == wanted, seed
        moved += run.scheduler.kv.moved
    assert moved["saved"] > 2000 and moved["restored"] > 200 and moved["recomputed"] > 100, moved


def test_saving_goes_on_while_it_pays_and_is_tried_again() -> None:
    """Computing a block takes ten copies: it pays while one in nine comes back."""
    for share, pays in ((0.5, True), (0.2, True), (0.08, False), (0.0, False)):
        worth, saved, later = Worth(10), 0.0, []
        for _ in range(4000):
            later.append(worth.pays(10.0, 1.0))
            if later[-1]:
                worth.saved()
                saved += share
                worth.restored(int(saved))
                saved %= 1.0
        assert (sum(later[2000:]) > 1500) is pays, (share, sum(later[2000:]))
        assert sum(later[2000:]) >= 200, "never tried again"
        assert worth.pays(None, 1.0)


def names(count: int) -> list[tuple[bytes, bytes]]:
    return [(bytes([i]), bytes([i]) * 4) for i in range(count)]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.lists(st.integers(0, 12), max_size=60))
def test_a_tier_keeps_what_was_used_last(num_host: int, num_disk: int, saves: list[int]) -> None:
    """Of distinct contents that are saved one after the other, the last are in the first tier, those before behind it."""
    disk = Tier(BlockPool(num_disk), 100 + num_host, log=[])
    tier = Tier(BlockPool(num_host), 100, behind=disk)
    held: dict[int, object] = {}
    recent: list[int] = []
    for number, what in enumerate(saves):
        copies: Copies = []
        source = 1 + number % 100
        held[source] = what
        tier.save(source, *names(13)[what], copies)
        for origin, target in copies:
            held[target] = held[origin]
        recent = [*(known for known in recent if known != what), what]
        for expected_what in recent[len(recent) - num_host :] if num_host else []:
            block = tier.find(*names(13)[expected_what])
            assert block is not None and 100 < block <= 100 + num_host and held[block] == expected_what
        for name_of, name in enumerate(names(13)):
            if (block := tier.find(*name)) is not None:
                assert held[block] == name_of
        tier.pool.check(())
        disk.pool.check(())


# --- planted faults ---------------------------------------------------------------------------------------------------


class SavesTooLate(KvCache):
    """Copies are made in another order than they were decided in."""

    def take_copies(self) -> bytes:
        self._copies.reverse()
        return super().take_copies()


class TrustsTheDoubtful(KvCache):
    """What may not have been written when the workers died is found."""

    def lose(self, unsure: object = ()) -> None:
        super().lose()


class KeepsHost(KvCache):
    """What was in the memory of workers that died is found."""

    def lose(self, unsure: object = ()) -> None:
        pool = self.host.pool if self.host else None
        super().lose(unsure)  # type: ignore[arg-type]
        if self.host and pool:
            self.host.pool = pool


class HoldsNothing(KvCache):
    """What is to be restored may be displaced by what is saved for it."""

    def _hold(self, blocks: list[int], saved: list[int]) -> None:
        super()._hold(blocks, [])
        self._unheld = saved

    def admit(self, request: Request, hit: object) -> None:
        tier, self.saved = self.saved, _Deaf(self.saved) if self.saved else None  # type: ignore[assignment]
        try:
            super().admit(request, hit)  # type: ignore[arg-type]
        finally:
            self.saved = tier


class _Deaf:
    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    def __getattr__(self, name: str) -> object:
        return getattr(self._tier, name)

    def release(self, blocks: object) -> None:
        pass


class RestoresTheNext(KvCache):
    def _restore(self, saved: int, block: int) -> int:
        other = saved + 1 if saved < self.num_blocks + self.num_host_blocks else saved
        return super()._restore(other, block)


class SharesPrivate(KvCache):
    """Without prefix caching, others find what was swapped out for one request."""

    def _match(self, request: Request) -> list[int]:
        self.caching, caching = True, self.caching
        try:
            return super()._match(request)
        finally:
            self.caching = caching


def with_cache(cache: type[KvCache]) -> type[Scheduler]:
    class Faulty(Scheduler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            kv = self.kv
            self.kv = cache(
                kv.num_blocks,
                kv.block_size,
                caching=kv.caching,
                num_host_blocks=kv.num_host_blocks,
                num_disk_blocks=kv.disk.pool.num_blocks if kv.disk else 0,
                window=kv.window,
            )
            self.kv.prefill_s = kv.prefill_s

    return Faulty


@pytest.mark.parametrize(
    "cache",
    [SavesTooLate, TrustsTheDoubtful, KeepsHost, HoldsNothing, RestoresTheNext, SharesPrivate],
    ids=lambda cache: cache.__name__,
)
def test_planted_fault_is_caught(cache: type[KvCache]) -> None:
    caught = 0
    for seed in range(SEEDS):
        run = runs(seed, make=with_cache(cache))
        wanted = {request.id: expected(request) for request in run.todo}
        shared = run.scheduler.kv.caching
        try:
            outcomes = run.play(losses=Losses(0.05), aborts=seed % 2 > 0)
            wrong = any(
                outcome not in (wanted[id], Outcome(outcome.tokens, "abort")) for id, outcome in outcomes.items()
            )
            caught += wrong or (not shared and run.totals.cached > 0)
        except (AssertionError, KeyError, IndexError):
            caught += 1
        if caught:
            return
    raise AssertionError("nothing was caught")


def test_nothing_is_caught_without_a_fault() -> None:
    for seed in range(100):
        run = runs(seed, make=with_cache(KvCache))
        wanted = {request.id: expected(request) for request in run.todo}
        assert run.play(losses=Losses(0.05)) == wanted
        assert run.scheduler.kv.caching or not run.totals.cached


def test_what_the_disk_held_is_found_by_the_next_engine() -> None:
    """The same requests again, after an engine that knew nothing: their KV is read, whatever of it was kept."""
    rng = random.Random(1)
    reads = 0
    for seed in range(120):
        first = Run(seed, 2)
        disk = first.scheduler.kv.disk
        if disk is None:
            continue
        wanted = {request.id: expected(request) for request in first.todo}
        kept: dict[int, Written] = {}
        plan = first.scheduler._dispatch

        def dispatch(draft: object, plan: object = plan, kept: dict[int, Written] = kept) -> object:
            step = plan(draft)  # type: ignore[operator]
            for written in step.written:
                kept.pop(written.block, None)
                if written.digest:
                    kept[written.block] = written
            return step

        first.scheduler._dispatch = dispatch  # type: ignore[method-assign, assignment]
        assert first.play() == wanted
        second = Run(seed, rng.choice((1, 2)))
        second.scheduler.kv.recall(kept.values())
        second.device.kv = {b: kv for b, kv in first.device.kv.items() if b > first.device.num_in_memory}
        assert second.play() == wanted
        reads += second.scheduler.kv.moved["restored"] > 0
    assert reads > 10
