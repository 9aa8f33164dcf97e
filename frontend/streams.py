"""The tokens of one sequence on their way from the engine to a reader.

The producer never waits and a slow reader costs one slot of memory: what arrives between two reads is merged.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from math import inf

from msgspec import Struct

from ..common.errors import EngineError, QuireError
from ..common.messages import Hypothesis, Output, Quota, Submit, pack
from ..common.sampling import SamplingParams

# Since a sequence was submitted last. One token would prove nothing: computing what is here anew ends in one.
PROOF_TOKENS = 2


class EngineDead(EngineError):
    """The whole engine is gone, not only one request."""


class TokenDelta(Struct, frozen=True):
    """What is new of a sequence since the last read."""

    tokens: list[int]
    finish: str | None  # "stop" (a stop token, which is the last id) or "length"; None while it runs
    num_cached: int  # prompt tokens found in the prefix cache; final with the first delta
    logprobs: Sequence[float] = ()  # of the tokens, where they were asked for
    hypotheses: Sequence[Hypothesis] = ()  # of a beam search, which has nothing else to tell


class Routing(Struct, frozen=True, kw_only=True):
    """What the scheduler is told of a request beside prompt and parameters."""

    arrival: float | None = None  # of the client's request, time.monotonic(); None: when it is submitted
    priority: int = 0  # lower runs first
    tenant: str = ""
    salt: str = ""  # prefixes are shared only between requests of equal salt
    quota: Quota = Quota()  # of the tenant
    timeout_s: float = 0.0  # from `arrival` to the last token; 0: none
    max_queue_s: float = 0.0  # from `arrival` until anything is computed; 0: none
    pin_s: float = 0.0  # keep the prompt's KV for so long
    pin_tokens: int = 0  # so much of it; 0: all


class TokenStream:
    """Reads one sequence. Made by `EngineClient.submit`, which owns its wire id.

    Either `take` without waiting (when `wake` is set), or iterate. `close` aborts a sequence that still runs; whoever
    stops reading early must call it. All on the client's event loop.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        routing: Routing,
        *,
        abort: Callable[["TokenStream"], None],
        wake: asyncio.Event,
    ) -> None:
        self.prompt = pack(prompt)
        self.sampling = sampling  # resolved
        self.routing = routing
        self.arrival = time.monotonic() if routing.arrival is None else routing.arrival
        self.id = 0  # on the wire; a new one each time the sequence is submitted
        self.output: list[int] = []  # every id so far
        self.attempts = 0  # how often the engine failed while it held the sequence, without progress between
        self.resubmitted = False  # an engine has taken it before: it is not to be refused any more
        self.rests_until = 0.0  # time.monotonic() before which it is not to be submitted again
        self.done = False  # nothing more will arrive
        self._abort = abort
        self._wake = wake
        self._taken = 0  # ids of `output` that were read
        self._submitted = 0  # ids of `output` that the engine was given
        self._finish: str | None = None
        self._error: QuireError | None = None
        self._num_cached = 0
        self._logprobs: list[float] = []  # of `output`, where they are asked for
        self._hypotheses: list[Hypothesis] = []
        self._finish_taken = False

    @property
    def ends_at(self) -> float:
        """time.monotonic() at which its time is over; infinity without a timeout."""
        return self.arrival + self.routing.timeout_s if self.routing.timeout_s else inf

    @property
    def begins_by(self) -> float:
        """Likewise until something must have been computed. Void once there is output."""
        return self.arrival + self.routing.max_queue_s if self.routing.max_queue_s and not self.output else inf

    def submission(self) -> Submit:
        """The message that starts this sequence, or goes on with it behind the ids that are here."""
        self._submitted = len(self.output)
        return Submit(
            id=self.id,
            prompt=self.prompt,
            sampling=self.sampling,
            waited_s=max(0.0, time.monotonic() - self.arrival),
            priority=self.routing.priority,
            tenant=self.routing.tenant,
            salt=self.routing.salt,
            output=pack(self.output),
            attempts=self.attempts,
            quota=self.routing.quota,
            timeout_s=self.routing.timeout_s,
            max_queue_s=self.routing.max_queue_s,
            pin_s=self.routing.pin_s,
            pin_tokens=self.routing.pin_tokens,
        )

    def accept(self, output: Output) -> None:
        """Append what the engine sent, ids without a gap. Those that are here already are dropped by their index."""
        num_known = len(self.output) - output.first_index
        assert num_known >= 0, output
        if self.done or num_known > len(output.tokens):  # all of it is older than what is here
            return
        if not self.output:
            self._num_cached = output.num_cached
        self.output += output.tokens[num_known:]
        self._logprobs += output.logprobs[num_known:]
        if len(self.output) - self._submitted >= PROOF_TOKENS:
            self.attempts = 0
        if output.finish in ("stop", "length"):
            self.done, self._finish, self._hypotheses = True, output.finish, output.hypotheses
        self._wake.set()

    def fail(self, error: QuireError) -> None:
        """End the stream with `error`, raised once the ids before it have been read."""
        if not self.done:
            self.done, self._error = True, error
            self._wake.set()

    def take(self) -> TokenDelta | None:
        """Everything new since the last call, or None. Raises the error that ended the stream.

        The delta that carries a finish reason is the last one.
        """
        tokens, logprobs = self.output[self._taken :], self._logprobs[self._taken :]
        self._taken = len(self.output)
        ends = self._finish is not None and not self._finish_taken
        if tokens or ends:
            self._finish_taken = ends
            return TokenDelta(tokens, self._finish, self._num_cached, logprobs, self._hypotheses)
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """Stop reading. The engine frees the sequence if it still runs."""
        if not self.done:
            self.done = True
            self._abort(self)

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> TokenDelta:
        if self._finish_taken:
            raise StopAsyncIteration
        while (delta := self.take()) is None:
            self._wake.clear()
            await self._wake.wait()
        return delta
