"""Requests in text: prompts in, text out as it comes. What the HTTP routes and the Python API both stand on."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import msgspec
from msgspec.msgpack import encode

from ..common.errors import RequestError
from ..common.messages import Capacity, most_blocks
from ..common.sampling import INT64_MAX, MAX_TOKEN_IDS, SamplingParams
from .detokenizer import Detokenizer
from .engine_client import EngineClient
from .outputs import Accumulator, CompletionOutput, RequestOutput
from .streams import Routing, TokenStream
from .tokenizer import Tokenizer

AT_ONCE = 32  # prompts that one request may have taken up before others get their turn


class Generator:
    """Serves requests through `client`, with the model's `tokenizer`."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self.client = client
        self.tokenizer = tokenizer

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        arrival: float | None = None,
        priority: int = 0,
        tenant: str = "",
        salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Deltas of one request, at most one per reading, merged when the reader is slow.

        Ends when every choice has; closing the iterator early, or cancelling the task that reads it, aborts the rest.
        `arrival` is a time.monotonic(). Raises RequestError for a request that cannot be served, before anything is
        submitted, and EngineError.
        """
        text = prompt if isinstance(prompt, str) else None
        ids = await self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        routing = Routing(arrival=arrival, priority=priority, tenant=tenant, salt=salt)
        async with aclosing(self.generate_many([ids], params, request_id=request_id, routing=routing)) as outputs:
            async for _, output in outputs:
                output.prompt = text
                yield output

    async def generate_many(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, request_id: str, routing: Routing
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """As `generate`, for several prompts under one request: index of the prompt, and its delta."""
        _check_routing(routing)
        resolved = [self.resolve(prompt, params) for prompt in prompts]
        wake = asyncio.Event()
        requests: list[_Request] = []
        try:
            for prompt, sampling in zip(prompts, resolved, strict=True):
                requests.append(_Request(prompt))
                for part in self._parts(prompt, params, sampling, routing, wake):
                    requests[-1].parts.append(part)
                if len(requests) % AT_ONCE == 0:
                    await asyncio.sleep(0)
            running = list(enumerate(requests))
            while running:
                wake.clear()
                moved = False
                for place, (index, request) in enumerate(running, 1):
                    if (output := request.advance(request_id)) is not None:
                        moved = True
                        yield index, output
                    if place % AT_ONCE == 0:
                        await asyncio.sleep(0)
                running = [(index, request) for index, request in running if not request.finished]
                if running and not moved:
                    await wake.wait()
        finally:
            for request in requests:
                request.close()

    def _parts(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        resolved: SamplingParams,
        routing: Routing,
        wake: asyncio.Event,
    ) -> "Iterator[_Choice | _Search | _Best]":
        """Submits them one after the other."""
        texts = [
            Detokenizer(self.tokenizer.backend, self.tokenizer.special_ids, prompt, params)
            for _ in range(params.n if params.beam_width else params.num_sequences)
        ]
        if params.beam_width:
            yield _Search(self.client.submit(prompt, resolved, routing=routing, wake=wake), texts)
            return
        drawn: list[_Choice] = []
        if resolved.best_of:
            yield _Best(drawn, params.n)
        for index, text in enumerate(texts):
            sampling = msgspec.structs.replace(resolved, seed=_shifted(resolved.seed or 0, index))
            choice = _Choice(index, self.client.submit(prompt, sampling, routing=routing, wake=wake), text)
            if resolved.best_of:
                drawn.append(choice)
            else:
                yield choice

    def resolve(self, ids: Sequence[int], params: SamplingParams, *, param: str = "prompt") -> SamplingParams:
        """What the engine is sent for this prompt; raises RequestError, naming `param`, when it cannot be served."""
        model, capacity = self.client.model, self.client.capacity
        limit = model.max_model_len
        if not ids:
            raise RequestError("the prompt is empty; it must hold at least one token", param=param)
        if len(ids) >= limit:
            raise RequestError(
                f"this model's maximum context length is {limit} tokens, and the prompt has {len(ids)}; it must leave room for at least one more",
                param=param,
                code="context_length_exceeded",
            )
        if capacity is not None and len(ids) >= capacity.num_tokens:
            raise RequestError(
                f"the KV cache holds {capacity.num_tokens} tokens, and the prompt has {len(ids)}",
                param=param,
                code="context_length_exceeded",
            )
        if min(ids) < 0 or max(ids) >= model.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
            raise RequestError(
                f"token id {str(wrong)[:80]} is not in the vocabulary, which has ids 0 to {model.vocab_size - 1}",
                param=param,
            )
        if params.max_tokens is not None and params.max_tokens > limit:
            raise RequestError(
                f"max_tokens must not exceed the context length of {limit} tokens, got {params.max_tokens}",
                param="max_tokens",
            )
        resolved = params.resolve(eos_token_ids=model.eos_token_ids, vocab_size=model.vocab_size, room=limit - len(ids))
        if params.beam_width and capacity is not None:
            _check_beams(len(ids), resolved, limit, capacity)
        if len(resolved.stop_token_ids) > MAX_TOKEN_IDS:  # with the model's own, more than the wire takes
            raise RequestError(
                f"stop_token_ids: at most {MAX_TOKEN_IDS - len(model.eos_token_ids)} ids", param="stop_token_ids"
            )
        return resolved


class _Request:
    """The sequences of one prompt."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.parts: list[_Choice | _Search | _Best] = []
        self._prompt = list(prompt)
        self._num_cached = 0

    @property
    def finished(self) -> bool:
        return all(part.finished for part in self.parts)

    def advance(self, request_id: str) -> RequestOutput | None:
        """What is new, or None. Raises what ended a sequence."""
        moved = [output for part in self.parts if not part.finished for output in part.advance()]
        if not moved:
            return None
        self._num_cached = self._num_cached or max(part.num_cached for part in self.parts)
        return RequestOutput(
            request_id, None, self._prompt, moved, finished=self.finished, num_cached_tokens=self._num_cached
        )

    def close(self) -> None:
        for part in self.parts:
            part.close()


class _Choice:
    """One of the sequences of a request."""

    def __init__(self, index: int, stream: TokenStream, detokenizer: Detokenizer) -> None:
        self.index = index
        self.stream = stream
        self.finished = False
        self.num_cached = 0
        self.logprob = 0.0  # of what counts
        self._detokenizer = detokenizer

    def advance(self) -> list[CompletionOutput]:
        """What is new, if anything. Raises what ended the sequence."""
        delta = self.stream.take()
        if delta is None:
            return []
        self.num_cached = delta.num_cached
        new = self._detokenizer.push(delta.tokens, delta.finish)
        if new.finish_reason is not None:
            self.finished = True
            self.close()  # the engine does not know of stop strings
        self.logprob += sum(delta.logprobs[: len(new.token_ids)])
        return [CompletionOutput(self.index, new.text, new.token_ids, new.finish_reason, new.stop_reason)]

    def close(self) -> None:
        self.stream.close()


class _Best:
    """Sequences of which the likeliest are the choices of a request, which come at once, best first."""

    def __init__(self, drawn: Sequence[_Choice], number: int) -> None:
        self.finished = False
        self._drawn, self._number = drawn, number
        self._whole = Accumulator()

    @property
    def num_cached(self) -> int:
        return max(choice.num_cached for choice in self._drawn)

    def advance(self) -> list[CompletionOutput]:
        """As a `_Choice`."""
        for choice in self._drawn:
            if not choice.finished:
                self._whole.add(RequestOutput("", None, [], choice.advance()))
        self.finished = all(choice.finished for choice in self._drawn)
        if not self.finished:
            return []
        outputs = self._whole.total().outputs
        for choice, output in zip(self._drawn, outputs, strict=True):
            output.cumulative_logprob = choice.logprob
        best = sorted(self._drawn, key=lambda choice: -choice.logprob)[: self._number]
        return [replace(outputs[choice.index], index=rank) for rank, choice in enumerate(best)]

    def close(self) -> None:
        for choice in self._drawn:
            choice.close()


class _Search:
    """A beam search: one sequence to the engine, and all choices of a request, which come at once."""

    def __init__(self, stream: TokenStream, detokenizers: Sequence[Detokenizer]) -> None:
        self.stream = stream
        self.finished = False
        self.num_cached = 0
        self._detokenizers = detokenizers

    def advance(self) -> list[CompletionOutput]:
        """As a `_Choice`."""
        delta = self.stream.take()
        if delta is None:
            return []
        self.finished, self.num_cached = True, delta.num_cached
        outputs = []
        for index, (found, detokenizer) in enumerate(zip(delta.hypotheses, self._detokenizers, strict=True)):
            new = detokenizer.push(found.tokens, found.finish)
            outputs.append(
                CompletionOutput(index, new.text, new.token_ids, new.finish_reason, new.stop_reason, found.logprob)
            )
        return outputs

    def close(self) -> None:
        self.stream.close()


def _check_routing(routing: Routing) -> None:
    """What cannot cross the wire must not reach it: one connection carries everybody's requests."""
    try:
        encode(routing)
    except (OverflowError, UnicodeEncodeError) as error:
        raise RequestError(f"priority, tenant or salt cannot be sent: {error}", param="priority") from None


def _check_beams(num_prompt: int, params: SamplingParams, max_model_len: int, capacity: Capacity) -> None:
    """Whether all beams can be computed side by side."""
    if params.beam_width > capacity.max_num_seqs:
        raise RequestError(
            f"the engine computes {capacity.max_num_seqs} sequences at once, and so no {params.beam_width} beams",
            param="beam_width",
        )
    limit = min(num_prompt + (params.max_tokens or 0), max_model_len)
    needed = most_blocks(num_prompt, limit, params.beam_width, capacity.block_size)
    if needed > capacity.num_blocks:
        raise RequestError(
            f"{params.beam_width} beams of up to {limit} tokens need {needed} blocks of the KV cache, which has"
            f" {capacity.num_blocks}: lower max_tokens or the number of beams",
            param="max_tokens",
        )


def _shifted(seed: int, by: int) -> int:
    """`seed + by` within int64, wrapping around."""
    return (seed + by + 2**63) % 2**64 - 2**63 if seed > INT64_MAX - by else seed + by
