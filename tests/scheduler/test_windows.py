"""Blocks that no query of a sliding window sees any more are free, and nothing that is seen is."""

from array import array

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.sampling import SamplingParams
from quire.scheduler.kv_cache import KvCache
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

from .simulation import MAX_MODEL_LEN, Run, expected
from .test_tiers import with_cache

BLOCK_SIZE, WINDOW = 2, 6


def test_a_long_sequence_holds_a_window() -> None:
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=4)
    engine = Scheduler(config, CacheConfig(block_size=BLOCK_SIZE), MAX_MODEL_LEN, MAX_MODEL_LEN, window=WINDOW)
    request = Request(
        1, array("i", [1, 2, 3]), 3, SamplingParams(max_tokens=MAX_MODEL_LEN - 3, seed=0, ignore_eos=True)
    )
    assert engine.add(request) is None
    while request.finish is None:
        step = engine.schedule()
        assert step is not None
        held = sum(block > 0 for block in request.blocks)
        assert held <= engine.kv.blocks_for(WINDOW) + 1, "blocks that nobody sees are held"
        engine.update(_answer(step.plan))
        engine.check()
    assert engine.kv.num_free == MAX_MODEL_LEN


def _answer(plan):  # type: ignore[no-untyped-def]
    from quire.common.messages import StepResult, pack

    return StepResult(plan.epoch, plan.step, pack([1] * sum(plan.samples)), pack([5] * sum(plan.samples)))


class RetiresTooEarly(KvCache):
    def retire(self, request: Request) -> None:
        self.window -= 1
        try:
            super().retire(request)
        finally:
            self.window += 1


class RetiresWhatIsNotShared(KvCache):
    """Blocks are published after they were given back."""

    def retire(self, request: Request) -> None:
        caching, self.caching = self.caching, False
        saved, self.saved = self.saved, None
        try:
            super().retire(request)
        finally:
            self.caching, self.saved = caching, saved


def caught(cache: type[KvCache]) -> int:
    count = 0
    for seed in range(200):
        run = Run(seed, 1 + seed % 3, make=with_cache(cache))
        wanted = {request.id: expected(request) for request in run.todo}
        try:
            count += run.play() != wanted
        except (AssertionError, KeyError, IndexError):
            count += 1
    return count


def test_planted_faults_are_caught() -> None:
    assert caught(RetiresTooEarly) > 0
    assert caught(RetiresWhatIsNotShared) > 0
    assert caught(KvCache) == 0
