"""A frontend process: answers HTTP at once, connects to the scheduler and loads the tokenizer behind it."""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from ..common.config import ModelConfig, ServerConfig
from ..common.curve import PeerKeys
from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError, QuireError
from ..common.model_info import model_path
from ..common.process import GONE, on_termination
from .app import App
from .engine_client import EngineClient
from .generator import Generator
from .http_protocol import BoundedHttpProtocol
from .middleware import LOOPBACK_NAMES
from .service import Service
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 5
FAREWELL_S = 0.5  # for clients to take the last event of their stream; after GONE all is to be over within 2 s
CUT_OFF_S = 0.3  # for requests to notice that their clients were cut off


def main(*, scheduler: str, sock: socket.socket, supervised: bool, log_level: str, keys: PeerKeys | None = None) -> int:
    """Serve HTTP on `sock`, which is bound and listening, for the scheduler at `scheduler`. Returns the exit code.

    At SIGTERM running requests get `drain_timeout` to finish, then it returns 0; a second SIGTERM ends them. At GONE
    every request ends with an error, and it returns EXIT_FATAL. `keys` are for a scheduler on another host.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(EngineClient(scheduler, keys), sock, supervised=supervised, log_level=log_level))
    finally:
        signal.signal(GONE, signal.SIG_IGN)  # there is no loop any more to act on it
        gc.freeze()  # or the interpreter looks through everything again before it ends: half a second on a busy host


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's to handle."""
        yield


async def _serve(engine: EngineClient, sock: socket.socket, *, supervised: bool, log_level: str) -> int:
    async with engine as client:
        service = Service(client)
        app = App(service, _host_names(sock))
        server = _Server(
            uvicorn.Config(
                app, http=partial(BoundedHttpProtocol, connections=app.connections),  # type: ignore[arg-type]  # is called as a type
                ws="none", lifespan="off", log_config=None, log_level=_uvicorn_level(log_level), access_log=False,
                server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
            )
        )  # fmt: skip
        loop = asyncio.get_running_loop()

        def terminate() -> None:
            loop.call_soon_threadsafe(_drain, service, server)

        def give_up() -> None:
            loop.call_soon_threadsafe(client.give_up, "the engine is gone and will not come back")

        on_termination(terminate, supervised=supervised)
        signal.signal(GONE, lambda *_: give_up())
        serving = asyncio.create_task(server.serve([sock]))
        starting = asyncio.create_task(_start(service, app))
        code = await _until_over(service, serving, starting)
        _close(server)
        await serving
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return code


async def _start(service: Service, app: App) -> None:
    """Take the configuration from the scheduler and load the tokenizer that it names."""
    welcome = await service.client.wait_welcome()
    options: ServerConfig = welcome.config.server
    app.configure(options)
    tokenizer = await asyncio.to_thread(_load_tokenizer, welcome.config.model, options, welcome.model.max_model_len)
    service.generator = Generator(service.client, tokenizer)
    gc.collect()
    gc.freeze()  # what is here stays: no collection looks through it while tokens wait
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
    """Accept nothing more and let running requests finish in time; at the second signal, end them."""
    if service.draining:
        _end_requests(service, server)
        return
    log.info("draining: running requests may finish, new ones are refused")
    service.draining = True
    server.should_exit = True
    within_s = service.client.config.server.drain_timeout if service.has_served else 0.0
    asyncio.get_running_loop().call_later(within_s, _end_requests, service, server)


def _end_requests(service: Service, server: uvicorn.Server) -> None:
    if (error := service.unavailable) is not None:
        service.client.dismiss(error)
    _close(server)


def _close(server: uvicorn.Server) -> None:
    """End the server as soon as every client has its answer, and without those that do not take theirs."""
    server.should_exit = True
    asyncio.get_running_loop().call_later(FAREWELL_S, _cut_off, server)


def _cut_off(server: uvicorn.Server) -> None:
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    asyncio.get_running_loop().call_later(CUT_OFF_S, setattr, server, "force_exit", True)


def _host_names(sock: socket.socket) -> frozenset[str]:
    """The names that a server on this socket answers to; none when it is open to others than this host."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return frozenset()
    address = sock.getsockname()[0]
    return LOOPBACK_NAMES | {address} if ipaddress.ip_address(address).is_loopback else frozenset()


def _uvicorn_level(log_level: str) -> str:
    """uvicorn tells at "info" what this process tells itself."""
    return "warning" if log_level == "info" else log_level
