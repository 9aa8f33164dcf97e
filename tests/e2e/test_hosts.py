"""The components started by hand, on tcp:// addresses, serve the same answers; where allowed, each on its own host."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ..ports import free_port, free_ports
from .hosts import HOSTS, Hosts, network
from .server import START_S, Server, script

PROMPT = "import os\nimport sys\n\n\ndef main("


@contextlib.contextmanager
def running(*commands: list[str]) -> Iterator[None]:
    """The commands, each a process, until the block is left. The scheduler is ended first: it tells the others."""
    processes = [subprocess.Popen(command) for command in commands]
    try:
        yield
        assert all(process.poll() is None for process in processes)
    finally:
        for process in sorted(processes, key=lambda process: "scheduler.py" not in str(process.args)):
            process.terminate()
            assert process.wait(30) == 0


def ask(url: str) -> str:
    """The greedy completion of PROMPT."""
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    text: str = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()["choices"][0]["text"]
    return text


def wait_ready(url: str) -> None:
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        assert time.monotonic() < end, "not ready in time"
        time.sleep(0.1)


def keys(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a scheduler and its peers are given so that they talk over a network: flags of each."""
    subprocess.run([sys.executable, "-m", "quire.launch.cli", "keys", str(folder)], check=True, capture_output=True)
    return ("--curve-keys", str(folder / "scheduler.keys")), ("--curve-keys", str(folder / "peer.keys"))


@pytest.mark.parametrize("tp", [1, 2])
def test_components_by_hand_on_one_host(demo: Server, tp: int) -> None:
    hub, http_port = f"tcp://127.0.0.1:{free_ports(2)}", free_port()
    meeting = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    with running(
        script("worker", "--scheduler", hub, "--rank", 0),
        script("frontend", "--scheduler", hub, "--port", http_port),
        script("scheduler", "--listen", hub, "--dtype", "float32", "--tp", tp, *meeting),
        *(script("worker", "--scheduler", hub, "--rank", rank) for rank in range(1, tp)),
    ):
        wait_ready(f"http://127.0.0.1:{http_port}")
        assert ask(f"http://127.0.0.1:{http_port}") == demo.complete(PROMPT, max_tokens=32)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with network() as hosts:
        yield hosts


@pytest.mark.parametrize("protection", ["keys", "none"])
def test_components_each_on_its_own_host(demo: Server, hosts: Hosts, tmp_path: Path, protection: str) -> None:
    hub = f"tcp://{HOSTS['sched']}:5555"
    meeting = ("--master-addr", HOSTS["work0"], "--master-port", 29600)
    ours, theirs = keys(tmp_path / "keys") if protection == "keys" else (("--insecure",), ("--insecure",))
    with running(
        [*hosts.on("sched"), *script("scheduler", "--listen", hub, "--dtype", "float32", "--tp", 2, *meeting, *ours)],
        [*hosts.on("work0"), *script("worker", "--scheduler", hub, "--rank", 0, *theirs)],
        [*hosts.on("work1"), *script("worker", "--scheduler", hub, "--rank", 1, *theirs)],
        [
            *hosts.on("front"),
            *script("frontend", "--scheduler", hub, "--host", HOSTS["front"], "--port", 8000, *theirs),
        ],
    ):
        url = f"http://{HOSTS['front']}:8000"
        wait_ready(url)
        assert ask(url) == demo.complete(PROMPT, max_tokens=32)
