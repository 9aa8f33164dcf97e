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

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from math import inf
from operator import attrgetter

from ..common.config import CacheConfig, SchedulerConfig
from ..common.messages import Hypothesis, Output, StepResult
from .fairness import victim
from .groups import Groups, begin, known, members_of
from .kv_cache import Hit, KvCache
from .limits import MOST_PASSED, OPEN_PROMPTS, fits, num_places, reserve, within_part
from .pace import Pace
from .queue import WaitingQueue
from .request import Request
from .rows import Rows
from .step import Draft, Step, admission, best_of, tokens_of, with_logprob
from .stops import finish_reason
from .suspects import Suspects, convicted, verdict

NO_TOKEN = "the worker returned no token for this sequence"


class Scheduler:
    """Requests that were `add`ed wait, run on a row, and end in an `Output` with a finish reason or in `abort`."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        num_blocks: int,
        max_model_len: int,
        *,
        num_host_blocks: int = 0,
        num_disk_blocks: int = 0,
        window: int = 0,
        epoch: int = 1,
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self.epoch = epoch
        self.budget = config.max_num_batched_tokens  # tokens of a step
        self.kv = KvCache(
            num_blocks,
            cache.block_size,
            caching=cache.enable_prefix_caching,
            num_host_blocks=num_host_blocks,
            num_disk_blocks=num_disk_blocks,
            window=window,
            max_pinned=cache.max_pinned,
        )
        self.pace = Pace(config.target_itl / 1e3)
        self.kv.prefill_s = self.pace.prefill_s
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # by rank
        self.dispatched: deque[Step] = deque()  # sent and not answered, oldest first
        self.rows = Rows(config.max_num_seqs)
        self.suspects = Suspects()
        self.groups = Groups(self.kv, self.rows, self.waiting, self.suspects, self.running)
        self._others_turn = False  # the last step was a suspect's
        self._num_preempted = self._num_added = self._num_admitted = self._step = 0

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.dispatched)

    def rejection(self, request: Request) -> str | None:
        """Why the request cannot be added: "too_long" (never), "overloaded" (not now), or None."""
        limit = min(request.limit, self.max_model_len)
        if not fits(request, limit, self.config, self.kv.num_blocks, self.kv.block_size):
            return "too_long"
        if request.num_output or request.strikes:  # what was accepted before is accepted again
            return None
        wanted = request.sampling.num_sequences
        num_requests = len(self.running) + len(self.waiting) + len(self.groups.parked) + wanted
        if num_requests > num_places(self.config):
            held, num_tenants = self.waiting.part_of(request.tenant)
            if not within_part(held + wanted, num_requests, num_tenants, self.config):
                return "overloaded"
        return None

    def add(self, request: Request) -> Output | None:
        """Queue a request that has no `rejection`. Returns its end when there is nothing left to do, or to try."""
        request.limit = min(request.limit, self.max_model_len)
        members = begin(request, self._num_added)
        self._num_added += len(members)
        if request.num_output and (reason := finish_reason(request)):
            request.finish = reason
            return Output(request.id, request.num_output, [], reason)
        self.groups.enter(members)
        return self._fail(request, verdict(request)) if convicted(request) else None

    def abort(self, request: Request) -> None:
        """Forget a request at once, with its row and blocks; no effect when it has ended."""
        if request.finish is None:
            self._end(request, "abort")

    def expire(self, request: Request, why: str) -> Output:
        """End a request that waits or runs, since its time is over."""
        return self._end(request, "timeout", why)

    def unpin(self, ids: Sequence[int], why: str) -> None:
        """Give up these of `KvCache.pins`."""
        self.kv.pins.drop(ids, why)

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to do before a result comes in."""
        if self.dispatched and self.dispatched[-1].alone:
            return None
        while (step := self._next_step()) is None and not self.dispatched and (idler := self.groups.last_held()):
            self._preempt(idler)
        return step

    def update(self, result: StepResult) -> list[tuple[Request, Output]]:
        """Take the result of the oldest step in flight. Says what came of every request that it is news for.

        A row without a token, and every row of a result that does not fit its plan, ends with "error".
        """
        step = self.dispatched.popleft()
        assert result.step == step.plan.step, (result.step, step.plan.step)
        if result.took_us > 0 and not step.plan.copies:  # the model knows nothing of copies
            self.pace.learn(step.load, result.took_us / 1e6)
        news = []
        best = best_of(result, step.sampled) if result.best_ids else {}
        for request, token in zip(step.sampled, tokens_of(result, len(step.sampled)), strict=True):
            request.inflight -= 1
            if request.finish is not None:  # ended while this was under way
                continue
            if token is None or (request.num_candidates and not best.get(request)):
                news.append((known(request), self._fail(known(request), NO_TOKEN)))
                continue
            request.account.level += request.account.output_cost
            if request.strikes:
                self.suspects.acquit(request)
            if (group := request.group) is not None:
                if self.groups.hear(request, token, best[request]):
                    found = group.search.best
                    news.append((known(request), self._end(known(request), found[0].finish, best=found)))
                continue
            request.tokens.append(token)
            if (reason := finish_reason(request)) is not None:
                self._end(request, reason)
            output = Output(request.id, request.num_output - 1, [token], reason, request.num_cached or 0)
            news.append((request, with_logprob(output, best[request]) if request.num_candidates else output))
        return news

    def fault(self, step_number: int, row: int, why: str) -> tuple[Request, Output] | None:
        """End the request that had `row` in a step in flight; None when that names none that goes on."""
        step = next((step for step in self.dispatched if step.plan.step == step_number), None)
        request = step.request_of(row) if step else None
        return (known(request), self._fail(known(request), why)) if request and request.finish is None else None

    def shrink(self) -> bool:
        """After a step was too large for the device: plan smaller ones. False when they cannot be smaller."""
        largest = max((step.num_tokens for step in self.dispatched), default=0)
        budget = max(min(self.budget, largest) // 2, self.kv.block_size)
        self.budget = budget if budget < largest else self.budget
        return budget < largest

    def blame(self) -> list[Request]:
        """The workers were lost: a strike for every request in flight. Returns those that are suspects from now on."""
        inflight = {request: None for step in self.dispatched for request in step.requests if request.finish is None}
        return self.suspects.blame(inflight)

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        """Begin anew with workers that hold nothing. Who ran waits again, in the order there was, with its tokens.

        What was in flight is computed again; a late result of it must not be handed to `update`. Says who ended: those
        that had one strike too many.
        """
        lost = list(self.dispatched)
        for request in (request for step in lost for request in step.sampled):
            request.inflight = 0
        for request in self.running:
            request.row, request.blocks, request.computed, request.retired = None, [], 0, 0
            self.groups.requeue(request)
        self.running.clear()
        self.dispatched.clear()
        self.kv.lose([written for step in lost for written in step.written])
        self.rows.reset()
        self.epoch, self._step, self._others_turn = epoch, 0, False
        return [(known(r), self._fail(known(r), verdict(r))) for r in self.suspects.convicts() if r.finish is None]

    def check(self, blocks: range | None = None) -> None:
        """Raises AssertionError when books and holdings differ: a leak, or a block or row given twice.

        `blocks` are those of the pool that are looked at, all by default.
        """
        self.kv.check(self.running, blocks)
        self.rows.check(self.running)
        self.waiting.check((*self.running, *self.groups.parked))
        self.suspects.check((*self.running, *self.waiting, *self.groups.parked))
        assert len(self.dispatched) < 2 or not any(step.alone for step in self.dispatched), "a suspect has company"

    # --- planning -----------------------------------------------------------------------------------------------------

    def _next_step(self) -> Step | None:
        self._make_room()
        suspect = self._next_suspect() if self.suspects else None
        if suspect is None or self._others_turn:
            step = self._together()
            return step if step or not suspect else self._alone(suspect)
        return None if self.dispatched else self._alone(suspect) or self._together()

    def _together(self) -> Step | None:
        """A step of all that run and are no suspects, and of those that wait and fit, up to the first suspect.

        Who decodes comes first; prompts share what that leaves of the tokens, and of the time.
        """
        draft = Draft(self.budget)
        prompts = self._decode(draft)
        spare_s = self.pace.spare_s(draft.rows, draft.context)
        self._open(draft, prompts, spare_s)
        claims = self.waiting.claims(prompts, self.config.max_num_seqs)
        draft.chunks(prompts, self.pace.share(claims, draft.budget, spare_s, self.kv.block_size))
        assert draft.requests or not draft.admitted, "a row was given that the worker would not hear of"
        return self._dispatch(draft) if draft.requests else None

    def _alone(self, suspect: Request) -> Step | None:
        """A step of this suspect. None when it has to wait for blocks."""
        draft = Draft(self.budget)
        if suspect.row is None:
            if (hit := self._fitting(suspect)) is None:
                return None
            self.waiting.remove(suspect)
            self._admit(draft, suspect, hit)
        count = min(suspect.claim.left, self.budget)
        end = suspect.computed + count
        if end > len(suspect.blocks) * self.kv.block_size and not self._grow(draft, suspect, end):
            return None
        draft.chunk(suspect, count)
        return self._dispatch(draft)

    def _next_suspect(self) -> Request | None:
        """The one that runs; else the one whose turn it is to be admitted, if there is room."""
        if running := self.suspects.running():
            return running
        head = self.waiting.peek()
        return head if head and head.suspect and self.rows.free and self._fitting(head) is not None else None

    def _decode(self, draft: Draft) -> list[Request]:
        """Plan a token of each request that lacks one, by rank. Returns those that lack more."""
        running, block_size, suspects = self.running, self.kv.block_size, len(self.suspects)
        planned: list[Request] = []
        prompts: list[Request] = []
        context = index = 0
        while index < len(running) and len(planned) < draft.budget:  # `_grow` takes requests away behind `index`
            request = running[index]
            index += 1
            known, computed = len(request.tokens), request.computed
            target = known + request.inflight
            if target >= request.limit or (suspects and request.suspect):  # at its limit all samples are under way
                continue
            if target - computed > 1:
                prompts.append(request)
                continue
            if computed >= len(request.blocks) * block_size and not self._grow(draft, request, target):
                continue
            request.computed = target
            request.inflight += 1
            planned.append(request)
            context += computed
            if known >= request.publish_at:
                draft.ripe.append(request)
        draft.decode(planned, context)
        return prompts

    def _open(self, draft: Draft, prompts: list[Request], spare_s: float) -> None:
        """Admit those that wait while they fit, and the step has room for more than the prompts that come before them.

        `OPEN_PROMPTS` are open, room or not: a short prompt shall not wait for the long one that arrived before it.
        """
        passed: list[Request] = []  # by others, since it is better for them to wait
        tokens = draft.budget - sum(request.claim.left for request in prompts)
        while (
            draft.budget and self.rows.free and (head := self.waiting.peek()) and not head.inflight and not head.suspect
        ):
            if len(self.rows.free) <= self.waiting.rows_kept(head, self.config.max_num_seqs):
                break
            if (tokens <= 0 or spare_s < inf) and len(prompts) >= OPEN_PROMPTS:
                claims = [request.claim for request in prompts]
                if not self.pace.room(claims, draft.budget, spare_s, head.claim):
                    break
            if (hit := self._fitting(head)) is None or (hit.coming and len(passed) == MOST_PASSED):
                break
            self.waiting.remove(head)
            if hit.coming:
                passed.append(head)
                continue
            self._admit(draft, head, hit)
            prompts.append(head)
            tokens -= head.claim.left
        for request in passed:
            self.waiting.push(request)

    def _grow(self, draft: Draft, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens`, at the cost of those behind the request if need be.

        False when nobody is to yield to it: it keeps what it has and waits, since its blocks would only go to those
        before it, who will take them by preemption when they must.
        """
        count = self.kv.blocks_for(num_tokens) - len(request.blocks)
        while self.kv.num_free < count:
            yielding = victim(self.running, bisect_left(self.running, request.rank, key=attrgetter("rank")))
            if yielding is None:
                return False
            self._preempt(yielding)
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
        needed = self.kv.blocks_for(len(head.tokens)) + reserve(len(staying))
        if self.kv.num_free + self.kv.gain(worse, staying) < needed or self.kv.awaits(head):
            return
        while self.running and self.running[-1].priority > head.priority:
            if self.rows.free and self.kv.find_at_any_cost(head, reserve(len(self.running))) is not None:
                return
            self._preempt(victim(self.running, -1) or self.running[-1])

    def _fitting(self, request: Request) -> Hit | None:
        """What `KvCache.find` has for a waiting request, if there is room beside those that run."""
        return self.kv.find(request, reserve(len(self.running)))

    def _admit(self, draft: Draft, request: Request, hit: Hit) -> None:
        """Give a waiting request a row and blocks for all it knows."""
        self.kv.admit(request, hit)
        self.rows.give(request)
        self._num_admitted += 1
        request.turn = self._num_admitted
        request.charged = max(request.charged, request.computed)
        if request.num_cached is None:
            request.num_cached = min(request.computed, request.num_prompt)
            draft.first.append(request)
        draft.admitted.append(admission(request))
        insort(self.running, request, key=attrgetter("rank"))

    def _dispatch(self, draft: Draft) -> Step:
        released = self.rows.tell(draft)
        self.kv.planned(draft.requests, draft.ripe)
        self._step += 1
        plan = draft.plan(self.epoch, self._step, released, self.kv.take_copies())
        written = self.kv.take_written()
        step = Step(plan, draft.requests, draft.sampled, draft.first, self._num_preempted, written, draft.load)
        self._num_preempted, self._others_turn = 0, step.alone
        self.dispatched.append(step)
        return step

    # --- ending -------------------------------------------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Back to the queue, to be computed again. What the cache still has of it then need not be."""
        self._leave_row(request)
        self.kv.comes_back(request)
        self.groups.requeue(request)
        self._num_preempted += 1

    def _fail(self, request: Request, why: str) -> Output:
        for member in members_of(request):
            self.kv.forget(member)
        return self._end(request, "error", why)

    def _end(self, request: Request, reason: str, why: str = "", best: Sequence[Hypothesis] = ()) -> Output:
        """All of it, be it one sequence or the beams of a search, which tells its `best`."""
        for member in members_of(request):
            member.finish = reason
            self.suspects.drop(member)
            if member.row is None:
                self.groups.leave_queue(member)
            else:
                self._leave_row(member)
            self.waiting.leave(member)
            self.kv.end(member)
        first_index = request.num_output if request.group is None else 0
        return Output(request.id, first_index, [], reason, request.num_cached or 0, why, hypotheses=list(best))

    def _leave_row(self, request: Request) -> None:
        self.kv.leave(request)
        self.rows.take_back(request)
        self.running.remove(request)
