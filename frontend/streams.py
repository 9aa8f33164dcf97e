"""The tokens of one sequence on their way from the engine to a reader.

The producer never waits and a slow reader costs one slot of memory: what arrives between two reads is merged.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus

from msgspec import Struct

from ..common.errors import EngineError, QuireError, RequestError
from ..common.messages import Output, Submit, pack
from ..common.sampling import SamplingParams

RETRY_AFTER_S = 1


class EngineDead(EngineError):
    """The whole engine is gone, not only one request."""


class TokenDelta(Struct, frozen=True):
    """What is new of a sequence since the last read."""

    tokens: list[int]
    finish: str | None  # "stop" (a stop token, which is the last id) or "length"; None while it runs
    num_cached: int  # prompt tokens found in the prefix cache; final with the first delta


class Routing(Struct, frozen=True, kw_only=True):
    """What the scheduler is told of a request beside prompt and parameters."""

    arrival: float | None = None  # of the client's request, time.monotonic(); None: when it is submitted
    priority: int = 0  # lower runs first
    tenant: str = ""
    salt: str = ""  # prefixes are shared only between requests of equal salt


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
        self.done = False  # nothing more will arrive
        self._abort = abort
        self._wake = wake
        self._taken = 0  # ids of `output` that were read
        self._finish: str | None = None
        self._error: QuireError | None = None
        self._num_cached = 0
        self._finish_taken = False

    def submission(self) -> Submit:
        """The message that starts this sequence, or goes on with it behind the ids that are here."""
        return Submit(
            id=self.id,
            prompt=self.prompt,
            sampling=self.sampling,
            waited_s=max(0.0, time.monotonic() - self.arrival),
            priority=self.routing.priority,
            tenant=self.routing.tenant,
            salt=self.routing.salt,
            output=pack(self.output),
        )

    def accept(self, output: Output) -> None:
        """Append what the engine sent. Ids that are here already are dropped by index; a gap ends the stream."""
        if self.done:
            return
        num_known = len(self.output) - output.first_index
        if num_known < 0:
            self.fail(EngineError(f"{-num_known} tokens were lost on their way from the engine"))
            return
        if not self.output:
            self._num_cached = output.num_cached
        self.output += output.tokens[num_known:]
        if output.finish in ("stop", "length"):
            self.done, self._finish = True, output.finish
        elif output.finish is not None:
            self.fail(_ended_badly(output))
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
        tokens = self.output[self._taken :]
        self._taken = len(self.output)
        ends = self._finish is not None and not self._finish_taken
        if tokens or ends:
            self._finish_taken = ends
            return TokenDelta(tokens, self._finish, self._num_cached)
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


def _ended_badly(output: Output) -> QuireError:
    """The error of a sequence that the engine ended without an answer."""
    if output.rejection == "overloaded":
        return RequestError(
            output.error or "the engine's queue is full",
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            code="overloaded",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )
    if output.rejection:
        return RequestError(
            output.error or "the engine cannot hold this request", code="context_length_exceeded", param="prompt"
        )
    return EngineError(output.error or "the engine ended this request")
