"""POST /v1/completions"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ...common.errors import RequestError
from ...common.sampling import SamplingParams
from ..outputs import CompletionOutput, RequestOutput
from ..service import Service
from ..sse import EventTemplate, event, started, while_connected
from ..tokenizer import Tokenizer
from .answers import Deltas, Job, UsageCount, check_stream_options, json_answer, request_id, whole
from .cache_control import NO_PIN, Pin
from .protocol import CompletionRequest, StreamOptions, described
from .requests import read, routing_of, sampling_of, warnings
from .responses import Completion, CompletionChoice, usage_of

router = APIRouter()

MAX_PROMPTS = 1024
MAX_SEQUENCES = 4096  # prompts times n, or times beams
DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", openapi_extra=described(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one prompt, or several: text or token ids."""
    service: Service = request.app.state.service
    generator = service.require()
    body = await read(request, CompletionRequest)
    check_stream_options(body)
    model = service.check_model(body.model)
    headers = warnings(body, strict=service.client.config.server.strict_fields)
    echo_only = bool(body.echo) and body.max_tokens == 0  # the prompt and nothing else
    if echo_only:
        body.max_tokens = 1
    params = sampling_of(body, service.client.model.default_sampling, max_tokens=DEFAULT_MAX_TOKENS)
    given = prompts_of(body.prompt, params)
    prompts = await _encoded(given, generator.tokenizer, add_special_tokens=body.add_special_tokens)
    for prompt in prompts:
        generator.resolve(prompt, params)
    echoed = await _texts(given, generator.tokenizer) if body.echo else [""] * len(prompts)
    pin = Pin(body.cache_control.seconds) if body.cache_control else NO_PIN
    job = Job(generator, request_id(request, "cmpl"), model, prompts, params, routing_of(request, body, pin))
    deltas = _nothing_generated(job) if echo_only else job.deltas()
    if body.stream:
        return await started(request, _events(job, deltas, echoed, body.stream_options), headers)
    outputs = await while_connected(request.receive, whole(deltas, len(prompts)))
    choices = [_choice(job, index, output, echoed) for index, total in enumerate(outputs) for output in total.outputs]
    return json_answer(Completion(job.id, job.created, job.model, choices, usage=usage_of(outputs)), headers)


def prompts_of(prompt: Any, params: SamplingParams) -> list[str] | list[list[int]]:
    """Every shape a prompt may have as a list of prompts; raises RequestError for any other."""
    prompts = [prompt] if not isinstance(prompt, list) or (prompt and _are_ids(prompt)) else prompt
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt may hold {MAX_PROMPTS} prompts at most, got {len(prompts)}", param="prompt")
    is_text = all(isinstance(item, str) for item in prompts)
    is_ids = all(isinstance(item, list) and _are_ids(item) for item in prompts)
    if not prompts or not (is_text or is_ids):
        raise RequestError(
            "prompt must be a string, a list of token ids, or a list of either, and not empty", param="prompt"
        )
    if len(prompts) * params.num_sequences > MAX_SEQUENCES:
        raise RequestError(
            f"prompts times n may be {MAX_SEQUENCES} at most, got {len(prompts)} x {params.num_sequences}", param="n"
        )
    return prompts


def _are_ids(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int}  # bool is an int to isinstance


async def _encoded(
    prompts: list[str] | list[list[int]], tokenizer: Tokenizer, *, add_special_tokens: bool
) -> list[list[int]]:
    return [
        await tokenizer.encode(prompt, add_special_tokens=add_special_tokens) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


async def _texts(prompts: list[str] | list[list[int]], tokenizer: Tokenizer) -> list[str]:
    return [prompt if isinstance(prompt, str) else await tokenizer.decode(prompt) for prompt in prompts]


async def _nothing_generated(job: Job) -> Deltas:
    """Ends each choice at once."""
    for index, prompt in enumerate(job.prompts):
        outputs = [CompletionOutput(choice, "", [], "length") for choice in range(job.params.n)]
        yield index, RequestOutput(job.id, None, list(prompt), outputs, finished=True)


async def _events(
    job: Job, deltas: Deltas, echoed: Sequence[str], options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    count = UsageCount(job.prompts, options)
    spoken: dict[int, EventTemplate] = {}  # choices that had a chunk, the first of which echoes; what the next are like
    async with aclosing(deltas):
        async for index, delta in deltas:
            count.add(index, delta)
            events = []
            for output in delta.outputs:
                number = index * job.params.n + output.index
                template = spoken.get(number)
                if template and output.finish_reason is None and not count.in_each_chunk:
                    if output.text:
                        events.append(template.event(output.text))
                    continue
                choice = _choice(job, index, output, None if template else echoed)
                if choice.text or choice.finish_reason:
                    events.append(_chunk(job, choice, count))
                    spoken[number] = EventTemplate(_chunk(job, CompletionChoice(number, "", None), count), "text")
            if events:
                yield b"".join(events)
    if count.wanted:
        yield event(Completion(job.id, job.created, job.model, [], usage=count.total()))


def _chunk(job: Job, choice: CompletionChoice, count: UsageCount) -> bytes:
    return event(Completion(job.id, job.created, job.model, [choice], usage=count.in_chunk()))


def _choice(job: Job, index: int, output: CompletionOutput, echoed: Sequence[str] | None) -> CompletionChoice:
    text = echoed[index] + output.text if echoed else output.text
    return CompletionChoice(index * job.params.n + output.index, text, output.finish_reason, output.stop_reason)
