"""The ASGI application: routes, in the layers that every request passes."""

from collections.abc import Collection
from importlib.metadata import version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..common.errors import EngineError, RequestError
from . import errors, routes
from .middleware import AllowedHosts, ApiKeys, BodyLimit, HeadLimits, RequestIds
from .openai import chat, completions, models
from .service import Service
from .sse import ClientGone

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it
FIRST_BODY_LIMIT = 1 << 20  # until the configuration is here; nothing is served before


class App:
    """One frontend's HTTP side. `configure` is called once the scheduler has sent the configuration."""

    def __init__(self, service: Service, hosts: Collection[str] = ()) -> None:
        """`hosts`: the only names that requests may call this server by; none: any."""
        self._body_limit = BodyLimit(_routes(service), FIRST_BODY_LIMIT)
        self._keys = ApiKeys(self._body_limit)
        self._layers: ASGIApp = RequestIds(HeadLimits(AllowedHosts(self._keys, hosts)))

    def configure(self, *, api_keys: Collection[str], max_body_bytes: int) -> None:
        self._keys.use(api_keys)
        self._body_limit.limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "lifespan and websockets are off"
        await self._layers(scope, receive, send)


def _routes(service: Service) -> FastAPI:
    app = FastAPI(title="Quire", version=version("quire"), redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for router in (routes.router, models.router, completions.router, chat.router):
        app.include_router(router)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _our_fault)
    return app


def _response(error: RequestError) -> Response:
    return Response(errors.body(error), error.status, {**errors.headers(error)}, "application/json")


async def _request_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 (Starlette's signature)
    assert isinstance(error, RequestError)
    return _response(error)


async def _engine_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    assert isinstance(error, EngineError)
    return _response(errors.as_request_error(error))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    message = {404: f"there is no {path} here", 405: f"{path} does not take {request.method}"}.get(
        error.status_code, error.detail
    )
    return _response(RequestError(message, status=error.status_code, headers=error.headers))


async def _client_gone(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _our_fault(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return _response(errors.internal_error())  # the server logs the traceback
