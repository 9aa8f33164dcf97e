"""How far the start has come: a bar in a terminal, plain lines anywhere else (a log, a pipe)."""

import contextlib
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from ..common.messages import Status
from .streams import say

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_EVERY_S = 5.0  # a long phase shows that it lives


class Report(Protocol):
    def show(self, status: Status) -> None: ...

    def close(self) -> None: ...


class PlainReport:
    """One line when a phase begins, and one every few seconds while it goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase = ""
        self._at = 0.0

    def show(self, status: Status) -> None:
        now = time.monotonic()
        if status.phase == self._phase and now - self._at < _PLAIN_EVERY_S:
            return
        self._phase, self._at = status.phase, now
        share = f" {status.progress:.0%}" if 0.0 < status.progress < 1.0 else ""
        detail = f": {status.detail}" if status.detail else ""
        say(f"{status.phase}{share}{detail}", self._stream)

    def close(self) -> None:
        pass


class BarReport:
    """A bar for the phase that runs; it vanishes at the end."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)
        progress.start()

    def show(self, status: Status) -> None:
        total = 1.0 if status.progress > 0.0 else None  # no share known: the bar runs to and fro
        text = f"{status.phase} {status.detail}".strip()
        self._progress.update(self._task, description=text, completed=status.progress, total=total)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            self._progress.stop()


def report_on(stream: TextIO) -> Report:
    if not stream.isatty():
        return PlainReport(stream)
    from rich.console import Console  # noqa: PLC0415 (only a terminal needs it)
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return BarReport(Progress(*columns, console=Console(file=stream), transient=True))
