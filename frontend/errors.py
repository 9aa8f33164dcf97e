"""Errors to HTTP answers, in OpenAI's shape. The one place that knows statuses, types and codes."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ..common.errors import EngineError, RequestError
from .streams import RETRY_AFTER_S, EngineDead

MAX_MESSAGE = 1000  # characters; errors must not echo what a client sent at length


class Kind(NamedTuple):
    type: str
    code: str | None  # where the error itself brings none
    headers: dict[str, str] = {}


_GONE = {"Connection": "close"}  # the rest of the request is not read
KINDS = {
    400: Kind("invalid_request_error", None, {"X-Should-Retry": "false"}),
    401: Kind("authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}),
    403: Kind("permission_error", "host_not_allowed"),
    404: Kind("invalid_request_error", "not_found"),
    405: Kind("invalid_request_error", "method_not_allowed"),
    408: Kind("invalid_request_error", "request_timeout", _GONE),
    413: Kind("invalid_request_error", "request_too_large", _GONE),
    414: Kind("invalid_request_error", "request_too_large", _GONE),
    431: Kind("invalid_request_error", "request_too_large", _GONE),
    500: Kind("internal_error", "internal_error"),
    503: Kind("service_unavailable", "overloaded", {"Retry-After": str(RETRY_AFTER_S)}),
}


def as_request_error(error: RequestError | EngineError) -> RequestError:
    """An engine's fault as the answer to the request that met it."""
    if isinstance(error, RequestError):
        return error
    return RequestError(
        str(error), status=500, code="engine_dead" if isinstance(error, EngineDead) else "internal_error"
    )


def internal_error() -> RequestError:
    """A bug of ours: the client is told that there was one, the log what it was."""
    return RequestError("internal error; the server's log has more", status=500)


def body(error: RequestError, **more: object) -> bytes:
    """The JSON of an error; `more` stands beside it."""
    kind = KINDS.get(error.status, KINDS[400])
    described = {
        "message": error.message[:MAX_MESSAGE],
        "type": kind.type,
        "param": error.param,
        "code": error.code or kind.code,
    }
    return msgspec.json.encode({"error": described, **more})


def headers(error: RequestError) -> Mapping[str, str]:
    kind = KINDS.get(error.status, KINDS[400])
    return {**kind.headers, **error.headers}
