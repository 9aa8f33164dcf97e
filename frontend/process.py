"""A frontend process: answers HTTP at once, connects to the scheduler and loads the tokenizer behind it."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from ..common.config import ModelConfig, ServerConfig
from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError, QuireError
from ..common.model_info import model_path
from ..common.process import on_termination
from .app import App
from .engine_client import EngineClient
from .generator import Generator
from .http_protocol import BoundedHttpProtocol
from .middleware import LOOPBACK_NAMES
from .service import Service
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 5
FAREWELL_S = 2.0  # for the last events of streams when the engine is gone


def main(*, scheduler: str, sock: socket.socket, supervised: bool, log_level: str) -> int:
    """Serve HTTP on `sock`, which is bound and listening, for the scheduler at `scheduler`. Returns the exit code.

    At SIGTERM running requests get `drain_timeout` to finish, then it returns 0; a second SIGTERM ends them.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(scheduler, sock, supervised=supervised, log_level=log_level))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's to handle."""
        yield


async def _serve(scheduler: str, sock: socket.socket, *, supervised: bool, log_level: str) -> int:
    async with EngineClient(scheduler) as client:
        service = Service(client)
        app = App(service, _host_names(sock))
        server = _Server(
            uvicorn.Config(
                app, http=BoundedHttpProtocol, ws="none", lifespan="off", log_config=None, log_level=_uvicorn_level(log_level),
                access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
            )
        )  # fmt: skip
        server.config.timeout_graceful_shutdown = FAREWELL_S  # type: ignore[assignment]  # wait_for takes it
        loop = asyncio.get_running_loop()

        def terminate() -> None:
            loop.call_soon_threadsafe(_drain, service, server)

        on_termination(terminate, supervised=supervised)
        serving = asyncio.create_task(server.serve([sock]))
        starting = asyncio.create_task(_start(service, app, server))
        code = await _until_over(service, serving, starting)
        if not serving.done():
            server.config.timeout_graceful_shutdown = FAREWELL_S  # type: ignore[assignment]  # wait_for takes it
            server.should_exit = True
        await serving
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return code


async def _start(service: Service, app: App, server: uvicorn.Server) -> None:
    """Take the configuration from the scheduler and load the tokenizer that it names."""
    welcome = await service.client.wait_welcome()
    options: ServerConfig = welcome.config.server
    app.configure(api_keys=options.api_key, max_body_bytes=options.max_body_bytes)
    server.config.timeout_graceful_shutdown = options.drain_timeout  # type: ignore[assignment]
    tokenizer = await asyncio.to_thread(_load_tokenizer, welcome.config.model, options, welcome.model.max_model_len)
    service.generator = Generator(service.client, tokenizer)
    log.info(
        "tokenizer loaded%s", "" if tokenizer.has_chat_template else "; it has no chat template, so chat is refused"
    )


def _load_tokenizer(model: ModelConfig, options: ServerConfig, max_model_len: int) -> Tokenizer:
    path = Path(model.tokenizer).expanduser() if model.tokenizer else model_path(model.model)
    template = Path(options.chat_template).expanduser() if options.chat_template else None
    return Tokenizer.load(path, chat_template=template, max_model_len=max_model_len)


async def _until_over(service: Service, serving: asyncio.Task[None], starting: asyncio.Task[None]) -> int:
    """Wait until the server has drained, the engine is gone, or the start has failed: the exit code."""
    ended = asyncio.create_task(service.client.wait_ended())
    try:
        waiting: set[asyncio.Task[None] | asyncio.Task[QuireError | None]] = {serving, starting, ended}
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if ended in done:
                return _exit_code(ended.result())
            if serving in done:
                serving.result()
                return 0
            try:
                starting.result()
            except QuireError as error:
                return _exit_code(error)
    finally:
        ended.cancel()


def _exit_code(failure: QuireError | None) -> int:
    if failure is None:
        log.info("the engine was shut down")
        return 0
    log.error("%s", failure)
    return EXIT_CONFIG if isinstance(failure, ConfigError) else EXIT_FATAL


def _drain(service: Service, server: uvicorn.Server) -> None:
    """Accept nothing more and let running requests finish; at the second signal, end them."""
    if service.draining:
        server.force_exit = True
    else:
        log.info("draining: running requests may finish, new ones are refused")
        service.draining = True
        server.should_exit = True


def _host_names(sock: socket.socket) -> frozenset[str]:
    """The names that a server on this socket answers to; none when it is open to others than this host."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return frozenset()
    address = sock.getsockname()[0]
    return LOOPBACK_NAMES | {address} if ipaddress.ip_address(address).is_loopback else frozenset()


def _uvicorn_level(log_level: str) -> str:
    """uvicorn tells at "info" what this process tells itself."""
    return "warning" if log_level == "info" else log_level
