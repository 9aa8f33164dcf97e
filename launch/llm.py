"""The Python API: `LLM` for scripts and notebooks, `AsyncLLM` for programs with an event loop of their own.

    from quire import LLM, SamplingParams
    with LLM("demo") as llm:
        print(llm.chat([{"role": "user", "content": "What is 17 + 25?"}])[0].outputs[0].text)

Any option of the engine is a keyword, under its name with underscores: LLM("demo", tensor_parallel_size=2).
"""

import asyncio
import operator
import sys
import time
import uuid
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.config import EngineConfig
from ..common.errors import EngineError, RequestError
from ..common.sampling import SamplingParams, check
from ..frontend.outputs import Accumulator, RequestOutput
from .local_engine import LocalEngine
from .options import from_keywords
from .progress import report_on

if TYPE_CHECKING:
    from rich.progress import Progress

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": text} or {"prompt_token_ids": ids}
Messages = Sequence[Mapping[str, Any]]
_PROMPT = "a prompt is text, token ids, or a dict with 'prompt' or 'prompt_token_ids'"
_AHEAD = 2  # sequences submitted per sequence that may run: the scheduler always has one to admit


@dataclass(slots=True)
class _Tally:
    """How far a batch has come; written on the engine's thread, read on the caller's."""

    requests: int = 0
    tokens: int = 0


class LLM:
    """An engine of this process' own. Its methods block; call them from one thread or several.

    A process that dies is started again, and what runs goes on. Raises ConfigError when the options or the model cannot
    be served, EngineError when the engine is gone for good. Prompts are computed in as large chunks as
    `max_num_batched_tokens` allows, unless `target_itl` is given. `close`, the end of a `with`, of the object or of the
    program end its processes.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        config = _configuration(model, {"target_itl": 0.0, **options})  # nobody watches these tokens come
        report = report_on(sys.stderr) if sys.stderr.isatty() else None
        self._engine = LocalEngine(config, report.show if report else lambda _: None)
        self._close = weakref.finalize(self, self._engine.close)
        self._limit = _AHEAD * config.scheduler.max_num_seqs
        try:
            self._engine.ready.result()
        except BaseException:
            self.close()
            raise
        finally:
            if report:
                report.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The whole outputs, in the order of the prompts. `use_tqdm` shows a progress bar.

        Without `sampling_params` the model's own recommendations count. Raises RequestError for a prompt that cannot
        be served; the others are then aborted.
        """
        given = _prompts(prompts)
        params = _params_of_each(sampling_params, len(given), self._defaults())
        return self._all([_ids_or_text(prompt) for prompt in given], params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """The answers to one conversation or several. `template`: add_generation_prompt, continue_final_message,
        template_kwargs, as in frontend.chat_template.ChatOptions. An answer may be as long as the context allows."""
        if not isinstance(messages, Sequence):
            raise RequestError(f"messages must be a list of dicts with role and content, got {messages!r:.80}")
        given = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = _params_of_each(sampling_params, len(given), self._defaults(max_tokens=None))
        encode = self._engine.generator.tokenizer.encode_chat

        async def encode_all() -> list[list[int]]:
            return [await encode(conversation, _chat_options(template)) for conversation in given]  # type: ignore[arg-type]

        return self._all(self._engine.call(encode_all()), params, use_tqdm)

    def get_metrics(self) -> dict[str, float]:
        """What a server's /metrics would show, by name; values that differ in labels alone are added up."""
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 (rarely asked for)

        totals: defaultdict[str, float] = defaultdict(float)
        text = self._engine.call(self._engine.generator.client.stats()).decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[sample.name] += sample.value
        return dict(totals)

    def close(self) -> None:
        """End the engine. May be called twice."""
        self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _defaults(self, **changes: Any) -> SamplingParams:
        return check({**self._engine.generator.client.model.default_sampling, **changes})

    def _all(
        self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        tally = _Tally()
        work = _generate_all(self._engine, list(zip(prompts, params, strict=True)), self._limit, tally)
        if not use_tqdm or not prompts:
            return self._engine.call(work)
        with _progress_bar() as progress:
            task, began = progress.add_task("generating", total=len(prompts), speed=""), time.monotonic()

            def tick() -> None:
                speed = f"{tally.tokens / (time.monotonic() - began):,.0f} tokens/s"
                progress.update(task, completed=tally.requests, speed=speed)

            outputs = self._engine.call(work, tick)
            tick()
            return outputs


class AsyncLLM:
    """As `LLM`, for any running event loop. It starts in the background: `async with` waits until it serves.

    Only its options are checked at once. Starting errors are raised by `ready`, and by the first request.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self._engine = LocalEngine(_configuration(model, options))
        self._close = weakref.finalize(self, self._engine.close)

    async def ready(self) -> None:
        """Return when requests are served at once."""
        await asyncio.wrap_future(self._engine.ready)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far, whole, each time it has grown. Ending the iteration early aborts the request."""
        await self.ready()
        params = sampling_params or check(dict(self._engine.generator.client.model.default_sampling))
        async for output in self._stream(
            _ids_or_text(prompt), _checked(params), request_id or uuid.uuid4().hex, priority
        ):
            yield output

    async def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **template: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation; `template` as in LLM.chat."""
        await self.ready()
        generator = self._engine.generator
        params = _checked(sampling_params or check({**generator.client.model.default_sampling, "max_tokens": None}))
        encoding = self._engine.start(generator.tokenizer.encode_chat(messages, _chat_options(template)))
        ids = await asyncio.wrap_future(encoding)
        async for output in self._stream(ids, params, request_id or uuid.uuid4().hex, priority):
            yield output

    async def close(self) -> None:
        """End the engine. May be called twice."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> "AsyncLLM":
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stream(
        self, prompt: str | Sequence[int], params: SamplingParams, request_id: str, priority: int
    ) -> AsyncIterator[RequestOutput]:
        loop, moved, deltas = asyncio.get_running_loop(), asyncio.Event(), deque[RequestOutput]()
        generate = self._engine.generator.generate

        async def pump() -> None:
            async for delta in generate(prompt, params, request_id=request_id, priority=priority):
                deltas.append(delta)
                loop.call_soon_threadsafe(moved.set)

        pumping = self._engine.start(pump())
        pumping.add_done_callback(lambda _: loop.call_soon_threadsafe(moved.set))
        accumulator = Accumulator()
        try:
            while not pumping.done() or deltas:
                await moved.wait()
                moved.clear()
                if deltas:
                    while deltas:
                        accumulator.add(deltas.popleft())
                    yield accumulator.total()
            if error := pumping.exception():
                raise self._engine.explained(error) if isinstance(error, EngineError) else error
        finally:
            pumping.cancel()


async def _generate_all(
    engine: LocalEngine, jobs: Sequence[tuple[str | Sequence[int], SamplingParams]], limit: int, tally: _Tally
) -> list[RequestOutput]:
    """On the engine's loop. At most `limit` sequences are with the scheduler, whose queue is finite."""
    widest = max((params.num_sequences for _, params in jobs), default=1)
    room = asyncio.Semaphore(max(1, limit // widest))

    async def one(index: int, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
        accumulator = Accumulator()
        async with room:
            async for delta in engine.generator.generate(prompt, params, request_id=str(index)):
                accumulator.add(delta)
                tally.tokens += sum(len(output.token_ids) for output in delta.outputs)
        tally.requests += 1
        return accumulator.total()

    tasks = [asyncio.create_task(one(index, *job)) for index, job in enumerate(jobs)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _configuration(model: str, options: Mapping[str, Any]) -> EngineConfig:
    return from_keywords({"log_level": "warning", **options, "model": model})


def _prompts(prompts: Any) -> list[Any]:
    """One prompt in any form is a list of one. A list of integers is one prompt, of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"{_PROMPT}, or a list of these; got {prompts!r:.80}", param="prompt")
    given = list(prompts)
    return [given] if given and all(isinstance(item, int) for item in given) else given


def _ids_or_text(prompt: Any) -> str | list[int]:
    match prompt:
        case str():
            return prompt
        case {"prompt_token_ids": ids}:
            return _ids(ids)
        case {"prompt": str(text)}:
            return text
        case Mapping():
            named = ", ".join(map(str, prompt)) or "no keys"
            raise RequestError(f"{_PROMPT}; this one has {named:.80}", param="prompt")
    return _ids(prompt)


def _ids(values: Any) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise RequestError(f"{_PROMPT}, got {values!r:.80}", param="prompt") from None


def _params_of_each(params: Any, count: int, default: SamplingParams) -> list[SamplingParams]:
    if params is None:
        return [default] * count
    if not isinstance(params, list | tuple):
        return [_checked(params)] * count
    if len(params) != count:
        raise RequestError(f"there are {count} prompts, but {len(params)} sampling_params", param="sampling_params")
    return [_checked(one) for one in params]


def _checked(params: Any) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"sampling_params must be a SamplingParams or a list of them, got {params!r:.80}", param="sampling_params"
        )
    return params.checked()


def _chat_options(template: Mapping[str, Any]) -> Any:
    from ..frontend.chat_template import ChatOptions  # noqa: PLC0415 (loads with the tokenizer)

    try:
        return ChatOptions(**template)
    except TypeError as error:
        raise RequestError(f"{error}; there are {', '.join(ChatOptions.__struct_fields__)}") from None


def _progress_bar() -> "Progress":
    from rich.console import Console  # noqa: PLC0415 (30 ms that only a bar is worth)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
