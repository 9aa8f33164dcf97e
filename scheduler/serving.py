"""Between the wire and the scheduler: who owns which request, who is to hear what. No sockets; times are arguments."""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable

from ..common.messages import Output, Outputs, RequestFault, StepPlan, StepResult, Submit
from ..common.model_info import ModelInfo
from .intake import Malformed
from .intake import request as read
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
LONGEST_WAIT_S = 3600.0  # a client that claims more has a broken clock
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
        self._audited = 0  # blocks looked at since something was under way

    @property
    def num_requests(self) -> int:
        return sum(map(len, self._requests.values()))

    def submit(self, client: bytes, submit: Submit, now: float) -> None:
        """Queue it, or answer with why not. A known id replaces what was there: the client lost the thread."""
        self.abort(client, [submit.id], now)
        try:
            waited_s = min(max(0.0, submit.waited_s), LONGEST_WAIT_S)  # in this order NaN is 0
            request = read(submit, client, self._model.vocab_size, now - waited_s)
        except Malformed as error:
            self._reject(client, submit.id, "malformed", str(error))
            return
        if reason := self.scheduler.rejection(request):
            wait_s = self._turnover.wait_s(len(self.scheduler.waiting), now) if reason == "overloaded" else 0.0
            self._reject(client, submit.id, reason, WHY_REJECTED[reason], wait_s)
            return
        if request.strikes or request.num_output:  # accepted before, and charged
            self._recorder.resumed(1)
            self._recorder.quarantined(request.suspect)
        elif refusal := self._quotas.admit(request.tenant, request.quota, request.num_prompt, now):
            self._reject(client, submit.id, "rate_limited", refusal.why, refusal.retry_after_s)
            return
        if self.scheduler.idle:
            self._turnover.begins(now)
        self._audited = 0
        request.last_token_at = now
        if (output := self.scheduler.add(request)) is not None:
            self._outbox[client].append(output)
            return
        self._requests.setdefault(client, {})[request.id] = request

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
        self._turnover.ended(now)
        self._recorder.aborted()

    def plan(self, now: float) -> StepPlan | None:
        """The next plan to send, if another may be in flight and there is work."""
        if len(self.scheduler.dispatched) >= self._depth or (step := self.scheduler.schedule()) is None:
            return None
        self._dispatched_at.append(now)
        self._recorder.dispatched(step, now)
        return step.plan

    def expected_step(self) -> int | None:
        """The step whose result comes next."""
        dispatched = self.scheduler.dispatched
        return dispatched[0].plan.step if dispatched else None

    def result(self, result: StepResult, now: float) -> None:
        """Take the result of `expected_step`."""
        news = self.scheduler.update(result)
        self._recorder.answered(news, now - self._dispatched_at.popleft(), now)
        for request, output in news:
            if request.quota.tokens and output.tokens:
                self._quotas.charge(request.tenant, request.quota, len(output.tokens), now)
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
        num_running = len(scheduler.running)
        failed = scheduler.regroup(epoch)
        self._recorder.resumed(num_running - len(failed))
        self._failed(failed, now)

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
            self._turnover.ended(now)
            del self._requests[request.client][request.id]

    def _reject(self, client: bytes, id: int, reason: str, why: str, retry_after_s: float = 0.0) -> None:
        self._recorder.rejected(reason)
        rejection = "" if reason == "malformed" else reason
        self._outbox[client].append(Output(id, 0, [], "error", 0, why, rejection, retry_after_s))
