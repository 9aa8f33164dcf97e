"""Starts the processes of an engine, watches them, and ends them: what `serve.py` does with its options.

It touches no request. One loop waits for whatever comes first: a signal, the end of a process, news of the start.
What follows from the end of a process is decided in one place, `Supervisor._goes_on`.
"""

import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from .. import __version__
from ..common.config import EngineConfig
from ..common.errors import EngineError
from ..common.log import configure
from ..common.messages import HEARTBEAT_S, Status
from ..common.process import END, set_title
from .banner import banner
from .checks import check_model, check_text_files, is_downloadable
from .children import Child, Children, Exit, address_of, downloads, engine, frontends
from .listen import listen, url_of
from .observer import Observer
from .progress import report_on
from .run_directory import run_directory
from .signals import Signals

log = logging.getLogger(__name__)

DRAIN_MARGIN_S = 2.0  # a frontend ends by itself at the drain timeout; later it is stuck
GRACE_S = 5.0  # for the scheduler and the workers of a running engine
LOADING_GRACE_S = 1.0  # nothing is lost before the engine is ready
FAREWELL_S = 2.0  # after a fault: for the frontends to tell their clients
NOTICE_S = 2 * HEARTBEAT_S  # for the scheduler to miss a worker: it speaks to each once in HEARTBEAT_S at least


@dataclass(frozen=True, slots=True)
class Plan:
    """The processes of an engine, in the order of their start. `engine` is made when the downloads have ended."""

    frontends: Sequence[Child]
    downloads: Sequence[Child]
    engine: Callable[[], Sequence[Child]]


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
        supervisor = Supervisor(plan, config, sock, signals, children, observer)
        return supervisor.run(report.show, report.close)


class Supervisor:
    """The loop and its decisions; everything it needs is handed to it."""

    def __init__(
        self,
        plan: Plan,
        config: EngineConfig,
        sock: socket.socket,
        signals: Signals,
        children: Children,
        observer: Observer,
    ) -> None:
        self._plan = plan
        self._config = config
        self._sock = sock
        self._signals = signals
        self._children = children
        self._observer = observer
        self._ready = False
        self._poller = zmq.Poller()
        self._poller.register(observer.socket, zmq.POLLIN)
        self._poller.register(signals.readable.fileno(), zmq.POLLIN)

    def run(self, show: Callable[[Status], None], done: Callable[[], None]) -> int:
        """`show` is told of the start's progress, `done` when there is no more of it."""
        self._children.start(self._plan.frontends)
        self._children.start(self._plan.downloads or self._plan.engine())
        while True:
            self._poller.poll(int(HEARTBEAT_S * 1000))
            self._signals.drain()
            if self._signals.asked:
                done()
                return self._drain()
            if ends := [end for end in self._children.exited() if not self._goes_on(end)]:
                done()
                return self._end(ends)
            for status in self._statuses():
                if status.phase == "ready" and not self._ready:
                    done()
                    self._announce(status)
                elif not self._ready:
                    show(status)

    def _statuses(self) -> list[Status]:
        try:
            return self._observer.statuses()
        except EngineError as error:
            log.error("%s", error)
            return []

    def _announce(self, status: Status) -> None:
        self._ready = True
        if self._observer.welcome and status.capacity:
            say(banner(__version__, url_of(self._sock), self._observer.welcome, status.capacity), sys.stdout)

    def _goes_on(self, end: Exit) -> bool:
        """What the end of a process means: whether the engine goes on, and what it then needs."""
        if end.child.role == "download" and end.code == 0:
            self._children.start(self._plan.engine())
            return True
        return False

    def _end(self, ends: list[Exit]) -> int:
        """After a fault: say who died, let the frontends tell their clients, end everything."""
        cause = self._children.cause(ends)
        log.error("%s; the engine ends", cause)
        self._sock.close()
        if cause.child.role == "worker":
            self._children.wait(NOTICE_S, "scheduler", impatient=self._impatient(0))  # it tells the frontends why
        self._children.send(END, "scheduler", "worker", "download")  # its farewell reaches the frontends
        self._children.wait(FAREWELL_S, "frontend", impatient=self._impatient(0))
        self._children.stop(LOADING_GRACE_S, impatient=self._impatient(0))
        return cause.engine_code

    def _drain(self) -> int:
        """After a signal: no new connections, running requests finish, then everything ends. A second one hurries."""
        again, limit_s, grace_s = self._impatient(1), LOADING_GRACE_S, LOADING_GRACE_S
        if self._ready:
            limit_s, grace_s = self._config.server.drain_timeout + DRAIN_MARGIN_S, GRACE_S
        say("stopping: running requests may finish; once more stops at once" if self._ready else "stopping", sys.stderr)
        self._sock.close()
        self._children.send(END, "frontend", "download")
        for end in self._children.wait(limit_s, "frontend", impatient=again):
            if end.code not in (0, -END):
                log.warning("%s while stopping", end)
        self._children.stop(grace_s, impatient=again)
        return 128 + self._signals.asked[1] if again() else 0

    def _impatient(self, asked: int) -> Callable[[], bool]:
        return lambda: len(self._signals.asked) > asked


def say(text: str, stream: object) -> None:
    """For people. A terminal that is gone does not end an engine."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)  # type: ignore[call-overload]
