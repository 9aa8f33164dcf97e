"""Parts on several hosts: cables that are cut, links that are slow, break or stutter. Streams pause and go on."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from ..e2e.hosts import HOSTS, Hosts, network
from ..e2e.server import script, wait_until
from ..e2e.test_hosts import keys
from ..ports import free_port, free_ports
from .clients import Crowd, workload
from .conftest import Engines
from .engine import BACK_S, Engine, seconds_until
from .proxy import Proxy, Treatment, breaking, slow, stuttering

BODIES = workload(32)
NOTICE_S = 5.0  # for both sides of a cut to see it
LATE_S = 2.0
CUT_S = 7.0
CHOSEN = ("--stall-timeout", 4, "--log-level", "debug", "--dtype", "float32")


class Parts:
    """Components started by hand, with the log of each."""

    def __init__(self, folder: Path, commands: dict[str, Sequence[str]], url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=10)
        self._logs = {name: folder / f"{name}.log" for name in commands}
        self.processes = {}
        for name, command in commands.items():
            with self._logs[name].open("w") as log:
                self.processes[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> "Parts":
        wait_until(lambda: self.get("/ready")[0] == 200, BACK_S)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        self.http.close()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 while nobody answers."""
        try:
            answer = self.http.get(path)
        except httpx.HTTPError as error:
            return 0, repr(error)
        return answer.status_code, answer.text

    def log(self, name: str) -> str:
        return self._logs[name].read_text()

    def check(self, golden: Engine, port: int, host: str) -> None:
        """Everybody lives, and a fresh request is answered as ever, with nothing left of those before it."""
        assert [name for name, process in self.processes.items() if process.poll() is not None] == []
        wait_until(lambda: self.get("/ready")[0] == 200, BACK_S)
        assert self.get("/health")[0] == 200
        with Crowd(port, workload(1), host=host) as crowd:
            golden.check_records(crowd.join())
        wait_until(self.is_idle, BACK_S)

    def is_idle(self) -> bool:
        status, text = self.get("/metrics")
        if status != 200:  # the scheduler was just not to be asked: the link is bad
            return False
        lines = text.splitlines()
        values = {
            line.partition("{")[0]: float(line.split()[-1]) for line in lines if line and not line.startswith("#")
        }
        free = values.get("quire:kv_blocks_free")  # None while the workers form another group
        return free is not None and free == values["quire:kv_blocks"] and not values["vllm:num_requests_running"]


@contextlib.contextmanager
def on_hosts(hosts: Hosts, folder: Path, tp: int) -> Iterator[Parts]:
    hub = f"tcp://{HOSTS['sched']}:5555"
    meeting = ("--master-addr", HOSTS["work0"], "--master-port", 29600)
    ours, theirs = keys(folder / "keys")
    commands = {
        "sched": script("scheduler", "--listen", hub, "--tp", tp, *meeting, *CHOSEN, *ours),
        "front": script("frontend", "--scheduler", hub, "--host", HOSTS["front"], "--port", 8000, *theirs),
    } | {f"work{rank}": script("worker", "--scheduler", hub, "--rank", rank, *theirs) for rank in range(tp)}
    with Parts(
        folder,
        {host: [*hosts.on(host), *command] for host, command in commands.items()},
        f"http://{HOSTS['front']}:8000",
    ) as parts:
        yield parts


@pytest.mark.parametrize(
    ("tp", "host"),
    [
        (1, "sched"),
        pytest.param(2, "work1", marks=pytest.mark.long),
        pytest.param(1, "front", marks=pytest.mark.long),
        pytest.param(1, "work0", marks=pytest.mark.long),
    ],
)
def test_a_cable_is_cut_and_plugged_in_again(engines: Engines, tmp_path: Path, tp: int, host: str) -> None:
    golden = engines(*(("--tp", 2) if tp == 2 else ()))
    with network() as hosts, on_hosts(hosts, tmp_path, tp) as parts:
        with Crowd(8000, BODIES, host=HOSTS["front"]) as crowd:
            crowd.flowing(5)
            cut_at = time.monotonic()
            with hosts.cut(host):
                if host != "front":  # else nobody can ask it
                    assert seconds_until(lambda: parts.get("/health")[0] == 503) <= NOTICE_S + LATE_S
                    assert parts.get("/ready")[0] == 503
                if host != "sched":
                    noticed = ("stalled", f"silent for {NOTICE_S:.0f} s", "is gone")
                    wait_until(lambda: any(words in parts.log("sched") for words in noticed), BACK_S)
                    assert time.monotonic() - cut_at <= NOTICE_S + LATE_S
                wait_until(lambda: time.monotonic() > cut_at + CUT_S, BACK_S)
            golden.check_records(crowd.join())
        parts.check(golden, 8000, HOSTS["front"])


@pytest.mark.parametrize(
    ("treatment", "protected"),
    [(slow, False), (breaking, False), (stuttering, True)],
    ids=["slow", "breaking", "stuttering"],
)
def test_a_link_that_misbehaves(engine: Engine, tmp_path: Path, treatment: Treatment, protected: bool) -> None:
    """Doubled bytes can look like another message; between hosts keys see to it that they do not."""
    hub, proxy, http = free_ports(2), free_ports(2), free_port()
    ours, theirs = keys(tmp_path / "keys") if protected else ((), ())
    near, far = f"tcp://127.0.0.1:{hub}", f"tcp://127.0.0.1:{proxy}"
    commands = {
        "sched": script("scheduler", "--listen", near, "--dtype", "float32", *ours),
        "front": script("frontend", "--scheduler", far, "--port", http, *theirs),
        "work0": script("worker", "--scheduler", far, "--rank", 0, *theirs),
    }
    with Proxy(proxy, hub, treatment) as link, Parts(tmp_path, commands, f"http://127.0.0.1:{http}") as parts:
        with Crowd(http, BODIES) as crowd:
            engine.check_records(crowd.join())
        parts.check(engine, http, "127.0.0.1")
        assert link.spoilt or treatment is not breaking
