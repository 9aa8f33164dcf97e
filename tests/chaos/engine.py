"""An engine under attack, and what must be true of it after every case."""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from quire.scheduler.sight import MOST_FILES

from ..e2e.server import Server, wait_until
from .clients import Body, Crowd, Record, whole, workload

FAULTS = Path(__file__).parent / "faults"
BACK_S = 60.0  # for anything to come back; only what never does takes so long
FRESH = workload(2, 16, first=90_000)  # asked for after each case, one greedy and one sampled
ROLES = ("frontend", "scheduler", "worker")
FAULTY = [sys.executable, str(FAULTS / "faulty_engine.py")]  # its workers fail where their prompts ask for it
FREELY = ("--max-restarts", 100_000)  # a crash loop has a test of its own


def is_dead(process: psutil.Process) -> bool:
    """Whether it has ended, be it reaped or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Engine(Server):
    """A server whose parts can be found, hurt and inspected. `how` is `Server`'s, `FAULTY` for one."""

    def __init__(
        self,
        *flags: object,
        environment: Mapping[str, str] | None = None,
        answers: dict[str, str] | None = None,
        **how: Any,
    ) -> None:
        """`answers` are those of engines with as many workers before it, and are added to."""
        self.folder = tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp")  # the path of a socket must be short
        self.switches = Path(self.folder.name) / "switches"  # of the faults
        self.runtime = Path(self.folder.name) / "run"
        self.switches.mkdir()
        self.runtime.mkdir()
        super().__init__(
            *flags,
            environment={
                **os.environ,
                "XDG_RUNTIME_DIR": str(self.runtime),
                "CHAOS_SWITCHES": str(self.switches),
                **(environment or {}),
            },
            **how,
        )
        self._golden: dict[str, str] = {} if answers is None else answers
        self._usual: Snapshot | None = None
        self._faulty = how.get("command") == FAULTY
        self._read = 0  # characters of the log that were looked at

    def __exit__(self, *_: object) -> None:
        try:
            for process in self.tree() if self.alive else ():
                process.send_signal(signal.SIGCONT)
            super().__exit__()
        finally:
            self.folder.cleanup()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    # --- its parts ----------------------------------------------------------------------------------------------------

    def parts(self, role: str) -> list[psutil.Process]:
        """The living processes of a role: workers by rank, the others by age."""
        found = []
        for process in self.tree()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE and role_of(process) == role:
                    found.append((rank_of(process), process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found, key=lambda entry: entry[:3])]

    def part(self, role: str, index: int = 0) -> psutil.Process:
        """One of them, once it is there."""
        wait_until(lambda: len(self.parts(role)) > index, BACK_S)
        return self.parts(role)[index]

    def kill(self, role: str, index: int = 0) -> psutil.Process:
        """SIGKILL one of them. Returns when the kernel has ended it, and hence before anybody can have missed it."""
        victim = self.part(role, index)
        victim.kill()
        wait_until(lambda: is_dead(victim))
        return victim

    def wait_replaced(self, victim: psutil.Process, role: str) -> None:
        """Until another process stands where `victim` stood."""
        usual = self.usual.processes[role]
        wait_until(lambda: victim not in (now := self.parts(role)) and len(now) == usual, BACK_S)

    # --- what it says of itself ---------------------------------------------------------------------------------------

    def health(self) -> tuple[int, str]:
        """Status code and the word."""
        answer = self.http.get("/health")
        return answer.status_code, answer.json()["status"]

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready").status_code == 200
        return False

    def blocks_in_use(self) -> float:
        return self.metric("quire:kv_blocks") - self.metric("quire:kv_blocks_free")

    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, every block is free."""
        running, waiting = self.metric("vllm:num_requests_running"), self.metric("vllm:num_requests_waiting")
        return not running and not waiting and not self.blocks_in_use()

    # --- what is right ------------------------------------------------------------------------------------------------

    def crowd(self, bodies: Sequence[Body]) -> Crowd:
        return Crowd(self.port, bodies)

    def learn(self, bodies: Sequence[Body]) -> None:
        """Ask for the answers to `bodies` while nothing disturbs the engine, unless they are known."""
        unknown = [body for body in bodies if key_of(body) not in self._golden]
        with self.crowd([whole(body) for body in unknown]) as crowd:
            records = crowd.join()
        assert all(record.well for record in records), [record for record in records if not record.well][:2]
        self._golden |= {key_of(body): record.text for body, record in zip(unknown, records, strict=True)}

    def golden(self, body: Body) -> str:
        """What was learnt."""
        return self._golden[key_of(body)]

    def check_records(self, records: Sequence[Record]) -> None:
        """Every client had its whole answer, the golden one, and no error."""
        lost = [record for record in records if not record.well]
        assert not lost, f"{len(lost)} of {len(records)} clients saw an error: {lost[:2]}\n{self.log()[-4000:]}"
        altered = [record for record in records if record.text != self.golden(record.body)]
        assert not altered, "\n".join(difference(r, self.golden(r.body)) for r in altered[:3])

    @property
    def usual(self) -> "Snapshot":
        assert self._usual is not None, "settle() comes first"
        return self._usual

    def settle(self) -> "Engine":
        """Ready and warm: every answer of `workload(32)` is known, and so is what the processes hold when idle."""
        self.wait_ready()
        self.learn([*workload(32), *FRESH])
        with self.crowd(workload(32)) as crowd:
            self.check_records(crowd.join())
        wait_until(self.is_idle, BACK_S)
        self._usual = Snapshot(self)
        return self

    def check(self) -> None:
        """The common oracle: a whole engine, which serves what it served, and holds no more than it held."""
        wait_until(self.is_ready, BACK_S)
        assert self.health() == (200, "ok")
        with self.crowd(FRESH) as crowd:
            self.check_records(crowd.join())
        wait_until(self.is_idle, BACK_S)
        self.check_log()
        end = time.monotonic() + 15  # connections that are kept alive go after a while
        while growth := Snapshot(self).beyond(self.usual):
            assert time.monotonic() < end, growth
            time.sleep(0.1)

    def check_log(self) -> None:
        """Nobody has ended by itself since the last time: recovery hides bugs as well as it does faults."""
        told, self._read = self.log()[self._read :], len(self.log())
        if not self._faulty:
            assert "Traceback" not in told, told[-8000:]
            assert "exited with code" not in told, told[-8000:]


class Snapshot:
    """What an idle engine holds: processes, files in its folder, and descriptors and threads of each role."""

    def __init__(self, engine: Engine) -> None:
        self.processes: Counter[str] = Counter()
        self.descriptors: dict[str, int] = {}
        self.threads: dict[str, int] = {}
        for process in engine.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                role = role_of(process)
                self.processes[role] += 1
                self.descriptors[role] = max(self.descriptors.get(role, 0), process.num_fds())
                self.threads[role] = max(self.threads.get(role, 0), process.num_threads())
        names = (str(path.relative_to(engine.runtime)) for path in engine.runtime.rglob("*"))
        self.files = Counter(re.sub(r"quire-\w+|\d+", "N", name) for name in names)
        if journals := self.files.pop("N/journal-N.quire", 0):  # what a scheduler that dies of a bug leaves on purpose
            assert journals <= MOST_FILES

    def beyond(self, usual: "Snapshot") -> list[str]:
        """What is here and was not there, in words; empty when there is nothing."""
        found = []
        if self.processes != usual.processes:
            found.append(f"processes: {dict(self.processes)}, usually {dict(usual.processes)}")
        if more := self.files - usual.files:
            found.append(f"files: {dict(more)} too many")
        for what, now, then in (
            ("descriptors", self.descriptors, usual.descriptors),
            ("threads", self.threads, usual.threads),
        ):
            found += [
                f"{what} of the {role}: {count}, usually {then[role]}"
                for role, count in now.items()
                if role in then and count > then[role]
            ]
        return found


def role_of(process: psutil.Process) -> str:
    """Of a part, whether its module is ours or a faulty one of the tests; else "supervisor"."""
    words = " ".join(process.cmdline())
    return next((role for role in ROLES if re.search(rf" -m \S*{role} ", words)), "supervisor")


def rank_of(process: psutil.Process) -> int:
    found = re.search(r"--rank=(\d+)", " ".join(process.cmdline()))
    return int(found.group(1)) if found else 0


def key_of(body: Body) -> str:
    return json.dumps(whole(body), sort_keys=True)


def difference(record: Record, golden: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(record.text, golden, strict=False)) if a != b), -1)
    return f"altered from character {at} on: {record.text[at - 20 : at + 40]!r}, golden {golden[at - 20 : at + 40]!r}"


@contextlib.contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """SIGSTOP until the block is left; processes that ended meanwhile are no matter."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def seconds_until(condition: Callable[[], object], limit_s: float = BACK_S) -> float:
    """How long it took to come true. Raises AssertionError when it never does."""
    began = time.monotonic()
    wait_until(condition, limit_s)
    return time.monotonic() - began
