"""Who computes what in the next step. Pure: no clock, no socket, no tensor, and the same answers for the same calls.

    while len(scheduler.dispatched) < depth and (step := scheduler.schedule()):
        send(step.plan)
    ended = scheduler.update(receive())

is the whole engine at any depth. Since plans are replayed in order, a block or row is free to be planned again the
moment it is released, whatever is still in flight.

When the workers are lost, `blame` and `regroup` put everything back to where the next ones can begin. What may be the
cause (`suspects`) is computed alone: in steps of its own, with nothing else in flight. A suspect waits in the same
order as all others, and takes every second step at most; so nobody starves.
"""

from bisect import insort
from collections import deque

from ..common.config import CacheConfig, SchedulerConfig
from ..common.messages import Admitted, Output, StepPlan, StepResult, pack, unpack
from .kv_cache import KvCache
from .queue import WaitingQueue
from .request import Request
from .step import Draft, Step, tokens_of
from .stops import finish_reason
from .suspects import Suspects, convicted, verdict

NO_TOKEN = "the worker returned no token for this sequence"
QUEUED_PER_SEQ = 16  # waiting requests for each row, unless configured


class Scheduler:
    """Requests that were `add`ed wait, run on a row, and end in an `Output` with a finish reason or in `abort`."""

    def __init__(
        self, config: SchedulerConfig, cache: CacheConfig, num_blocks: int, max_model_len: int, *, epoch: int = 1
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.epoch = epoch
        self.budget = config.max_num_batched_tokens  # tokens of a step
        self.kv = KvCache(num_blocks, cache.block_size, caching=cache.enable_prefix_caching)
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # by rank
        self.dispatched: deque[Step] = deque()  # sent and not answered, oldest first
        self._rows = list(range(config.max_num_seqs))[::-1]  # free ones; the lowest is next
        self._released: list[int] = []  # rows that the worker has not been told of
        self.suspects = Suspects()
        self._others_turn = False  # the last step was a suspect's
        self._num_preempted = 0
        self._num_added = 0
        self._step = 0

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.dispatched)

    def rejection(self, request: Request) -> str | None:
        """Why the request cannot be added: "too_long" (never), "overloaded" (not now), or None."""
        limit = min(request.limit, self.max_model_len)
        # The last token is never fed back, so it needs no KV.
        fits = request.num_prompt < limit and len(request.tokens) <= limit
        if not fits or self.kv.blocks_for(limit - 1) > self.kv.num_blocks:
            return "too_long"
        full = len(self.running) + len(self.waiting) >= self.config.max_num_seqs + num_queueable(self.config)
        if full and not (request.num_output or request.strikes):  # what was accepted before is accepted again
            return "overloaded"
        return None

    def add(self, request: Request) -> Output | None:
        """Queue a request that has no `rejection`. Returns its end when there is nothing left to do, or to try."""
        request.limit = min(request.limit, self.max_model_len)
        request.arrival = self._num_added
        self._num_added += 1
        if request.num_output and (reason := finish_reason(request)):
            request.finish = reason
            return Output(request.id, request.num_output, [], reason)
        self.waiting.push(request)
        self.suspects.note(request)
        return self._fail(request, verdict(request)) if convicted(request) else None

    def abort(self, request: Request) -> None:
        """Forget a request at once, with its row and blocks; no effect when it has ended."""
        if request.finish is None:
            self._end(request, "abort")

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to do before a result comes in."""
        if self.dispatched and self.dispatched[-1].alone:
            return None
        self._make_room()
        suspect = self._next_suspect() if self.suspects else None
        if suspect is None or self._others_turn:
            step = self._together()
            return step if step or not suspect else self._alone(suspect)
        return None if self.dispatched else self._alone(suspect) or self._together()

    def update(self, result: StepResult) -> list[tuple[Request, Output]]:
        """Take the result of the oldest step in flight. Says what came of every request that it is news for.

        A row without a token, and every row of a result that does not fit its plan, ends with "error".
        """
        step = self.dispatched.popleft()
        assert result.step == step.plan.step, (result.step, step.plan.step)
        news = []
        for request, token in zip(step.sampled, tokens_of(result, len(step.sampled)), strict=True):
            request.inflight -= 1
            if request.finish is not None:  # ended while this was under way
                continue
            if token is None:
                news.append((request, self._fail(request, NO_TOKEN)))
                continue
            request.tokens.append(token)
            if request.strikes:
                self.suspects.acquit(request)
            reason = finish_reason(request)
            if reason is not None:
                self._end(request, reason)
            news.append((request, Output(request.id, request.num_output - 1, [token], reason, request.num_cached or 0)))
        return news

    def fault(self, step_number: int, row: int, why: str) -> tuple[Request, Output] | None:
        """End the request that had `row` in a step in flight; None when that names none that goes on."""
        for step in self.dispatched:
            if step.plan.step == step_number:
                for planned_row, request in zip(unpack(step.plan.rows), step.requests, strict=True):
                    if planned_row == row and request.finish is None:
                        return request, self._fail(request, why)
        return None

    def shrink(self) -> bool:
        """After a step was too large for the device: plan smaller ones. False when they cannot be smaller."""
        largest = max((step.num_tokens for step in self.dispatched), default=0)
        budget = max(min(self.budget, largest) // 2, self.kv.block_size)
        if budget >= largest:
            return False
        self.budget = budget
        return True

    def blame(self) -> list[Request]:
        """The workers were lost: a strike for every request in flight. Returns those that are suspects from now on."""
        inflight = {request: None for step in self.dispatched for request in step.requests if request.finish is None}
        return self.suspects.blame(inflight)

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        """Begin anew with workers that hold nothing. Who ran waits again, in the order there was, with its tokens.

        What was in flight is computed again; a late result of it must not be handed to `update`. Says who ended: those
        that had one strike too many.
        """
        for step in self.dispatched:
            for request in step.sampled:
                request.inflight = 0
        for request in self.running:
            request.row, request.blocks, request.computed = None, [], 0
            self.waiting.push(request)
        self.running.clear()
        self.dispatched.clear()
        self.kv.lose()
        self._rows = list(range(self.config.max_num_seqs))[::-1]
        self._released = []
        self._others_turn = False
        self.epoch, self._step = epoch, 0
        return [(request, self._fail(request, verdict(request))) for request in self.suspects.convicts()]

    def check(self, blocks: range | None = None) -> None:
        """Raises AssertionError when books and holdings differ: a leak, or a block or row given twice.

        `blocks` are those of the pool that are looked at, all by default.
        """
        self.kv.check(self.running, blocks)
        rows = [*self._rows, *(request.row for request in self.running)]
        assert sorted(rows, key=lambda row: -1 if row is None else row) == list(range(self.config.max_num_seqs)), rows
        assert self.running == sorted(self.running, key=lambda request: request.rank), "running is out of order"
        for request in self.waiting:
            assert not request.blocks and request.row is None and not request.computed, request
        suspects = [request for request in (*self.running, *self.waiting) if request.suspect]
        assert len(suspects) == len(self.suspects), "a suspect that is not here, or not known"
        assert all(request in self.suspects for request in suspects), "a suspect is not known"
        assert len(self.dispatched) < 2 or not any(step.alone for step in self.dispatched), "a suspect has company"

    # --- planning -----------------------------------------------------------------------------------------------------

    def _together(self) -> Step | None:
        """A step of all that run and are no suspects, and of those that wait and fit, up to the first suspect."""
        draft = Draft(self.budget)
        index = 0
        while index < len(self.running) and draft.budget:  # `_grow` takes requests off the end
            if not self.running[index].suspect:
                self._plan(draft, self.running[index])
            index += 1
        while draft.budget and self._rows and (head := self.waiting.peek()) and not head.inflight and not head.suspect:
            shared = self._fitting(head)
            if shared is None:
                break
            self._admit(draft, self.waiting.pop(), shared)
        assert draft.requests or not draft.admitted, "a row was given that the worker would not hear of"
        return self._dispatch(draft) if draft.requests else None

    def _alone(self, suspect: Request) -> Step | None:
        """A step of this suspect. None when it has to wait for blocks."""
        draft = Draft(self.budget)
        if suspect.row is not None:
            self._plan(draft, suspect)
        elif (shared := self._fitting(suspect)) is not None:
            self._admit(draft, self.waiting.pop(), shared)
        return self._dispatch(draft) if draft.requests else None

    def _next_suspect(self) -> Request | None:
        """The one that runs; else the one whose turn it is to be admitted, if there is room."""
        if running := self.suspects.running():
            return running
        head = self.waiting.peek()
        return head if head and head.suspect and self._rows and self._fitting(head) is not None else None

    def _plan(self, draft: Draft, request: Request) -> None:
        """Add a running request to the draft, as far as the budget goes; it may have to sit this step out."""
        known = len(request.tokens)
        target = known + request.inflight
        if target >= request.limit:  # all samples it may have are under way
            return
        count = min(target - request.computed, draft.budget)
        computed = request.computed + count
        if computed > len(request.blocks) * self.kv.block_size and not self._grow(draft, request, computed):
            return
        if computed == target:
            request.inflight += 1
            draft.sampled.append(request)
            draft.samples.append(1)
        else:
            draft.samples.append(0)
        request.computed = computed
        draft.requests.append(request)
        draft.counts.append(count)
        draft.budget -= count
        if known >= request.publish_at:
            draft.ripe.append(request)

    def _grow(self, draft: Draft, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens`, at the cost of those behind the request if need be.

        False when there is nobody behind it: it keeps what it has and waits, since its blocks would only go to those
        before it, who will take them by preemption when they must.
        """
        count = self.kv.blocks_for(num_tokens) - len(request.blocks)
        while self.kv.num_free < count:
            if self.running[-1] is request:
                return False
            self._preempt(self.running[-1])
        assert request.row is not None
        draft.new_blocks.append((request.row, self.kv.grow(request, count)))
        return True

    def _make_room(self) -> None:
        """Preempt for a waiting request of strictly better priority that lacks a row or blocks, if that helps it."""
        head = self.waiting.peek()
        if head is None or head.inflight or not self.running or self.running[-1].priority <= head.priority:
            return
        worse = [request for request in self.running if request.priority > head.priority]
        staying = self.running[: len(self.running) - len(worse)]
        needed = self.kv.blocks_for(len(head.tokens)) + _reserve(len(staying))
        if self.kv.num_free + self.kv.gain(worse, staying) < needed:
            return
        while self.running and self.running[-1].priority > head.priority:
            if self._rows and self._fitting(head) is not None:
                return
            self._preempt(self.running[-1])

    def _fitting(self, request: Request) -> list[int] | None:
        """What `KvCache.find` has for a waiting request, if there is room beside those that run."""
        return self.kv.find(request, _reserve(len(self.running)))

    def _admit(self, draft: Draft, request: Request, shared: list[int]) -> None:
        """Give a waiting request a row and blocks for all it knows, and plan its first chunk."""
        self.kv.admit(request, shared)
        request.row = self._rows.pop()
        if request.num_cached is None:
            request.num_cached = min(request.computed, request.num_prompt)
            draft.first.append(request)
        tokens = request.tokens.tobytes()
        draft.admitted.append(Admitted(request.row, tokens, request.num_prompt, request.sampling, request.blocks[:]))
        insort(self.running, request, key=_rank)
        self._plan(draft, request)

    def _dispatch(self, draft: Draft) -> Step:
        for request in draft.ripe:  # only now: nothing in this plan may read what this plan writes
            self.kv.publish(request)
        self._step += 1
        plan = StepPlan(
            epoch=self.epoch,
            step=self._step,
            released=self._released,
            admitted=draft.admitted,
            new_blocks=draft.new_blocks,
            copies=b"",
            rows=pack([request.row for request in draft.requests]),  # type: ignore[misc]  # those planned have rows
            starts=pack([request.computed - n for request, n in zip(draft.requests, draft.counts, strict=True)]),
            counts=pack(draft.counts),
            samples=bytes(draft.samples),
        )
        num_tokens = self.budget - draft.budget
        step = Step(plan, draft.requests, draft.sampled, num_tokens, draft.first, self._num_preempted)
        self._released, self._num_preempted = [], 0
        self._others_turn = step.alone
        self.dispatched.append(step)
        return step

    # --- ending -------------------------------------------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Back to the queue, to be computed again. What the cache still has of it then need not be."""
        self._leave_row(request)
        self.waiting.push(request)
        self._num_preempted += 1

    def _fail(self, request: Request, why: str) -> Output:
        self.kv.forget(request)
        self._end(request, "error")
        return Output(request.id, request.num_output, [], "error", request.num_cached or 0, why)

    def _end(self, request: Request, reason: str) -> None:
        request.finish = reason
        self.suspects.drop(request)
        if request.row is None:
            self.waiting.remove(request)
        else:
            self._leave_row(request)

    def _leave_row(self, request: Request) -> None:
        self.kv.leave(request)
        assert request.row is not None
        self._rows.append(request.row)
        self._released.append(request.row)
        request.row = None
        self.running.remove(request)


def num_queueable(config: SchedulerConfig) -> int:
    """Requests that may wait besides those that could run."""
    return config.max_num_queued_reqs or QUEUED_PER_SEQ * config.max_num_seqs


def _reserve(num_running: int) -> int:
    """Free blocks that an admission leaves to `num_running` requests to grow into.

    256 requests over 1,000 blocks: a quarter of a block each halves preemptions and computes 10 % fewer tokens, for
    0.6 % more steps; a whole block each costs 3 % more steps.
    """
    return num_running // 4


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
