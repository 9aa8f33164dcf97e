"""The ASGI application: routes, in the layers that every request passes."""

import asyncio
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..common.config import ServerConfig
from ..common.errors import EngineError, RequestError
from . import errors, pins, routes
from .connections import Connections, affordable
from .description import DescribedAPI
from .keys import KeyRing
from .middleware import AllowedHosts, ApiKeys, BodyLimit, HeadLimits, RequestIds
from .openai import chat, completions, models
from .service import Service
from .sse import ClientGone

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it


class App:
    """One frontend's HTTP side. `configure` is called once the scheduler has sent the configuration; nothing is served
    before."""

    def __init__(self, service: Service, hosts: Collection[str] = ()) -> None:
        """`hosts`: the only names that requests may call this server by; none: any."""
        first = ServerConfig()
        self.connections = Connections(first.max_connections)
        self._body_limit = BodyLimit(_routes(service), first.max_body_bytes)
        self._keys = ApiKeys(self._body_limit)
        self._layers: ASGIApp = RequestIds(HeadLimits(AllowedHosts(self._keys, hosts)))

    def configure(self, options: ServerConfig) -> None:
        """Raises ConfigError for a keys file that cannot be used."""
        file = Path(options.api_keys_file).expanduser() if options.api_keys_file else None
        self._keys.ring = KeyRing(options.api_key, file)
        self._body_limit.limit = options.max_body_bytes
        self.connections.limit = affordable(options.max_connections)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "lifespan and websockets are off"
        await self._layers(scope, receive, send)


def _routes(service: Service) -> FastAPI:
    app = DescribedAPI(title="Quire", version=version("quire"), redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.large_bodies = asyncio.Lock()
    for router in (completions.router, chat.router, routes.router, pins.router, models.router):  # looked at in turn
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


async def _engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return _response(errors.as_request_error(error, request.scope["state"]["request_id"]))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:100]  # not the URL's: a Host header may make that anything
    message = {404: f"there is no {path} here", 405: f"{path} does not take {request.method}"}.get(
        error.status_code, error.detail
    )
    return _response(RequestError(message, status=error.status_code, headers=error.headers))


async def _client_gone(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _our_fault(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return _response(errors.internal_error())  # the server logs the traceback
