"""Starts the processes of an engine, keeps them running, and ends them: what `serve.py` does with its options.

It touches no request. One loop waits for whatever comes first: a signal, the end of a process, news of the scheduler.
What follows from the end of a process is decided in `restarts`.
"""

import contextlib
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from .. import __version__
from ..common.config import EngineConfig
from ..common.log import configure
from ..common.messages import Status
from ..common.process import END, GONE, set_title
from .banner import banner
from .checks import check_model, check_text_files, is_downloadable
from .children import Children, address_of, downloads, engine, frontends
from .keeper import Keeper, Plan
from .listen import listen, url_of
from .observer import Observer
from .progress import report_on
from .restarts import Over
from .run_directory import run_directory
from .signals import Signals
from .streams import say

log = logging.getLogger(__name__)

DRAIN_MARGIN_S = 2.0  # a frontend ends by itself at the drain timeout; later it is stuck
GRACE_S = 5.0  # for the scheduler and the workers of a running engine
LOADING_GRACE_S = 1.0  # nothing is lost before the engine has served, or when it is gone
FAREWELL_S = 2.5  # for the frontends to tell their clients that the engine is gone


def serve(config: EngineConfig) -> int:
    """Serve until a signal or a fault; the exit code. Raises ConfigError for what is wrong before any process starts."""
    set_title("quire")
    configure("supervisor", config.server.log_level)
    with listen(config.server.host, config.server.port) as sock:
        check_text_files(config)
        if not is_downloadable(config.model.model):
            check_model(config.model)
        with run_directory() as run_dir, Signals() as signals:
            plan = Plan(frontends(config, run_dir, sock.fileno()), downloads(config), lambda: engine(config, run_dir))
            return supervise(plan, config, run_dir, sock, signals)


def supervise(plan: Plan, config: EngineConfig, run_dir: Path, sock: socket.socket, signals: Signals) -> int:
    """Run the processes of `plan` until they are done for; the exit code."""
    with (
        contextlib.closing(Children()) as children,
        contextlib.closing(Observer(address_of(run_dir))) as observer,
        contextlib.closing(report_on(sys.stderr)) as report,
    ):
        keeper = Keeper(plan, children, observer, config.recovery, time.monotonic())
        supervisor = Supervisor(config, sock, signals, children, keeper)
        supervisor.watch(observer.socket)
        return supervisor.run(report.show, report.close)


class Supervisor:
    """The loop: until a signal asks to stop, or the engine is over. Everything it needs is handed to it."""

    def __init__(
        self, config: EngineConfig, sock: socket.socket, signals: Signals, children: Children, keeper: Keeper
    ) -> None:
        self._config = config
        self._sock = sock
        self._signals = signals
        self._children = children
        self._keeper = keeper
        self._poller = zmq.Poller()
        self._poller.register(signals.readable.fileno(), zmq.POLLIN)

    def watch(self, socket: object) -> None:
        """Turn whenever there is something to read from it."""
        self._poller.register(socket, zmq.POLLIN)

    def run(self, show: Callable[[Status], None], done: Callable[[], None]) -> int:
        """`show` is told of the start's progress, `done` when there is no more of it."""
        self._keeper.begin(time.monotonic())
        while not self._signals.asked:
            served = self._keeper.served
            told, over = self._turn()
            for status in () if served else told:
                if status.phase == "ready":
                    done()
                    self._announce(status)
                    break
                show(status)
            if over is not None:
                done()
                return self._end(over)
        done()
        return self._drain()

    def _turn(self) -> tuple[list[Status], Over | None]:
        """Wait for something to happen, and have it seen to."""
        self._poller.poll(math.ceil(1000 * self._keeper.wait_s(time.monotonic())))
        self._signals.drain()
        now = time.monotonic()
        return self._keeper.statuses(now), self._keeper.turn(now)

    def _announce(self, status: Status) -> None:
        welcome = self._keeper.welcome
        if welcome is not None and status.capacity is not None:
            say(banner(__version__, url_of(self._sock), welcome, status.capacity), sys.stdout)

    def _end(self, over: Over) -> int:
        """The engine is gone: say why, have the frontends tell their clients, end everything."""
        log.error("%s; the engine ends", over)
        impatient = self._impatient(len(self._signals.asked))
        self._sock.close()
        self._children.send(GONE, "frontend")
        self._children.wait(FAREWELL_S, "frontend", impatient=impatient)
        self._children.send(signal.SIGKILL, "frontend")
        self._children.stop_at_once(LOADING_GRACE_S, impatient=impatient)
        return over.cause.engine_code

    def _drain(self) -> int:
        """No new connections; running requests finish, of a process that dies now as well; then everything ends. A second
        signal hurries."""
        again = self._impatient(1)
        self._sock.close()
        if not self._keeper.served:
            say("stopping", sys.stderr)
            self._children.stop_at_once(LOADING_GRACE_S, impatient=again)
            return 128 + self._signals.asked[1] if again() else 0
        say("stopping: running requests may finish; once more stops at once", sys.stderr)
        self._keeper.let_go("frontend")
        self._children.send(END, "frontend")
        deadline = time.monotonic() + self._config.server.drain_timeout + DRAIN_MARGIN_S
        while self._children.running("frontend") and time.monotonic() < deadline and not again():
            _, over = self._turn()
            if over is not None:
                return self._end(over)
        self._children.stop(GRACE_S, impatient=again)
        return 128 + self._signals.asked[1] if again() else 0

    def _impatient(self, asked: int) -> Callable[[], bool]:
        return lambda: len(self._signals.asked) > asked
