"""What the metrics are told. The scheduler has no clock; times come in from the process's loop."""

from collections import Counter, OrderedDict

from ..common.messages import Output
from ..common.metrics import Metrics
from .request import Request
from .scheduler import Scheduler
from .step import Step

MAX_PEERS = 1024  # peers whose count of dropped frames is remembered; those that spoke last


class Recorder:
    """Writes one engine's `Metrics`. Times are seconds of one monotonic clock."""

    def __init__(self, model: str, *, caching: bool) -> None:
        self.metrics = Metrics(model)
        self._model = model
        self._caching = caching
        self._moved: Counter[str] = Counter()  # blocks, at the last look
        self._unpinned: Counter[str] = Counter()  # likewise
        self._bad_frames: OrderedDict[bytes, int] = OrderedDict()  # that a peer has reported

    def rejected(self, reason: str) -> None:
        self.metrics.rejections.labels(self._model, reason).inc()

    def dispatched(self, step: Step, now: float) -> None:
        metrics = self.metrics
        metrics.steps.inc()
        metrics.step_tokens.observe(step.num_tokens)
        metrics.preemptions.inc(step.num_preempted)
        for request in step.admitted:
            cached = request.num_cached or 0
            metrics.queue_time.observe(now - request.arrived_at)
            metrics.prompt_tokens.inc(request.num_prompt)
            metrics.prompt_tokens_cached.inc(cached)
            if self._caching:
                metrics.prefix_queries.inc(request.num_prompt)
                metrics.prefix_hits.inc(cached)

    def answered(self, news: list[tuple[Request, Output]], took_s: float, now: float) -> None:
        """`took_s`: from the step's dispatch to its result."""
        metrics = self.metrics
        metrics.step_time.observe(took_s)
        gaps: Counter[float] = Counter()  # rows that decode together share one gap
        num_tokens = 0
        for request, output in news:
            num_tokens += output.num_tokens
            if output.tokens:
                if output.first_index:
                    gaps[request.last_token_at] += 1
                else:
                    metrics.ttft.observe(now - request.arrived_at)
                request.last_token_at = now
            if output.finish is not None:
                self.ended(request, output.finish, now)
        for last, count in gaps.items():
            metrics.itl.observe(now - last, count)
        metrics.generation_tokens.inc(num_tokens)

    def ended(self, request: Request, reason: str, now: float) -> None:
        metrics = self.metrics
        metrics.success.labels(self._model, reason).inc()
        metrics.e2e.observe(now - request.arrived_at)
        metrics.request_prompt_tokens.observe(request.num_prompt)
        metrics.request_generation_tokens.observe(request.num_output)

    def aborted(self) -> None:
        """Counted, but its latency and length say nothing of the engine's."""
        self.metrics.success.labels(self._model, "abort").inc()

    def timed_out(self, request: Request) -> None:
        """Counted alone, as `aborted` is. `phase`: whether any of it was computed."""
        begun = request.num_cached is not None or request.num_output
        self.metrics.success.labels(self._model, "timeout").inc()
        self.metrics.timed_out.labels(self._model, "running" if begun else "waiting").inc()

    def peers(self, role: str, count: int) -> None:
        self.metrics.peers.labels(self._model, role).set(count)

    def bad_frames(self, wire: str, count: int) -> None:
        """Dropped here."""
        self.metrics.bad_frames.labels(self._model, wire, "scheduler").inc(count)

    def bad_frames_of(self, identity: bytes, wire: str, total: int) -> None:
        """Dropped at the other end, all told; one that counts from 0 again is a new one in its place."""
        before = self._bad_frames.pop(identity, 0)
        self._bad_frames[identity] = total
        if len(self._bad_frames) > MAX_PEERS:
            self._bad_frames.popitem(last=False)
        if new := max(0, total - before if total >= before else total):
            self.metrics.bad_frames.labels(self._model, wire, "peer").inc(new)

    def group_lost(self, cause: str) -> None:
        self.metrics.group_losses.labels(self._model, cause).inc()

    def resumed(self, count: int) -> None:
        self.metrics.resumed.inc(count)

    def quarantined(self, count: int) -> None:
        self.metrics.quarantined.inc(count)

    def recovered(self, took_s: float) -> None:
        self.metrics.recovery_time.observe(took_s)

    def levels(self, scheduler: Scheduler | None) -> None:
        """Gauges are set when somebody looks, and there is something to see."""
        if scheduler is None:
            return
        pool, metrics = scheduler.kv.pool, self.metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(len(scheduler.waiting))
        metrics.blocks_total.set(pool.num_blocks)
        metrics.blocks_free.set(pool.num_free)
        metrics.step_budget.set(scheduler.budget)
        for how, count in (scheduler.kv.moved - self._moved).items():
            metrics.blocks_moved.labels(self._model, how).inc(count)
        self._moved = scheduler.kv.moved.copy()
        metrics.blocks_pinned.set(len(pool.pinned))
        for why, count in (scheduler.kv.pins.given_up - self._unpinned).items():
            metrics.blocks_unpinned.labels(self._model, why).inc(count)
        self._unpinned = scheduler.kv.pins.given_up.copy()
        metrics.kv_usage.set(1 - pool.num_free / pool.num_blocks)
