"""Errors to HTTP answers, in OpenAI's shape. The one place that knows statuses, types and codes."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ..common.errors import EngineError, RequestError
from .streams import EngineDead

MAX_RETRY_AFTER_S = 3600.0
MAX_MESSAGE = 1000  # characters; errors must not echo what a client sent at length


class Kind(NamedTuple):
    type: str
    code: str | None  # where the error itself brings none
    headers: dict[str, str] = {}


def retry_after(seconds: float) -> dict[str, str]:
    """The header for `seconds`, in whole ones from 1 on; NaN is 1."""
    return {"Retry-After": str(math.ceil(min(max(1.0, seconds), MAX_RETRY_AFTER_S)))}


_NO_RETRY = {"X-Should-Retry": "false"}  # it would meet the same
_GONE = {"Connection": "close"}  # the rest of the request is not read
KINDS = {
    400: Kind("invalid_request_error", None, _NO_RETRY),
    401: Kind("authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"} | _NO_RETRY),
    403: Kind("permission_error", "host_not_allowed", _NO_RETRY),
    404: Kind("invalid_request_error", "not_found", _NO_RETRY),
    405: Kind("invalid_request_error", "method_not_allowed", _NO_RETRY),
    408: Kind("invalid_request_error", "request_timeout", _GONE),
    413: Kind("invalid_request_error", "request_too_large", _GONE | _NO_RETRY),
    414: Kind("invalid_request_error", "request_too_large", _GONE | _NO_RETRY),
    429: Kind("rate_limit_error", "rate_limit_exceeded", retry_after(1)),
    431: Kind("invalid_request_error", "request_too_large", _GONE | _NO_RETRY),
    500: Kind("internal_error", "internal_error"),
    503: Kind("service_unavailable", "overloaded", retry_after(1)),
    504: Kind("timeout_error", "timeout", _NO_RETRY),
}


def as_request_error(error: RequestError | EngineError, request_id: str = "") -> RequestError:
    """An engine's fault as the answer to the request that met it, which it names if it is that request's alone."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDead):
        return RequestError(str(error), status=500, code="engine_dead")
    message = f"{error} (request {request_id})" if request_id else str(error)
    return RequestError(message, status=500, code="internal_error", headers=_NO_RETRY)


def internal_error() -> RequestError:
    """A bug of ours: the client is told that there was one, the log what it was."""
    return RequestError("internal error; the server's log has more", status=500, headers=_NO_RETRY)


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
