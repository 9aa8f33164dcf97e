"""Signals as a descriptor that a poll can wait for."""

import signal
import socket
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Notes the signals that ask this process to stop, from `__enter__` to `__exit__`, in the main thread.

    `readable` becomes so at each of them, and when a child ends. A SIGHUP that was ignored (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []  # to stop, in order
        self.readable, self._written = socket.socketpair()

    def __enter__(self) -> "Signals":
        for end in (self.readable, self._written):
            end.setblocking(False)
        caught = [s for s in STOPPING if signal.getsignal(s) is not signal.SIG_IGN or s != signal.SIGHUP]
        self._before = {number: signal.signal(number, self._note) for number in caught}
        self._before[signal.SIGCHLD] = signal.signal(
            signal.SIGCHLD, lambda *_: None
        )  # so that it reaches the descriptor
        self._wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.readable.close()
        self._written.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)

    def drain(self) -> None:
        """Make `readable` wait for the next signal."""
        try:
            while self.readable.recv(4096):
                pass
        except BlockingIOError:
            pass
