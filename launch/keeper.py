"""Keeps the processes of an engine running: starts them, again when they end, and ends those that hang.

The effects of what `restarts` and `stalls` decide. A keeper has no loop: who owns it calls `turn`.
"""

import logging
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..common.config import RecoveryConfig
from ..common.errors import EXIT_FATAL, EngineError
from ..common.messages import Status, Welcome
from ..common.process import END
from .children import Child, Children, Exit, Role
from .observer import Observer
from .restarts import Again, Over, Restarts
from .stalls import Awake, SchedulerHangs, Silent, Watch, WorkersHang

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """The processes of an engine, in the order of their start. `engine` is made when the downloads have ended."""

    frontends: Sequence[Child]
    downloads: Sequence[Child]
    engine: Callable[[], Sequence[Child]]


class Keeper:
    """Of the processes of `plan`. Time is an argument throughout, and rises."""

    def __init__(
        self, plan: Plan, children: Children, observer: Observer, recovery: RecoveryConfig, now: float
    ) -> None:
        self._plan = plan
        self._children = children
        self._observer = observer
        self._restarts = Restarts(recovery.max_restarts)
        self._watch = Watch(recovery.stall_timeout)
        self._awake = Awake(now)
        self._due: list[tuple[float, Child]] = []
        self._ended: list[Exit] = []  # not judged yet
        self._leaving: Sequence[Role] = ()
        self._killed: dict[Child, str] = {}  # by us, and why
        self._lost_at: float | None = None  # since when the engine has been without one of its parts
        self.served = False  # whether it has ever been ready

    @property
    def welcome(self) -> Welcome | None:
        return self._observer.welcome

    def begin(self, now: float) -> None:
        self._start(self._plan.frontends, now)
        self._start(self._plan.downloads or self._plan.engine(), now)

    def let_go(self, *roles: Role) -> None:
        """Processes of these roles are not started again from now on."""
        self._leaving = roles
        self._due = [(at, child) for at, child in self._due if child.role not in roles]

    def wait_s(self, now: float) -> float:
        """When the next `turn` is due, unless the observer's socket or the end of a process asks for one before."""
        return min([self._observer.wait_s, *(max(0.0, at - now) for at, _ in self._due)])

    def statuses(self, now: float) -> list[Status]:
        """What the scheduler has told since the last call. To be asked before each `turn`."""
        try:
            told = self._observer.statuses()
        except EngineError as error:
            log.error("%s", error)
            return []
        awake = self._awake.time(now)
        if self._observer.heard:
            self._watch.heard(awake)
        for status in told:
            self._watch.told(status, awake)
            if status.phase == "ready":
                self._served(now)
        self._act_on(self._watch.verdict(awake))
        return told

    def turn(self, now: float) -> Over | None:
        """Start what is due, and again what has ended. Returns why the engine cannot go on, once it cannot."""
        due = [child for at, child in self._due if at <= now]
        self._due = [(at, child) for at, child in self._due if at > now]
        self._start(due, now)
        self._ended += self._children.exited()
        while self._ended:
            end = self._ended.pop(0)
            if end.child.role == "download" and end.code == 0:
                self._start(self._plan.engine(), now)
            elif end.child.role in self._leaving:
                if end.code not in (0, -END):
                    log.warning("%s while stopping", end)
            else:
                end = replace(end, why=end.why or self._killed.pop(end.child, ""))
                match self._restarts.ended(end, now):
                    case Over() as over:
                        return over if self.served else replace(over, cause=self._children.cause([end, *self._ended]))
                    case Again(delay_s):
                        self._start_again(end, delay_s, now)
        return None

    # --- effects ------------------------------------------------------------------------------------------------------

    def _start_again(self, end: Exit, delay_s: float, now: float) -> None:
        child = end.child
        if child.role != "frontend":
            self._lost_at = now if self._lost_at is None else self._lost_at
        if child.role == "scheduler":
            self._watch.ended()
        if delay_s:
            log.warning("%s; it is started again in %.1f s", end, delay_s)
            self._due.append((now + delay_s, child))
        else:
            log.warning("%s; it is started again", end)
            self._start([child], now)

    def _start(self, children: Iterable[Child], now: float) -> None:
        """What cannot be started is as if it had ended at once: memory may be short for a moment."""
        for child in children:
            try:
                self._children.start([child])
            except OSError as error:
                self._ended.append(Exit(child, EXIT_FATAL, f"could not be started: {error.strerror}"))
                continue
            if child.role == "scheduler":
                self._watch.began(self._awake.time(now))
                self._observer.introduce()

    def _served(self, now: float) -> None:
        self._restarts.ready()
        self.served = True
        if self._lost_at is not None and all(child.role == "frontend" for _, child in self._due):
            log.info("recovered in %.1f s", now - self._lost_at)
            self._lost_at = None

    def _act_on(self, verdict: Silent | SchedulerHangs | WorkersHang | None) -> None:
        match verdict:
            case Silent(seconds):
                log.warning("the scheduler has been silent for %.0f s", seconds)
            case SchedulerHangs(why):
                self._kill("scheduler", why)
            case WorkersHang(why):
                self._kill("worker", why)

    def _kill(self, role: Role, why: str) -> None:
        self._killed |= dict.fromkeys(self._children.running(role), why)
        self._children.send(signal.SIGKILL, role)
