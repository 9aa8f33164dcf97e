"""POST /v1/chat/completions"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ...common.errors import RequestError
from ..outputs import CompletionOutput
from ..service import Service
from ..sse import EventTemplate, event, started, while_connected
from .answers import Deltas, Job, UsageCount, check_stream_options, json_answer, request_id, whole
from .cache_control import pin_of
from .protocol import ChatRequest, StreamOptions, described
from .requests import chat_options_of, messages_of, read, routing_of, sampling_of, warnings
from .responses import ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatMessage, usage_of

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=described(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    generator = service.require()
    body = await read(request, ChatRequest)
    check_stream_options(body)
    model = service.check_model(body.model)
    headers = warnings(body, strict=service.client.config.server.strict_fields)
    with _limit_named_as_sent(body):
        params = sampling_of(body, service.client.model.default_sampling, max_tokens=None)
        messages, options = messages_of(body), chat_options_of(body)
        prompt = await generator.tokenizer.encode_chat(messages, options)
        generator.resolve(prompt, params, param="messages")
        pin = await pin_of(body, messages, options, prompt, generator.tokenizer)
    job = Job(generator, request_id(request, "chatcmpl"), model, [prompt], params, routing_of(request, body, pin))
    if body.stream:
        return await started(request, _events(job, job.deltas(), body.stream_options), headers)
    outputs = await while_connected(request.receive, whole(job.deltas(), 1))
    choices = [
        ChatChoice(output.index, ChatMessage(output.text), output.finish_reason, output.stop_reason)
        for output in outputs[0].outputs
    ]
    return json_answer(ChatCompletion(job.id, job.created, job.model, choices, usage_of(outputs)), headers)


@contextmanager
def _limit_named_as_sent(body: ChatRequest) -> Iterator[None]:
    """`max_completion_tokens` is the newer name of `max_tokens`; without either an answer may fill the context."""
    newer = body.max_completion_tokens
    if newer is not None:
        body.max_tokens = newer
    try:
        yield
    except RequestError as error:
        if newer is not None and error.param == "max_tokens":
            error.param, error.message = (
                "max_completion_tokens",
                error.message.replace("max_tokens", "max_completion_tokens"),
            )
        raise


async def _events(job: Job, deltas: Deltas, options: StreamOptions | None) -> AsyncGenerator[bytes, None]:
    count = UsageCount(job.prompts, options)
    templates: list[EventTemplate] = []  # of each choice, once it was greeted
    async with aclosing(deltas):
        async for index, delta in deltas:
            count.add(index, delta)
            events = []
            if not templates:
                for number in range(job.params.n):
                    events.append(_chunk(job, ChatChunkChoice(number, ChatDelta(role="assistant", content="")), count))
                    example = _chunk(job, ChatChunkChoice(number, ChatDelta(content="")), count)
                    templates.append(EventTemplate(example, "content"))
            for output in delta.outputs:
                if output.finish_reason or (output.text and count.in_each_chunk):
                    events.append(_chunk(job, _choice(output), count))
                elif output.text:
                    events.append(templates[output.index].event(output.text))
            if events:
                yield b"".join(events)
    if count.wanted:
        yield event(ChatChunk(job.id, job.created, job.model, [], usage=count.total()))


def _choice(output: CompletionOutput) -> ChatChunkChoice:
    return ChatChunkChoice(
        output.index, ChatDelta(content=output.text or None), output.finish_reason, output.stop_reason
    )


def _chunk(job: Job, choice: ChatChunkChoice, count: UsageCount) -> bytes:
    return event(ChatChunk(job.id, job.created, job.model, [choice], usage=count.in_chunk()))
