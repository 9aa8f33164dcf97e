"""Bodies of requests, from bytes to what the generator takes. Every refusal names the field."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pydantic
from starlette.requests import Request

from ...common.config import ServerConfig
from ...common.errors import RequestError
from ...common.sampling import SamplingParams, check
from .. import messages
from ..chat_template import ChatOptions
from ..json_body import Census, decode
from ..streams import Routing
from .cache_control import NO_PIN, Pin
from .protocol import UNSUPPORTED, Body, ChatInput, GenerationRequest

B = TypeVar("B", bound=Body)
T = TypeVar("T")
LARGE_BYTES = 64 << 10  # larger bodies are parsed in a thread
MAX_NAMED = 10  # unknown fields that a warning names

# Accepted without effect, and said so: they ask for bookkeeping at the provider's, not for another answer.
WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store"})


async def read(request: Request, body_type: type[B]) -> B:
    """The body of a request; raises RequestError for one that is not JSON, not of this type, or asks for what is not there."""
    return await _parsed(request, lambda fields: validated(fields, body_type))


async def read_json(request: Request) -> dict[str, Any]:
    return await _parsed(request, lambda fields: fields)


async def _parsed(request: Request, understand: Callable[[dict[str, Any]], T]) -> T:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps web pages of other origins out: a form may be posted anywhere
        raise RequestError(f"the Content-Type must be application/json, got {kind[:80] or 'none'}")
    content, census = bytearray(), Census()
    async for piece in request.stream():
        census.add(piece)
        content += piece
    request.scope["state"]["arrived_at"] = time.monotonic()
    if len(content) < LARGE_BYTES:
        return understand(decode(content, census))
    async with request.app.state.large_bodies:  # one at a time, so that the event loop waits for one at most
        return await asyncio.to_thread(lambda: understand(decode(content, census)))


def validated(fields: Mapping[str, Any], body_type: type[B]) -> B:
    try:
        body = body_type.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _explained(error) from None
    for name, value, path, unused in _extras(body):
        if name in unused and not messages.asks_for_nothing(value, unused[name]):
            raise RequestError(f"{path} is not supported by this server; leave it out", param=path)
    return body


def warnings(body: Body, *, strict: bool) -> dict[str, str]:
    """A header that names the fields which had no effect; with `strict` a RequestError instead."""
    unknown = [path for name, value, path, unused in _extras(body) if name not in unused and value is not None]
    if not unknown:
        return {}
    if strict:
        raise RequestError(
            f"unknown field {unknown[0][:100]!r} (the server runs with --strict-fields)", param=unknown[0][:100]
        )
    named = ", ".join(path[:100] for path in unknown[:MAX_NAMED]) + (", ..." if len(unknown) > MAX_NAMED else "")
    return {"X-Quire-Warning": "fields without effect: " + named.encode("unicode_escape").decode()}


def sampling_of(
    body: GenerationRequest, defaults: Mapping[str, float | int], *, max_tokens: int | None
) -> SamplingParams:
    """The request's parameters over the model's recommended `defaults`; `max_tokens` where neither is set."""
    asked = {name: value for name in SamplingParams.__struct_fields__ if (value := getattr(body, name)) is not None}
    if body.use_beam_search:
        asked["beam_width"] = body.beam_width or asked.pop("best_of", 0) or body.n or 1
    if asked.get("beam_width"):  # what a model recommends is for drawing tokens
        defaults = {}
    return check({"max_tokens": max_tokens, **defaults, **asked})


def routing_of(request: Request, body: GenerationRequest, pin: Pin = NO_PIN) -> Routing:
    """With a key, that is the tenant, whatever `user` says; without keys `user` divides what there is."""
    state = request.scope["state"]
    principal: str = state["principal"]
    options: ServerConfig = request.app.state.service.client.config.server
    return Routing(
        arrival=state["arrived_at"],
        priority=body.priority,
        tenant=principal or body.user or "",
        salt=wire_salt(principal, body.cache_salt or ""),
        quota=state["quota"],
        timeout_s=body.timeout or options.request_timeout or 0.0,
        max_queue_s=body.max_queue_time or options.max_queue_time or 0.0,
        pin_s=pin.seconds,
        pin_tokens=pin.num_tokens,
    )


def wire_salt(principal: str, salt: str) -> str:
    """Equal for equal pairs alone, since no principal holds a colon. Keys do not share prefixes: a hit would tell one
    what another has asked."""
    return f"{principal}:{salt}" if principal or salt else ""


def messages_of(body: ChatInput) -> list[dict[str, Any]]:
    """The messages as they were sent; `Tokenizer.encode_chat` checks what they hold."""
    return [message.model_dump(exclude={"cache_control"}) for message in body.messages]


def chat_options_of(body: ChatInput) -> ChatOptions:
    if body.add_generation_prompt and body.continue_final_message:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
        )
    prompted = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    return ChatOptions(
        add_generation_prompt=prompted,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        template_kwargs=body.chat_template_kwargs or {},
    )


def _extras(body: Body) -> Iterator[tuple[str, Any, str, Mapping[str, tuple[object, ...]]]]:
    """Fields of a body that its type does not declare: name, value, path, and what is unsupported at that place."""
    for name, value in (body.model_extra or {}).items():
        yield name, value, name, UNSUPPORTED
    if isinstance(body, GenerationRequest) and body.stream_options is not None:
        for name, value in (body.stream_options.model_extra or {}).items():
            yield name, value, f"stream_options.{name}", {}
    if isinstance(body, ChatInput):
        for i, message in enumerate(body.messages):
            for name, value in (message.model_extra or {}).items():
                yield name, value, f"messages[{i}].{name}", messages.UNSUPPORTED


def _explained(error: pydantic.ValidationError) -> RequestError:
    """pydantic lists a line per alternative; a client wants the field and what it should be."""
    details = error.errors(include_url=False, include_input=False)
    location = details[0]["loc"]
    reasons = dict.fromkeys(detail["msg"] for detail in details[:MAX_NAMED] if _path(detail["loc"]) == _path(location))
    path = _path(location)[:100]  # it may hold a key of the client's
    return RequestError(f"{path}: {' or '.join(list(reasons)[:3])}", param=path or None)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role, up to where the alternatives of a union begin."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float", "bool"):
            path += f".{step}" if path else step
        else:
            break
    return path
