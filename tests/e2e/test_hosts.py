"""The components started by hand, on tcp:// addresses, serve the same answers; where allowed, each on its own host."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from .server import START_S, Server, free_port, script

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


def ask(url: str, prefix: tuple[str, ...] = ()) -> str:
    """The greedy completion of PROMPT; `prefix` runs the client elsewhere (in a network namespace)."""
    if not prefix:
        with httpx.Client(base_url=url, timeout=30) as http:
            answer = http.post(
                "/v1/completions", json={"model": "demo", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
            )
        text: str = answer.json()["choices"][0]["text"]
        return text
    body = f'{{"model": "demo", "prompt": {PROMPT!r}, "max_tokens": 32, "temperature": 0}}'.replace("'", '"')
    answer_text = subprocess.run(
        [*prefix, "curl", "-sf", "-H", "content-type: application/json", f"{url}/v1/completions", "-d", body],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return str(httpx.Response(200, text=answer_text).json()["choices"][0]["text"])


def wait_ready(url: str, prefix: tuple[str, ...] = ()) -> None:
    end = time.monotonic() + START_S
    while subprocess.run([*prefix, "curl", "-sf", f"{url}/ready"], capture_output=True, check=False).returncode:
        assert time.monotonic() < end, "not ready in time"
        time.sleep(0.1)


@pytest.mark.parametrize("tp", [1, 2])
def test_components_by_hand_on_one_host(demo: Server, tp: int) -> None:
    hub, http_port = f"tcp://127.0.0.1:{free_port()}", free_port()
    meeting = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    with running(
        script("worker", "--scheduler", hub, "--rank", 0),
        script("frontend", "--scheduler", hub, "--port", http_port),
        script("scheduler", "--listen", hub, "--dtype", "float32", "--tp", tp, *meeting),
        *(script("worker", "--scheduler", hub, "--rank", rank) for rank in range(1, tp)),
    ):
        wait_ready(f"http://127.0.0.1:{http_port}")
        assert ask(f"http://127.0.0.1:{http_port}") == demo.complete(PROMPT, max_tokens=32)


HOSTS = {"front": "10.99.7.1", "sched": "10.99.7.2", "work0": "10.99.7.3", "work1": "10.99.7.4"}


@pytest.fixture
def hosts() -> Iterator[dict[str, tuple[str, ...]]]:
    """Four network namespaces on one bridge, each a host of its own with one address; yields the command prefix of each."""
    if (
        not shutil.which("ip")
        or subprocess.run(["ip", "netns", "add", "quire-probe"], capture_output=True, check=False).returncode
    ):
        pytest.skip("network namespaces need root and iproute2")
    subprocess.run(["ip", "netns", "del", "quire-probe"], check=True)

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=not check)

    def remove() -> None:
        for host in (*HOSTS, "switch"):
            ip("netns", "del", f"quire-{host}", check=False)

    remove()
    try:
        ip("netns", "add", "quire-switch")
        ip("-n", "quire-switch", "link", "add", "bridge", "type", "bridge")
        ip("-n", "quire-switch", "link", "set", "bridge", "up")
        for host, address in HOSTS.items():
            ip("netns", "add", f"quire-{host}")
            ip(
                "-n",
                f"quire-{host}",
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                host,
                "netns",
                "quire-switch",
            )
            ip("-n", "quire-switch", "link", "set", host, "master", "bridge", "up")
            ip("-n", f"quire-{host}", "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", f"quire-{host}", "link", "set", "eth0", "up")
            ip("-n", f"quire-{host}", "link", "set", "lo", "up")
        yield {host: ("ip", "netns", "exec", f"quire-{host}") for host in HOSTS}
    finally:
        remove()


def test_components_each_on_its_own_host(demo: Server, hosts: dict[str, tuple[str, ...]]) -> None:
    hub = f"tcp://{HOSTS['sched']}:5555"
    meeting = ("--master-addr", HOSTS["work0"], "--master-port", 29600)
    with running(
        [*hosts["sched"], *script("scheduler", "--listen", hub, "--dtype", "float32", "--tp", 2, *meeting)],
        [*hosts["work0"], *script("worker", "--scheduler", hub, "--rank", 0)],
        [*hosts["work1"], *script("worker", "--scheduler", hub, "--rank", 1)],
        [*hosts["front"], *script("frontend", "--scheduler", hub, "--host", HOSTS["front"], "--port", 8000)],
    ):
        url = f"http://{HOSTS['front']}:8000"
        wait_ready(url, hosts["front"])
        assert ask(url, hosts["front"]) == demo.complete(PROMPT, max_tokens=32)
