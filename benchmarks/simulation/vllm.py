"""A small model of vLLM V1's scheduler with its defaults, for comparison on the same device.

Taken over: one token budget for a step (8,192 for a server on a GPU of less than 160 GB; 2,048 in older versions), used
up by running requests in the order of their admission and then by waiting ones in the order of arrival; prompts in
chunks of whatever is left; blocks for the chunk alone, but admission only where the whole sequence fits
(`scheduler_reserve_full_isl`); no blocks held back (`watermark` 0); who lacks a block preempts the last that runs, to be
computed again at the head of the queue, and a step that preempted admits nobody; prefix caching; asynchronous
scheduling; 1,024 sequences.

Not taken over: vLLM shares a block in the very step that writes it, one step earlier than here, and drops what a
preempted request has in flight, which here comes back first; CUDA graphs pad batches with either scheduler.
"""

from collections import deque
from dataclasses import dataclass

from quire.common.messages import Output, StepPlan, StepResult, pack, unpack
from quire.scheduler import prefix_cache
from quire.scheduler.blocks import BlockPool, blocks_for
from quire.scheduler.request import Request
from quire.scheduler.stops import finish_reason

MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 8192


@dataclass(slots=True)
class Planned:
    plan: StepPlan
    requests: list[Request]
    sampled: list[Request]
    num_tokens: int
    admitted: list[Request]
    num_preempted: int


class VllmLike:
    """To its caller what `Scheduler` is, as far as the simulator asks."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        *,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    ) -> None:
        self.kv = BlockPool(num_blocks)
        self.block_size, self.max_model_len = block_size, max_model_len
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.dispatched: deque[Planned] = deque()
        self._step = 0
        self._num_preempted = 0
        self._budget = 0
        self._planned: list[tuple[Request, int]] = []
        self._first: list[Request] = []

    def rejection(self, request: Request) -> str | None:
        longest = min(request.limit, self.max_model_len) - 1
        fits = request.num_prompt <= longest and blocks_for(longest, self.block_size) <= self.kv.num_blocks
        return None if fits else "too_long"

    def add(self, request: Request) -> Output | None:
        request.limit = min(request.limit, self.max_model_len)
        request.publish_at = self.block_size
        self.waiting.append(request)
        return None

    def abort(self, request: Request) -> None:
        if request.finish is None:
            self._end(request, "abort")

    def schedule(self) -> Planned | None:
        self._budget, self._planned, self._first = self.max_num_batched_tokens, [], []
        before = self._num_preempted
        index = 0
        while index < len(self.running) and self._budget:
            index += self._run(self.running[index])
        while self._num_preempted == before and self.waiting and self._budget and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if request.inflight or not self._admit(request):
                break
        return self._dispatch() if self._planned else None

    def update(self, result: StepResult) -> list[tuple[Request, Output]]:
        step = self.dispatched.popleft()
        news = []
        for request, token in zip(step.sampled, unpack(result.tokens), strict=True):
            request.inflight -= 1
            if request.finish is not None:
                continue
            request.tokens.append(token)
            reason = finish_reason(request)
            if reason is not None:
                self._end(request, reason)
            news.append((request, Output(request.id, request.num_output - 1, [token], reason)))
        return news

    def _run(self, request: Request) -> bool:
        """Whether it keeps its place in the list."""
        target = len(request.tokens) + request.inflight
        if target >= request.limit:
            return True
        count = min(target - request.computed, self._budget)
        missing = blocks_for(request.computed + count, self.block_size) - len(request.blocks)
        while self.kv.num_free < missing:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        if missing > 0:
            request.blocks += self.kv.take(missing)
        self._plan(request, count)
        return True

    def _admit(self, request: Request) -> bool:
        shared = prefix_cache.match(self.kv, request, self.block_size)
        free = self.kv.num_free - self.kv.count_free(shared)
        if blocks_for(len(request.tokens), self.block_size) - len(shared) > free:
            return False
        self.waiting.popleft()
        self.kv.share(shared)
        request.computed = len(shared) * self.block_size
        count = min(len(request.tokens) - request.computed, self._budget)
        missing = blocks_for(request.computed + count, self.block_size) - len(shared)
        request.blocks = shared + self.kv.take(missing)
        request.publish_at = request.computed + self.block_size
        if request.num_cached is None:
            request.num_cached = request.computed
            self._first.append(request)
        request.row = 0
        self.running.append(request)
        self._plan(request, count)
        return True

    def _plan(self, request: Request, count: int) -> None:
        request.computed += count
        self._budget -= count
        self._planned.append((request, count))

    def _dispatch(self) -> Planned:
        requests = [request for request, _ in self._planned]
        counts = [count for _, count in self._planned]
        sampled = [request for request in requests if request.computed == len(request.tokens) + request.inflight]
        starts = [request.computed - count for request, count in self._planned]
        samples = bytes(request.computed == len(request.tokens) + request.inflight for request in requests)
        for request in sampled:
            request.inflight += 1
        for request in requests:
            if len(request.tokens) >= request.publish_at:
                prefix_cache.publish(self.kv, request, self.block_size)
        self._step += 1
        plan = StepPlan(1, self._step, [], [], [], b"", b"", pack(starts), pack(counts), samples)
        step = Planned(plan, requests, sampled, sum(counts), self._first, self._num_preempted)
        self._num_preempted = 0
        self.dispatched.append(step)
        return step

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self._num_preempted += 1

    def _end(self, request: Request, reason: str) -> None:
        request.finish = reason
        if request.row is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._release(request)

    def _release(self, request: Request) -> None:
        self.kv.release(request.blocks)
        request.blocks, request.computed, request.row = [], 0, None
