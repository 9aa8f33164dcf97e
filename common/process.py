"""What every process does at its start: die with its supervisor, turn signals into an event, take a name."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
END = signal.SIGUSR1  # from a supervisor to the processes it started
GONE = signal.SIGUSR2  # from a supervisor to its frontends: the engine is gone for good, tell every client and exit


def die_with_parent(lifeline: int | None) -> None:
    """End this process when the supervisor ends, however it ends.

    `lifeline` is the read end of a pipe whose only write end the supervisor holds: end of file means that it is gone.
    PDEATHSIG is the belt to these braces; it fires when the parent *thread* ends, hence only together with the pipe.
    """
    if lifeline is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        os.read(lifeline, 1)  # returns only at end of file: nobody writes
        os._exit(0)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def on_termination(act: Callable[[], None], *, supervised: bool) -> None:
    """Call `act` in the main thread each time this process is asked to end.

    By itself: at SIGTERM and SIGINT. Under a supervisor: at `END` alone, which only the supervisor sends. A terminal
    sends Ctrl-C to a whole process group and systemd SIGTERM to a whole control group; it is the supervisor that then
    ends the parts in their order, or running requests would lose theirs.
    """
    asking = (END,) if supervised else (signal.SIGTERM, signal.SIGINT)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    for signum in asking:
        signal.signal(signum, lambda *_: act())


def set_title(title: str) -> None:
    """The name that ps -o comm and top show (15 characters at most); Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(15, title.encode()[:15])
