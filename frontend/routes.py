"""Routes beside OpenAI's: probes, metrics, version, and text to token ids and back."""

from importlib import metadata

from fastapi import APIRouter
from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..common.errors import RequestError
from . import errors
from .openai.answers import json_answer
from .openai.protocol import DetokenizeRequest, TokenizeChat, TokenizeText, described
from .openai.requests import chat_options_of, messages_of, read_json, validated, warnings
from .service import Service

router = APIRouter()


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Struct):
    prompt: str


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 as long as this process lives and its engine has not failed, also while it starts."""
    service: Service = request.app.state.service
    if service.client.ended and (error := service.unavailable) is not None:
        raise error
    return json_answer({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when requests are served; until then 503 with the phase of the start and its progress."""
    service: Service = request.app.state.service
    error = service.unavailable
    if error is None:
        return json_answer({"status": "ready"})
    phase, progress = service.progress
    content = errors.body(error, phase=phase, progress=progress, detail=service.client.status.detail)
    return Response(content, error.status, {**errors.headers(error)}, "application/json")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The whole engine's metrics, whichever frontend is asked."""
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
