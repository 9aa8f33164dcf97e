"""Between the wire and the scheduler: who owns which request, who is to hear what. No sockets; times are arguments."""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable

from ..common.messages import Output, Outputs, RequestFault, StepPlan, StepResult, Submit
from ..common.model_info import ModelInfo
from .intake import Malformed
from .intake import request as read
from .recorder import Recorder
from .request import Request
from .scheduler import Scheduler

log = logging.getLogger(__name__)

WHY_REJECTED = {
    "too_long": "the request can never fit the context or the KV cache",
    "overloaded": "too many requests are waiting",
}
LONGEST_WAIT_S = 3600.0  # a client that claims more has a broken clock


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

    @property
    def num_requests(self) -> int:
        return sum(map(len, self._requests.values()))

    def submit(self, client: bytes, submit: Submit, now: float) -> None:
        """Queue it, or answer with why not. A known id replaces what was there: the client lost the thread."""
        self.abort(client, [submit.id])
        try:
            waited_s = min(max(0.0, submit.waited_s), LONGEST_WAIT_S)  # in this order NaN is 0
            request = read(submit, client, self._model.vocab_size, now - waited_s)
        except Malformed as error:
            self._reject(client, submit.id, "malformed", str(error))
            return
        if reason := self.scheduler.rejection(request):
            self._reject(client, submit.id, reason, WHY_REJECTED[reason])
            return
        request.last_token_at = now
        if (output := self.scheduler.add(request)) is not None:
            self._outbox[client].append(output)
            return
        self._requests.setdefault(client, {})[request.id] = request

    def abort(self, client: bytes, ids: Iterable[int]) -> None:
        """Unknown ids are ignored: an abort crosses the end of its request all the time."""
        requests = self._requests.get(client, {})
        for id in ids:
            if (request := requests.pop(id, None)) is not None:
                self.scheduler.abort(request)
                self._recorder.aborted()

    def drop(self, client: bytes) -> int:
        """Forget a client that is gone. Returns how many requests it had."""
        requests = self._requests.pop(client, {})
        for request in requests.values():
            self.scheduler.abort(request)
            self._recorder.aborted()
        self._outbox.pop(client, None)
        return len(requests)

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
            self._tell(request, output)

    def fault(self, fault: RequestFault, now: float) -> None:
        news = self.scheduler.fault(fault.step, fault.row, fault.why)
        if news is None:
            log.info("a fault of row %d in step %d concerns no request that goes on", fault.row, fault.step)
            return
        log.warning("a request failed: %s", fault.why)
        self._recorder.ended(news[0], "error", now)
        self._tell(*news)

    def take_outputs(self) -> list[tuple[bytes, Outputs]]:
        """What there is to send, one message for each client."""
        outbox, self._outbox = self._outbox, defaultdict(list)
        return [(client, Outputs(outputs)) for client, outputs in outbox.items()]

    def _tell(self, request: Request, output: Output) -> None:
        self._outbox[request.client].append(output)
        if output.finish is not None:
            del self._requests[request.client][request.id]

    def _reject(self, client: bytes, id: int, reason: str, why: str) -> None:
        self._recorder.rejected(reason)
        rejection = reason if reason in WHY_REJECTED else ""
        self._outbox[client].append(Output(id, 0, [], "error", error=why, rejection=rejection))
