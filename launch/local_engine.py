"""An engine for this Python process: scheduler and workers as processes, the frontend's insides on a thread here.

The thread runs an event loop of its own, so a caller may have one too, or none, or may block it. It also starts the
processes, again when they die, whose lifeline is tied to the thread that started them. Signals stay the caller's.
"""

import asyncio
import contextlib
import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import IO, Any, TypeVar

from ..common.config import EngineConfig
from ..common.errors import EXIT_CONFIG, ConfigError, EngineError, QuireError
from ..common.messages import Status
from ..common.model_info import ModelInfo, model_path
from ..frontend.engine_client import EngineClient
from ..frontend.generator import Generator
from ..frontend.tokenizer import Tokenizer
from .checks import check_model, check_text_files
from .children import COMPANY_S, Child, Children, address_of, downloads, engine
from .keeper import Keeper, Plan
from .observer import Observer
from .restarts import Over
from .run_directory import run_directory

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_S = 3.0
TICK_S = 0.1
_TAIL = 40  # lines of a process' stderr that are kept
_LOGGED = re.compile(r"\S+ (?:ERROR|CRITICAL) +\S.*?  (?P<message>.*)")  # a line in common.log's format


class LocalEngine:
    """Starts at once; `ready` is done when it serves, or failed when it never will. `close` ends everything."""

    def __init__(self, config: EngineConfig, show: Callable[[Status], None] = lambda _: None) -> None:
        self.ready: Future[None] = Future()
        self.ready.set_running_or_notify_cancel()  # many may wait for it, and none of them may cancel it
        self.generator: Generator  # set when ready
        self._config = config
        self._show = show
        self._failure: QuireError | None = None
        self._tails: dict[Child, deque[str]] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="quire", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the engine's event loop."""
        if self._loop.is_closed():
            work.close()
            raise self._failure or EngineError("this engine was closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], tick: Callable[[], None] = lambda: None) -> T:
        """The result of `work`, run on the engine's event loop; `tick` is called now and then meanwhile."""
        future = self.start(work)
        try:
            while not wait([future], TICK_S).done:
                tick()
            return future.result()
        except (CancelledError, EngineError) as error:
            raise self.explained(error) from error
        finally:
            future.cancel()  # after Ctrl-C; else it is done already

    def explained(self, error: BaseException) -> QuireError:
        """Why a request could not go on: of a dead engine, what killed it."""
        return self._failure or (error if isinstance(error, QuireError) else EngineError("this engine was closed"))

    def close(self) -> None:
        """End the processes; requests that run end with EngineError. May be called twice, and from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- on the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except QuireError as error:
            self._failure = self._failure or error
        except Exception as error:
            if not self._stop.is_set():  # at the interpreter's end, asyncio's helper threads are gone before we are
                log.exception("a fault of Quire's: %r", error)
            self._failure = self._failure or EngineError(f"the engine broke: {error!r}")
        if not self.ready.done():
            self.ready.set_exception(self._failure or EngineError("this engine was closed"))

    async def _main(self) -> None:
        check_text_files(self._config)
        starting: asyncio.Future[ModelInfo] = self._loop.create_future()
        with run_directory() as run_dir, contextlib.closing(Children(on_output=self._listen)) as children:

            def start_engine() -> Sequence[Child]:
                starting.set_result(check_model(self._config.model))
                return engine(self._config, run_dir)

            address = address_of(run_dir)
            plan = Plan((), downloads(self._config), start_engine)
            with contextlib.closing(Observer(address)) as observer:
                keeper = Keeper(plan, children, observer, self._config.recovery, time.monotonic())
                keeper.begin(time.monotonic())
                await self._serve(keeper, children, address, starting)

    async def _serve(
        self, keeper: Keeper, children: Children, address: str, starting: "asyncio.Future[ModelInfo]"
    ) -> None:
        async with EngineClient(address) as client:
            try:
                await self._unless_over(keeper, self._become_ready(client, starting))
                self.ready.set_result(None)
                await self._unless_over(keeper, self._until_the_end(client))
            except QuireError as error:
                self._failure = error  # before the client closes, whose streams then end without a reason of their own
                raise
            finally:
                children.stop(GRACE_S)  # before the client closes, which the scheduler would report as a loss

    async def _become_ready(self, client: EngineClient, starting: "asyncio.Future[ModelInfo]") -> None:
        info = await starting
        shown = asyncio.create_task(self._show_progress(client))
        loading = asyncio.to_thread(self._load_tokenizer, info.max_model_len)
        try:
            tokenizer, _ = await asyncio.gather(loading, client.wait_ready())
        finally:
            shown.cancel()
        self.generator = Generator(client, tokenizer)

    def _load_tokenizer(self, max_model_len: int) -> Tokenizer:
        server, model = self._config.server, self._config.model
        path = Path(model.tokenizer).expanduser() if model.tokenizer else model_path(model.model)
        template = Path(server.chat_template).expanduser() if server.chat_template else None
        return Tokenizer.load(path, chat_template=template, max_model_len=max_model_len)

    async def _show_progress(self, client: EngineClient) -> None:
        while True:
            self._show(client.status)
            await client.changed()

    async def _until_the_end(self, client: EngineClient) -> None:
        stop, ended = asyncio.create_task(self._stop.wait()), asyncio.create_task(client.wait_ended())
        try:
            await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.done():
                raise ended.result() or EngineError("the engine was shut down")
        finally:
            stop.cancel()
            ended.cancel()

    async def _unless_over(self, keeper: Keeper, work: Awaitable[T]) -> T:
        """The result of `work`. Raises why the engine is over, when it is so first (or has failed the work)."""
        working = asyncio.ensure_future(work)
        keeping = asyncio.create_task(self._keep(keeper))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, keeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done() and working.exception() is None:
                return working.result()
            if stopping.done():
                raise EngineError("this engine was closed")
            await asyncio.wait({keeping}, timeout=COMPANY_S + TICK_S)  # the process' end tells more than what it said
            if keeping.done():
                raise self._failure_of(keeping.result())
            return await working
        finally:
            for task in (working, keeping, stopping):
                task.cancel()

    async def _keep(self, keeper: Keeper) -> Over:
        while True:
            now = time.monotonic()
            keeper.statuses(now)
            if (over := keeper.turn(now)) is not None:
                return over
            await asyncio.sleep(min(TICK_S, keeper.wait_s(now)))

    def _failure_of(self, over: Over) -> QuireError:
        lines = self._tails.get(over.cause.child, ())
        said = [match["message"] for line in lines if (match := _LOGGED.fullmatch(line))]
        if over.cause.code == EXIT_CONFIG:
            return ConfigError(said[-1] if said else str(over))
        return EngineError(f"{over}: {said[-1]}" if said else str(over))

    def _listen(self, child: Child, stream: IO[str]) -> None:
        """Pass a process' stderr on, line by line, and keep the last lines."""
        tail = self._tails[child] = deque(maxlen=_TAIL)

        def read() -> None:
            for line in stream:
                tail.append(line.rstrip("\n"))
                sys.stderr.write(line)

        threading.Thread(target=read, name=f"stderr of {child.name}", daemon=True).start()
