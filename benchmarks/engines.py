"""Engines as processes that stay loaded, take turns, and do nothing while another is measured."""

import contextlib
import fcntl
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from quire.benchmarks.work import Work

PATIENCE_S = 30.0  # with what is to end
SETTLE_S = 0.3  # after its answer, an engine's threads may spin for a little while


class Turns:
    """Processes that take turns: `only` is who may run now.

    Ours is never stopped: its parts take a long silence for a death, and they wait without spinning. What the idle ones
    used of the cores all the same is in `stolen_s`.
    """

    def __init__(self) -> None:
        self._pids: dict[str, tuple[int, bool]] = {}
        self.stolen_s = 0.0

    def add(self, name: str, pid: int, *, stoppable: bool) -> None:
        self._pids[name] = (pid, stoppable)

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """The others are stopped before, and stay so; `name` runs, and is stopped behind it."""
        others = [pid for other, (pid, _) in self._pids.items() if other != name]
        before = sum(map(cpu_seconds, others))
        self._signal(name, signal.SIGCONT)
        try:
            yield
        finally:
            self.stolen_s += sum(map(cpu_seconds, others)) - before
            time.sleep(SETTLE_S)
            self._signal(name, signal.SIGSTOP)

    def wake(self) -> None:
        """Let all go on: a stopped process does not end."""
        for name in self._pids:
            self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, signum: int) -> None:
        pid, stoppable = self._pids[name]
        if stoppable:
            for process in family(pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signum)


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; nothing when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def cpu_seconds(pid: int) -> float:
    """Of user and kernel, of a process and all below it, so far."""
    total = 0.0
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextlib.contextmanager
def ended(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """The block asks it to end; behind it nothing is left of it, nor of what it started."""
    all_of_it = family(process.pid)
    yield
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    for left in all_of_it:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()


@contextlib.contextmanager
def quiet(lock: Path | None) -> Iterator[None]:
    """Hold `lock` alone meanwhile, on a machine whose other users hold it together while they keep a core busy."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(slots=True)
class Measured:
    seconds: float
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def timed(act: Callable[[], int]) -> Measured:
    """`act` makes so many tokens."""
    start = time.perf_counter()
    tokens = act()
    return Measured(time.perf_counter() - start, tokens)


class Engine:
    """A program of `peers/` with one engine loaded. Raises SystemExit when it ends before it should."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )
        told = self._read()
        self.load_s, self.version = float(told["load_s"]), str(told["version"])

    def run(self, prompts: list[list[int]], output: int) -> Measured:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"prompts": prompts, "output": output}) + "\n")
        told = self._read()
        return Measured(told["seconds"], told["tokens"])

    def measure(self, work: Work, prompts: list[list[int]]) -> Measured:
        """As `run`. Raises SystemExit when the engine did less than it was asked."""
        done = self.run(prompts, work.output)
        if done.tokens != work.tokens:
            raise SystemExit(f"{self.name} gave {done.tokens} tokens of {work.tokens}: not to be compared")
        return done

    def close(self) -> None:
        assert self.process.stdin
        with ended(self.process):
            self.process.stdin.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}:\n{tail}")
        told: dict[str, Any] = json.loads(line)
        return told
