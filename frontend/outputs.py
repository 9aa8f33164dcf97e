"""What a request yields. Field names are vLLM's.

The one primitive is the delta: each `RequestOutput` of a stream holds what is new. `Accumulator` adds deltas up.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class CompletionOutput:
    """One choice: what is new of it (a delta), or all of it (accumulated)."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" or "length" in the last delta
    stop_reason: int | str | None = None  # the stop string or stop token id of the request that ended it
    cumulative_logprob: float | None = None  # of all tokens together, where a beam search has found them

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One request. A delta holds only the choices that moved."""

    request_id: str
    prompt: str | None  # None when it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache


class Accumulator:
    """Adds deltas of one request up. `total` is the whole so far, choices in order of their index."""

    def __init__(self) -> None:
        self._head: RequestOutput | None = None
        self._choices: dict[int, CompletionOutput] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, delta: RequestOutput) -> None:
        self._head = delta
        for part in delta.outputs:
            choice = self._choices.setdefault(part.index, CompletionOutput(part.index, "", []))
            self._texts.setdefault(part.index, []).append(part.text)
            choice.token_ids += part.token_ids
            choice.finish_reason, choice.stop_reason = part.finish_reason, part.stop_reason
            choice.cumulative_logprob = part.cumulative_logprob

    def total(self) -> RequestOutput:
        """A copy that later deltas do not change. At least one delta must have been added."""
        assert self._head is not None, "no delta was added"
        outputs = [
            replace(choice, text="".join(self._texts[index]), token_ids=list(choice.token_ids))
            for index, choice in sorted(self._choices.items())
        ]
        return replace(self._head, outputs=outputs)


async def collect(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    """The whole of a request, once it has ended."""
    accumulator = Accumulator()
    async for delta in stream:
        accumulator.add(delta)
    return accumulator.total()
