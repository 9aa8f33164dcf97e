"""Between the wire and the scheduler: who owns which request, who is to hear what. No sockets; times are arguments."""

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from math import inf

import msgspec

from ..common.messages import Output, Outputs, RequestFault, StepPlan, StepResult, Submit
from ..common.model_info import ModelInfo
from ..common.pins import MOST_PINS_TOLD, GetPins, Pinned, PinnedPrefix
from . import intake
from .deadlines import Deadlines
from .disk_index import DiskIndex
from .quotas import Quotas
from .recorder import Recorder
from .request import Request
from .scheduler import Scheduler
from .turnover import Turnover

log = logging.getLogger(__name__)

WHY_REJECTED = {
    "too_long": "the request can never fit the context or the KV cache",
    "overloaded": "too many requests are waiting",
}
TIME_OVER = "the request's timeout is over"
NO_PLACE = "the request has not begun within its max_queue_time"
HOPELESS = 2.0  # times its max_queue_time that a request would have to wait, to be refused at once
AUDITED_AT_ONCE = 4096  # blocks: two milliseconds, in which nothing else is done


class Serving:
    """Requests by client and id. Nothing that a peer sends raises here."""

    def __init__(self, scheduler: Scheduler, model: ModelInfo, recorder: Recorder, depth: int) -> None:
        self.scheduler = scheduler
        self._model = model
        self._recorder = recorder
        self._depth = depth
        self._requests: dict[bytes, dict[int, Request]] = {}  # client -> id -> request
        self._outbox: defaultdict[bytes, list[Output]] = defaultdict(list)
        self._dispatched_at: deque[float] = deque()
        self._quotas = Quotas()
        self._turnover = Turnover()
        self._timeouts = Deadlines()
        self._places = Deadlines()  # of those that had no place in a step so far
        self._queued: Counter[tuple[str, int]] = Counter()  # those that had none, by tenant and priority
        self._index: DiskIndex | None = None
        self._audited = 0  # blocks looked at since something was under way

    def served_by(self, restoring_takes: tuple[float, float], index: DiskIndex | None) -> None:
        """A worker group is complete; nothing is under way. `index` is of its files, if they are others than before."""
        self.scheduler.kv.restoring_takes(*restoring_takes)
        if index is not None:
            self._index = index
            self.scheduler.kv.recall(index.content.values())
            log.info("%d blocks of KV were found on disk", len(index.content))

    def close(self) -> None:
        """Have the disk's index closed in good order."""
        if self._index is not None:
            self._index.close()
            self._index = None

    @property
    def num_requests(self) -> int:
        return sum(map(len, self._requests.values()))

    def submit(self, client: bytes, submit: Submit, now: float) -> None:
        """Queue it, or answer with why not. A known id replaces what was there: the client lost the thread."""
        self.abort(client, [submit.id], now)
        arrived_at = intake.arrived_at(submit, now)
        try:
            request = intake.request(submit, client, self._model.vocab_size, arrived_at)
        except intake.Malformed as error:
            self._reject(client, submit.id, "malformed", str(error))
            return
        ends_at, begins_by = intake.ends_at(submit, arrived_at), intake.begins_by(submit, arrived_at)
        if ends_at <= now:
            self._recorder.timed_out(request)
            self._outbox[client].append(Output(submit.id, request.num_output, [], "timeout", 0, TIME_OVER))
            return
        if self._refused(request, submit, begins_by, now):
            return
        if self.scheduler.idle:
            self._turnover.begins(now)
        self._audited = 0
        request.last_token_at = now
        if (output := self.scheduler.add(request)) is not None:
            self._outbox[client].append(output)
            return
        self._requests.setdefault(client, {})[request.id] = request
        self._queued[request.tenant, request.priority] += 1
        if ends_at < inf:
            self._timeouts.set(request, ends_at)
        if begins_by < inf:
            self._places.set(request, begins_by)

    def _refused(self, request: Request, submit: Submit, begins_by: float, now: float) -> bool:
        """Whether it cannot be taken; its client is then told why, and when to come again."""
        turnover = self._turnover
        if reason := self.scheduler.rejection(request):
            wait_s = turnover.turn_s(now) if reason == "overloaded" else 0.0
            self._reject(request.client, request.id, reason, WHY_REJECTED[reason], wait_s)
            return True
        if request.strikes or request.num_output:  # accepted before, and charged
            self._recorder.resumed(1)
            self._recorder.quarantined(request.suspect)
            return False
        # Those before it in any order there is. Even if the whole queue were theirs, it would wait for so long.
        queue_s = turnover.drain_s(self._queued[request.tenant, request.priority], now)
        if begins_by <= now or (queue_s is not None and queue_s > HOPELESS * (begins_by - now)):
            wait_s = turnover.shorter_s(len(self.scheduler.waiting), submit.max_queue_s, now)
            self._reject(request.client, request.id, "expired", NO_PLACE, wait_s)
            return True
        if refusal := self._quotas.admit(request.tenant, request.quota, request.num_prompt, now):
            self._reject(request.client, request.id, "rate_limited", refusal.why, refusal.retry_after_s)
            return True
        return False

    def abort(self, client: bytes, ids: Iterable[int], now: float) -> None:
        """Unknown ids are ignored: an abort crosses the end of its request all the time."""
        requests = self._requests.get(client, {})
        for id in ids:
            if (request := requests.pop(id, None)) is not None:
                self._forget(request, now)

    def drop(self, client: bytes, now: float) -> int:
        """Forget a client that is gone. Returns how many requests it had."""
        requests = self._requests.pop(client, {})
        for request in requests.values():
            self._forget(request, now)
        self._outbox.pop(client, None)
        return len(requests)

    def _forget(self, request: Request, now: float) -> None:
        self.scheduler.abort(request)
        self._ended(request, now)
        self._recorder.aborted()

    @property
    def next_deadline(self) -> float:
        """When `expire` is to be called at the latest."""
        return min(self._timeouts.next(), self._places.next(), self.scheduler.kv.pins.next())

    def expire(self, now: float) -> None:
        """End those whose time is over, whether they wait or run, and pins."""
        if ids := self.scheduler.kv.pins.due(now):
            self.scheduler.unpin(ids, "expired")
        for request in self._timeouts.due(now):
            self._recorder.timed_out(request)
            self._tell(request, self.scheduler.expire(request, TIME_OVER), now)
        for request in self._places.due(now):
            wait_s = self._turnover.shorter_s(len(self.scheduler.waiting), now - request.arrived_at, now)
            self._recorder.timed_out(request)
            output = self.scheduler.expire(request, NO_PLACE)
            self._tell(request, msgspec.structs.replace(output, rejection="expired", retry_after_s=wait_s), now)

    def plan(self, now: float) -> StepPlan | None:
        """The next plan to send, if another may be in flight and there is work. Nothing is spent on those whose time is
        over."""
        self.expire(now)
        if len(self.scheduler.dispatched) >= self._depth:
            return None
        step = self.scheduler.schedule()
        self.scheduler.kv.pins.told(now)
        self._turnover.moved(now, len(step.admitted) if step else 0, left=len(self.scheduler.waiting))
        if step is None:
            return None
        self._dispatched_at.append(now)
        if self._index is not None:
            self._index.writing(step.written)
        self._recorder.dispatched(step, now)
        for request in step.admitted:
            self._begun(request)
        return step.plan

    def expected_step(self) -> int | None:
        """The step whose result comes next."""
        dispatched = self.scheduler.dispatched
        return dispatched[0].plan.step if dispatched else None

    def result(self, result: StepResult, now: float) -> None:
        """Take the result of `expected_step`."""
        written = self.scheduler.dispatched[0].written
        news = self.scheduler.update(result)
        if self._index is not None:
            self._index.done(written)
        self._recorder.answered(news, now - self._dispatched_at.popleft(), now)
        for request, output in news:
            if request.quota.tokens and (num_tokens := output.num_tokens):
                self._quotas.charge(request.tenant, request.quota, num_tokens, now)
            self._tell(request, output, now)

    def fault(self, fault: RequestFault, now: float) -> None:
        news = self.scheduler.fault(fault.step, fault.row, fault.why)
        if news is None:
            log.info("a fault of row %d in step %d concerns no request that goes on", fault.row, fault.step)
            return
        self._failed([news], now)

    def regroup(self, epoch: int, now: float, *, out_of_memory: bool) -> None:
        """The workers are lost. Who ran waits for the next ones, `epoch` being theirs, or ends with too many strikes."""
        scheduler = self.scheduler
        if out_of_memory and scheduler.shrink():
            log.warning(
                "a step did not fit the device's memory: from now on steps have at most %d tokens; to start with fewer,"
                " lower --max-num-batched-tokens or the KV cache's share (--gpu-memory-utilization)",
                scheduler.budget,
            )
        else:
            self._recorder.quarantined(len(scheduler.blame()))
        self._dispatched_at.clear()
        self._audited = 0
        if self._index is not None:
            self._index.lost()
        num_running = len(scheduler.running)
        failed = scheduler.regroup(epoch)
        self._recorder.resumed(num_running - len(failed))
        self._failed(failed, now)

    def pins(self, asked: GetPins, now: float) -> Pinned:
        """Those that were asked for; they are ended if that was asked for, too."""
        pins, size = self.scheduler.kv.pins, self.scheduler.kv.block_size
        pins.told(now)
        found = [pin for pin in pins if asked.tenant in (None, pin.tenant) and asked.id in (0, pin.id)]
        told = [
            PinnedPrefix(pin.id, pin.tenant, pin.num_blocks * size, pin.num_blocks, max(0.0, pin.until - now))
            for pin in found[:MOST_PINS_TOLD]
        ]
        if asked.unpin:
            self.scheduler.unpin([pin.id for pin in found], "asked")
        return Pinned(asked.serial, told, len(found), pins.num_blocks, pins.most)

    def audit(self) -> None:
        """Check the books while nothing is under way: a part of them at each call, until all have been seen."""
        if self.scheduler.idle and self._audited < (num_blocks := self.scheduler.kv.pool.num_blocks):
            first, self._audited = self._audited, min(self._audited + AUDITED_AT_ONCE, num_blocks)
            self.scheduler.check(range(first + 1, self._audited + 1))

    def take_outputs(self) -> list[tuple[bytes, Outputs]]:
        """What there is to send, one message for each client."""
        outbox, self._outbox = self._outbox, defaultdict(list)
        return [(client, Outputs(outputs)) for client, outputs in outbox.items()]

    def _failed(self, news: Iterable[tuple[Request, Output]], now: float) -> None:
        for request, output in news:
            log.warning("a request failed: %s", output.error)
            self._recorder.ended(request, "error", now)
            self._tell(request, output, now)

    def _tell(self, request: Request, output: Output, now: float) -> None:
        self._outbox[request.client].append(output)
        if output.finish is not None:
            self._ended(request, now)
            del self._requests[request.client][request.id]

    def _begun(self, request: Request) -> None:
        """It needs no first place any more."""
        self._places.drop(request)
        queue = request.tenant, request.priority
        self._queued[queue] -= 1
        if not self._queued[queue]:
            del self._queued[queue]

    def _ended(self, request: Request, now: float) -> None:
        self._turnover.ended(now)
        self._timeouts.drop(request)
        if request.num_cached is None:
            self._begun(request)

    def _reject(self, client: bytes, id: int, reason: str, why: str, retry_after_s: float = 0.0) -> None:
        self._recorder.rejected(reason)
        rejection = "" if reason == "malformed" else reason
        self._outbox[client].append(Output(id, 0, [], "error", 0, why, rejection, retry_after_s))
