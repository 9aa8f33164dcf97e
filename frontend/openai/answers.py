"""What both generating routes share: one request in flight, its numbers, and the ways to answer it."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...common.errors import RequestError
from ...common.sampling import SamplingParams
from ..generator import Generator
from ..outputs import Accumulator, RequestOutput
from ..streams import Routing
from .protocol import GenerationRequest, StreamOptions
from .responses import Usage, usage

Deltas = AsyncGenerator[tuple[int, RequestOutput], None]  # index of the prompt, and what is new of it


@dataclass(slots=True)
class Job:
    """One accepted request."""

    generator: Generator
    id: str
    model: str  # as the client named it
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    routing: Routing
    created: int = field(default_factory=lambda: int(time.time()))

    def deltas(self) -> Deltas:
        """Index of the prompt and its delta, in the order of arrival."""
        return self.generator.generate_many(self.prompts, self.params, request_id=self.id, routing=self.routing)


async def whole(deltas: Deltas, num_prompts: int) -> list[RequestOutput]:
    """The finished output of each prompt."""
    totals = [Accumulator() for _ in range(num_prompts)]
    async with aclosing(deltas):
        async for index, delta in deltas:
            totals[index].add(delta)
    return [total.total() for total in totals]


class UsageCount:
    """Usage of a request while it streams, and what each chunk shows of it."""

    def __init__(self, prompts: Sequence[Sequence[int]], options: StreamOptions | None) -> None:
        self._num_prompt = sum(map(len, prompts))
        self._num_generated = 0
        self._num_cached = [0] * len(prompts)
        self._options = options or StreamOptions()

    @property
    def wanted(self) -> bool:
        return self._options.include_usage

    @property
    def in_each_chunk(self) -> bool:
        """Whether chunks differ by it."""
        return self.wanted and self._options.continuous_usage_stats

    def add(self, index: int, delta: RequestOutput) -> None:
        self._num_generated += sum(len(choice.token_ids) for choice in delta.outputs)
        self._num_cached[index] = delta.num_cached_tokens

    def total(self) -> Usage:
        return usage(self._num_prompt, self._num_generated, sum(self._num_cached))

    def in_chunk(self) -> Usage | msgspec.UnsetType | None:
        """OpenAI's rule: null in every chunk when usage was asked for, no field otherwise."""
        if not self.wanted:
            return msgspec.UNSET
        return self.total() if self._options.continuous_usage_stats else None


def check_stream_options(body: GenerationRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only for streamed answers: set stream to true", param="stream_options")


def request_id(request: Request, prefix: str) -> str:
    return f"{prefix}-{request.scope['state']['request_id']}"


def json_answer(answer: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json", headers=headers)
