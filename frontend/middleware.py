"""What every request passes before a route sees it. Plain ASGI: nothing here buffers a body or a response."""

import string
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.errors import RequestError
from ..common.messages import Quota
from . import errors, keys

MAX_URL_BYTES = 8 << 10
MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 << 10  # all of them
MAX_REQUEST_ID = 128
OPEN_PATHS = frozenset({"/health", "/ready", "/startup"})  # a probe has no key
INFERENCE_PATHS = frozenset({"/tokenize", "/detokenize"})  # besides /v1/; all else is an operator's
SMALL_BODY = 256 << 10
LARGE_BODIES = 16  # of the largest size, that may be arriving at once; small ones always may
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
    """Every path but the probes' asks for a key whose scope it is. Leaves the key's `principal` and `quota` in `state`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.ring = keys.KeyRing()  # nobody is asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["principal"], state["quota"] = "", Quota()
        known = self.ring.current(time.monotonic())
        needed = scope_of(scope["path"])
        if known and needed is not None:
            scheme, _, sent = _header(scope, b"authorization").partition(b" ")
            key = keys.find(known, sent.strip())
            if scheme.lower() != b"bearer" or key is None:
                message = "missing or wrong API key; send 'Authorization: Bearer KEY'"
                await answer(RequestError(message, status=401), send)
                return
            if needed not in key.scopes:
                message = f"this needs a key with the scope {needed}; the key {key.tenant} has {', '.join(key.scopes)}"
                await answer(RequestError(message, status=403, code="scope_missing"), send)
                return
            state["principal"], state["quota"] = key.tenant, key.quota
        await self.app(scope, receive, send)


def scope_of(path: str) -> keys.Scope | None:
    """What a key needs for a path, as the router reads it; None for what is open."""
    if path in OPEN_PATHS:
        return None
    return "inference" if path.startswith("/v1/") or path in INFERENCE_PATHS else "admin"


class BodyLimit:
    """A body of at most `limit` bytes, counted as it comes, and a bound on all that are being received."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit
        self._held = 0  # bytes of requests without an answer so far

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            await answer(self._too_large(), send)
            return
        received = held = 0

        async def receive_counted() -> Message:
            nonlocal received, held
            message = await receive()
            size = len(message.get("body", b""))
            received, held = received + size, held + size
            self._held += size
            if received > self.limit:
                raise self._too_large()
            if received > SMALL_BODY and self._held > self.limit * LARGE_BODIES:
                raise RequestError("too many large requests are arriving at once", status=503)
            return message

        def let_go() -> None:
            nonlocal held
            self._held -= held
            held = 0

        async def send_counted(message: Message) -> None:
            let_go()
            await send(message)

        try:
            await self.app(scope, receive_counted, send_counted)
        finally:
            let_go()

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
