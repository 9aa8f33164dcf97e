"""Routes beside OpenAI's: probes, metrics, version, and text to token ids and back."""

from importlib import metadata
from typing import Any

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..common.errors import RequestError
from . import errors
from .openai.answers import json_answer
from .openai.protocol import DetokenizeRequest, TokenizeChat, TokenizeText, described
from .openai.requests import chat_options_of, messages_of, read_json, validated, warnings
from .service import Health, Service

router = APIRouter()


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Struct):
    prompt: str


def _probe(no: str, yes: str) -> dict[int | str, dict[str, Any]]:
    """What a probe answers, for the description of the API."""
    told = {"status": "string", "phase": "string", "progress": "number", "detail": "string"}
    schema = {"type": "object", "properties": {name: {"type": kind} for name, kind in told.items()}}
    content = {"application/json": {"schema": schema}}
    return {200: {"description": yes, "content": content}, 503: {"description": no, "content": content}}


def _told(health: Health, error: RequestError | None) -> Response:
    content = msgspec.structs.asdict(health)
    if error is None:
        return json_answer(content)
    return Response(errors.body(error, **content), error.status, {**errors.headers(error)}, "application/json")


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=_probe("It does not: restart it", "It works, or starts, or mends itself"))
async def health(request: Request) -> Response:
    """For liveness probes: whether this process and its engine work, are about to, or need help.

    503 when no progress is made ("stalled") and when the engine is gone for good ("dead").
    """
    service: Service = request.app.state.service
    health = service.health
    return _told(health, service.unready if health.status in ("stalled", "dead") else None)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=_probe("Not at once", "Requests are served at once"))
async def ready(request: Request) -> Response:
    """For readiness probes and balancers: whether a request would be served at once.

    While the engine recovers it would wait, and this is 503.
    """
    service: Service = request.app.state.service
    return _told(service.health, service.unready)


@router.head("/startup", include_in_schema=False)
@router.get("/startup", responses=_probe("It loads", "The start is over, whatever happened since"))
async def startup(request: Request) -> Response:
    """For startup probes: whether the engine has been ready once; until then its phase and progress."""
    service: Service = request.app.state.service
    return _told(service.health, None if service.has_served else service.unavailable)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The whole engine's metrics, whichever frontend is asked; the last known ones while the scheduler is silent."""
    service: Service = request.app.state.service
    if service.generator is None and (error := service.unavailable) is not None:
        raise error
    return Response(await service.client.stats(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version")
async def version() -> Response:
    return json_answer({"version": metadata.version("quire")})


@router.post("/tokenize", openapi_extra=described(TokenizeText))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or of messages, as a generating route would have them."""
    service: Service = request.app.state.service
    tokenizer = service.require().tokenizer
    fields = await read_json(request)
    body = validated(fields, TokenizeChat) if "messages" in fields else validated(fields, TokenizeText)
    service.check_model(body.model)
    headers = warnings(body, strict=service.client.config.server.strict_fields)
    if isinstance(body, TokenizeChat):
        ids = await tokenizer.encode_chat(messages_of(body), chat_options_of(body))
    else:
        ids = await tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    limit = service.client.model.max_model_len
    if body.return_token_strs and len(ids) > limit:
        raise RequestError(
            f"return_token_strs is for what fits the context of {limit} tokens, and this has {len(ids)}",
            param="return_token_strs",
        )
    strings = await tokenizer.token_strings(ids) if body.return_token_strs else UNSET
    return json_answer(Tokenized(len(ids), limit, ids, strings), headers)


@router.post("/detokenize", openapi_extra=described(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    service: Service = request.app.state.service
    tokenizer = service.require().tokenizer
    body = validated(await read_json(request), DetokenizeRequest)
    service.check_model(body.model)
    headers = warnings(body, strict=service.client.config.server.strict_fields)
    vocab_size = service.client.model.vocab_size
    if wrong := [i for i in body.tokens if not 0 <= i < vocab_size]:
        raise RequestError(
            f"token id {str(wrong[0])[:80]} is not in the vocabulary, which has ids 0 to {vocab_size - 1}",
            param="tokens",
        )
    return json_answer(Detokenized(await tokenizer.decode(body.tokens)), headers)
