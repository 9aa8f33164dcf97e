"""What every request passes before a route sees it. Plain ASGI: nothing here buffers a body or a response."""

import hmac
import string
import uuid
from collections.abc import Collection, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common import keys
from ..common.errors import RequestError
from . import errors

MAX_URL_BYTES = 8 << 10
MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 << 10  # all of them
MAX_REQUEST_ID = 128
OPEN_PATHS = frozenset({"/health", "/ready"})  # a probe has no key
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.:")


async def answer(error: RequestError, send: Send) -> None:
    """Send an error as the whole response."""
    content = errors.body(error)
    fields = {"content-type": "application/json", "content-length": str(len(content)), **errors.headers(error)}
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})


class RequestIds:
    """Gives each request an id, the client's own if it brought one, and names it in the response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = _header(scope, b"x-request-id").decode("latin-1")
        is_clean = 0 < len(given) <= MAX_REQUEST_ID and _ID_CHARACTERS.issuperset(given)
        request_id = given if is_clean else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, send_named)


class HeadLimits:
    """URL and headers of a sane size, or 414 and 431."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        url = len(scope["raw_path"]) + len(scope["query_string"])
        total = sum(len(name) + len(value) for name, value in scope["headers"])
        if url > MAX_URL_BYTES:
            await answer(RequestError(f"the URL has {url} bytes, the limit is {MAX_URL_BYTES}", status=414), send)
        elif total > MAX_HEADER_BYTES or len(scope["headers"]) > MAX_HEADERS:
            limits = f"the limits are {MAX_HEADER_BYTES} bytes and {MAX_HEADERS} headers"
            await answer(RequestError(f"{len(scope['headers'])} headers of {total} bytes; {limits}", status=431), send)
        else:
            await self.app(scope, receive, send)


class AllowedHosts:
    """A server on loopback answers only to names of loopback, or a web page could reach it by rebinding its own name."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        """No `names`: every host is allowed."""
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if self.names and not all(_host_name(host) in self.names for host in hosts):
            message = f"this server listens on loopback and answers only to {', '.join(sorted(self.names))}"
            await answer(RequestError(message, status=403), send)
        else:
            await self.app(scope, receive, send)


class ApiKeys:
    """Every path but the probes' asks for one of the keys. Leaves a name for the key in `state["principal"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.digests: tuple[str, ...] = ()

    def use(self, digests: Iterable[str]) -> None:
        """From now on, the keys that `common.keys` made these of; none: nobody is asked."""
        self.digests = tuple(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal = ""
        if self.digests and scope["path"] not in OPEN_PATHS:
            scheme, _, key = _header(scope, b"authorization").partition(b" ")
            given = keys.digest(key.strip())
            # All of them: time must not tell which.
            matches = [hmac.compare_digest(given, known) for known in self.digests]
            if scheme.lower() != b"bearer" or not any(matches):
                await answer(
                    RequestError("missing or wrong API key; send 'Authorization: Bearer KEY'", status=401), send
                )
                return
            principal = given.removeprefix("sha256:")[:16]
        scope.setdefault("state", {})["principal"] = principal
        await self.app(scope, receive, send)


class BodyLimit:
    """A body of at most `limit` bytes, counted as it comes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            await answer(self._too_large(), send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, receive_counted, send)

    def _too_large(self) -> RequestError:
        return RequestError(f"the request body is larger than {self.limit} bytes (--max-body-bytes)", status=413)


def _header(scope: Scope, wanted: bytes) -> bytes:
    value: bytes = next((value for name, value in scope["headers"] if name == wanted), b"")
    return value


def _host_name(host: str) -> str:
    """The name in a Host header: without port, lower case, [::1] without brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
