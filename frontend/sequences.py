"""Every open sequence of a frontend: which the scheduler holds, which wait here, what becomes of them when it forgets.

No sockets; times are arguments. A sequence counts an attempt each time the engine failed while it held it: its
scheduler died, or skipped ids of it. Frames that were lost on the way count none, the scheduler being alive. Progress,
`PROOF_TOKENS` of it, takes all attempts away. With `SUSPECT_ATTEMPTS` a sequence is submitted alone, the next suspect
only when this one has made progress or has ended: a sequence that kills schedulers then takes no other suspect's
attempts. With `MAX_ATTEMPTS` it fails.
"""

import itertools
import logging
from http import HTTPStatus

from ..common.errors import EngineError, QuireError, RequestError
from ..common.messages import Output, Submit
from .errors import retry_after
from .streams import Routing, TokenStream

log = logging.getLogger(__name__)

SUSPECT_ATTEMPTS = 2
MAX_ATTEMPTS = 4
_PASSING = ("overloaded", "rate_limited")  # rejections that do not last
_PATIENCE_S = 1.0  # in which a scheduler may say itself that the time of a sequence is over
_REST_S = (1.0, 60.0)  # a sequence that was taken before tries again after what the scheduler says, within these


class Sequences:
    """Decides; what it returns is to be sent. `len` counts those that are open."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)  # never used twice: what is late for an old id cannot meet a new one
        self._held: dict[int, TokenStream] = {}  # by the scheduler, by wire id
        self._waiting: dict[TokenStream, None] = {}  # here, in order
        self._suspect: TokenStream | None = None  # the one that the scheduler holds, or held last

    def __len__(self) -> int:
        return len(self._held) + len(self._waiting)

    @property
    def held_ids(self) -> list[int]:
        return list(self._held)

    def add(self, stream: TokenStream) -> None:
        self._waiting[stream] = None

    def due(self, now: float) -> list[Submit]:
        """What to send now to a scheduler that takes sequences, in order."""
        submissions = []
        for stream in list(self._waiting):
            if stream.rests_until <= now and self._may_go(stream):
                del self._waiting[stream]
                stream.id = next(self._ids)
                self._held[stream.id] = stream
                submissions.append(stream.submission())
        return submissions

    def accept(self, output: Output, *, overload_status: int, now: float) -> int | None:
        """Hand on what the scheduler sent. Returns an id that it is to abort, its sequence being wanted under another."""
        stream = self._held.get(output.id)
        if stream is None:  # aborted meanwhile
            return None
        if output.rejection in _PASSING and stream.resubmitted:
            del self._held[output.id]
            stream.rests_until = now + min(max(_REST_S[0], output.retry_after_s), _REST_S[1])
            self._waiting[stream] = None
            return None
        if output.first_index <= len(stream.output):
            stream.accept(output)
        elif output.finish in (None, "stop", "length"):
            del self._held[output.id]
            log.warning("the engine skipped %d tokens of a sequence", output.first_index - len(stream.output))
            self._again(stream)
            return output.id
        if output.finish not in (None, "stop", "length"):
            stream.fail(_ended_badly(output, stream.routing, overload_status))
        if stream.done:
            del self._held[output.id]
        return None

    def remove(self, stream: TokenStream) -> int | None:
        """Forget a sequence that nobody reads any more. Returns the id that the scheduler holds it by, if it does."""
        self._waiting.pop(stream, None)
        return stream.id if self._held.pop(stream.id, None) is not None else None

    def overdue(self, *, overload_status: int, now: float) -> list[int]:
        """End sequences whose time is over, where no scheduler does. Returns ids that it is to abort, should it hear."""
        for stream in [stream for stream in self._waiting if stream.ends_at <= now or stream.begins_by <= now]:
            del self._waiting[stream]
            late = _timed_out(stream.routing) if stream.ends_at <= now else _not_begun(stream.routing, overload_status)
            stream.fail(late)
        late_ids = [id for id, stream in self._held.items() if stream.ends_at + _PATIENCE_S <= now]
        for id in late_ids:
            stream = self._held.pop(id)
            stream.fail(_timed_out(stream.routing))
        return late_ids

    def withdraw(self, *, died: bool) -> int:
        """The scheduler holds nothing any more; `died` if it is another one. Those it held wait again, before all
        others. Returns how many."""
        held, waiting = list(self._held.values()), self._waiting
        self._held, self._waiting = {}, {}
        for stream in held:
            if died:
                self._again(stream)
            else:
                self._waiting[stream] = None
            stream.resubmitted = True
        self._waiting.update(waiting)
        return len(held)

    def end(self, error: QuireError) -> None:
        """There is no engine any more."""
        for stream in (*self._held.values(), *self._waiting):
            stream.fail(error)
        self._held, self._waiting = {}, {}

    def _again(self, stream: TokenStream) -> None:
        stream.attempts += 1
        stream.resubmitted = True
        if stream.attempts < MAX_ATTEMPTS:
            self._waiting[stream] = None
        else:
            stream.fail(EngineError(f"the engine failed {MAX_ATTEMPTS} times while it held this request"))

    def _may_go(self, stream: TokenStream) -> bool:
        """Of suspects the scheduler holds one at a time."""
        if stream.attempts < SUSPECT_ATTEMPTS:
            return True
        other = self._suspect
        if other is not None and self._held.get(other.id) is other and other.attempts >= SUSPECT_ATTEMPTS:
            return False
        self._suspect = stream
        return True


def _ended_badly(output: Output, routing: Routing, overload_status: int) -> QuireError:
    """The error of a sequence that the engine ended without an answer."""
    match output.rejection:
        case "expired":
            return _not_begun(routing, overload_status, output.retry_after_s)
        case "" if output.finish == "timeout":
            return _timed_out(routing)
        case "overloaded":
            message, status, code = "the engine's queue is full", overload_status, "overloaded"
        case "rate_limited":
            message, status, code = "the rate limit is reached", HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_exceeded"
        case "":
            return EngineError(output.error or "the engine ended this request")
        case _:
            message = output.error or "the engine cannot hold this request"
            return RequestError(message, code="context_length_exceeded", param="prompt")
    return RequestError(output.error or message, status=status, code=code, headers=retry_after(output.retry_after_s))


def _timed_out(routing: Routing) -> RequestError:
    message = f"the answer was not complete within the request's timeout of {routing.timeout_s:g} s"
    return RequestError(message, status=HTTPStatus.GATEWAY_TIMEOUT, code="timeout")


def _not_begun(routing: Routing, overload_status: int, retry_after_s: float = 0.0) -> RequestError:
    message = f"the request could not begin within its max_queue_time of {routing.max_queue_s:g} s"
    return RequestError(message, status=overload_status, code="queue_timeout", headers=retry_after(retry_after_s))
