"""/openapi.json: the routes as FastAPI knows them, with the bodies of answers and every status that a client may meet."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from msgspec import Struct

from .middleware import OPEN_PATHS
from .openai.models import ModelCard, ModelList
from .openai.responses import ChatCompletion, Completion
from .pins import PinList
from .routes import Detokenized, Tokenized

COMPONENT = "#/components/schemas/{name}"
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}  # of which a stream is made
EVENTS = {"text/event-stream": {"schema": EVENT}}
ANSWERS: Mapping[str, type[Struct]] = {
    "/tokenize": Tokenized,
    "/detokenize": Detokenized,
    "/pins": PinList,
    "/v1/models": ModelList,
    "/v1/models/{name}": ModelCard,
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
}
FOR_ALL = (400, 403, 408, 414, 431, 500, 503)
FOR_BODIES = (404, 413, 429, 504)
KEY = {"type": "http", "scheme": "bearer", "description": "One of the server's keys, if it has any."}


class Error(Struct):
    """What went wrong, and which field is to blame if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct):
    error: Error


class DescribedAPI(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _completed(super().openapi())
        return self.openapi_schema


def _completed(description: dict[str, Any]) -> dict[str, Any]:
    schemas, components = msgspec.json.schema_components([*ANSWERS.values(), ErrorAnswer], ref_template=COMPONENT)
    answers = dict(zip(ANSWERS, schemas[:-1], strict=True))
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            takes_body = method == "post"
            operation["responses"] = _responses(path, operation, answers.get(path), schemas[-1], takes_body=takes_body)
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {}]
            if takes_body:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                components |= schema.pop("$defs", {})
    return description | {"components": {"schemas": components, "securitySchemes": {"key": KEY}}}


def _responses(
    path: str, operation: dict[str, Any], answer: dict[str, Any] | None, error: dict[str, Any], *, takes_body: bool
) -> dict[str, Any]:
    """What the route declares itself stays as it is; FastAPI's own 422 is never answered."""
    declared = {status: told for status, told in operation["responses"].items() if status != "422"}
    if answer is not None:
        content: dict[str, Any] = {"application/json": {"schema": answer}}
        declared["200"]["content"] = content | EVENTS if "completions" in path else content
    elif path == "/metrics":
        declared["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    statuses = [*FOR_ALL, *(FOR_BODIES if takes_body else ()), *(() if path in OPEN_PATHS else (401,))]
    if "{" in path:
        statuses.append(404)
    wrong = {"application/json": {"schema": error}}
    told = {str(status): {"description": HTTPStatus(status).phrase, "content": wrong} for status in sorted(statuses)}
    return told | declared
