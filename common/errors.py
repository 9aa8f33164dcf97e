"""Errors that are a user's to mend. Anything else that is raised is a bug of ours.

`RequestError` becomes an HTTP answer in OpenAI's shape; `ConfigError` ends a process with exit code 1 and its message
alone, no traceback; `EngineError` is a fault of the engine that a request's owner must hear of.
"""

from collections.abc import Mapping
from http import HTTPStatus

EXIT_CONFIG = 1  # the user's configuration or model cannot be served: retrying changes nothing
EXIT_FATAL = 70  # a part of the engine died (EX_SOFTWARE in sysexits.h)


class QuireError(Exception):
    """Base of every error that Quire raises on purpose."""


class ConfigError(QuireError):
    """An option, a file or the machine does not allow to serve. The message names the value and the way out."""


class EngineError(QuireError):
    """The engine failed while it held a request."""


class RequestError(QuireError):
    """A request cannot be served as it is.

    `status` is the HTTP status, `param` the request's field at fault (None when none is), `code` a stable
    machine-readable word, `headers` what the answer carries besides.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
