"""The real thing: serve.py and the component scripts, with a tiny random model."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from quire.common.errors import EXIT_CONFIG, EXIT_FATAL

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SMALL = ("--num-gpu-blocks-override=64", "--max-model-len=256", "--threads=1")


class Server:
    """A process of ours and all below it, its output in files."""

    def __init__(self, folder: Path, script: str, *options: str) -> None:
        self.began = time.monotonic()
        self.out, self.err = folder / f"{script}.out", folder / f"{script}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = psutil.Popen(
                [sys.executable, str(LAUNCH / script), *options],
                stdout=out,
                stderr=err,
                env=os.environ | {"TMPDIR": str(folder), "XDG_RUNTIME_DIR": ""},
            )
        self.below: list[psutil.Process] = []

    def answers(self, url: str, status: int, within_s: float) -> None:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url, timeout=1).status_code == status:
                    return
            assert time.monotonic() - self.began < within_s, self.err.read_text()
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.02)

    def ready(self, port: int) -> "Server":
        self.answers(f"http://127.0.0.1:{port}/ready", 200, 60)
        self.below = self.process.children()
        return self

    def part(self, name: str) -> psutil.Process:
        return next(p for p in self.below if f"quire.launch.{name}" in p.cmdline())

    def end(self) -> int:
        return int(self.process.wait(20))

    def assert_nothing_is_left(self) -> None:
        assert not psutil.wait_procs(self.below, timeout=5)[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def begin(script: str, *options: str) -> Server:
        started.append(Server(tmp_path, script, *options))
        return started[-1]

    yield begin
    for server in started:
        for process in (server.process, *server.below):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the kernel gives to outgoing connections."""
    while True:
        first = random.randrange(10_000, 30_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for number in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", number)))
            return first


@pytest.fixture
def port() -> int:
    return free_ports(1)


def complete(port: int, tokens: int) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30)


def test_it_answers_soon_serves_and_lets_running_requests_finish(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path]
) -> None:
    server = start(
        "serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL, "--frontends=2", "--api-key=sesame"
    )
    server.answers(f"http://127.0.0.1:{port}/health", 200, within_s=4.0)  # 2 s are the aim; tests run side by side
    server.ready(port)
    assert len(server.below) == 4
    assert not any("sesame" in " ".join(p.cmdline()) for p in server.below)
    keyed = {"Authorization": "Bearer sesame"}
    url = f"http://127.0.0.1:{port}/v1/completions"
    assert complete(port, 1).status_code == 401
    body = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, headers=keyed, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        server.process.terminate()
        text = "\n".join(lines)
    assert "data: [DONE]" in text
    assert "error" not in text
    assert server.end() == 0
    server.assert_nothing_is_left()
    assert "Traceback" not in server.err.read_text()
    assert "is ready" in server.out.read_text()


@pytest.mark.parametrize("part", ["worker", "scheduler", "frontend"])
def test_a_part_that_is_killed_is_named_and_ends_all(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path], part: str
) -> None:
    server = start("serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL).ready(port)
    body = {"prompt": "hello", "max_tokens": 200, "n": 8, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        server.part(part).kill()
        if part == "worker":
            assert "worker 0 is gone" in "".join(lines)
    assert server.end() == EXIT_FATAL
    assert f"{part}{' 0' if part == 'worker' else ''} was killed by signal 9 (SIGKILL)" in server.err.read_text()
    server.assert_nothing_is_left()


def test_a_killed_supervisor_leaves_nothing_behind(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path]
) -> None:
    server = start("serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL, "--tp=2").ready(port)
    assert len(server.below) == 4
    server.process.kill()
    server.assert_nothing_is_left()


def test_a_model_that_fails_to_load_is_a_matter_of_configuration(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint("llama").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: -1000 if file.suffix == ".safetensors" else None])
    server = start("serve.py", str(broken), "--port", str(port), *SMALL)
    assert server.end() == EXIT_CONFIG
    assert "model.safetensors" in server.err.read_text()
    assert "Traceback" not in server.err.read_text()


def test_each_part_by_itself_serves_the_same(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path]
) -> None:
    address = f"tcp://127.0.0.1:{free_ports(2)}"
    model = str(checkpoint("llama"))
    parts = [
        start("worker.py", "--scheduler", address, "--rank", "0"),
        start("frontend.py", "--scheduler", address, "--port", str(port)),
        start("scheduler.py", "--model", model, *SMALL, "--listen", address),
    ]
    parts[1].ready(port)
    assert f"listening on http://127.0.0.1:{port}, waiting for the scheduler at {address}" in parts[1].err.read_text()
    apart = complete(port, 16).json()["choices"][0]["text"]
    for part in parts:
        part.process.send_signal(signal.SIGTERM)
    assert [part.end() for part in parts] == [0, 0, 0]
    whole = start("serve.py", model, "--port", str(port), *SMALL).ready(port)
    assert complete(port, 16).json()["choices"][0]["text"] == apart
    whole.process.terminate()
    assert whole.end() == 0


def test_a_terminal_chat_with_a_server(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path]
) -> None:
    start("serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL).ready(port)
    command = [
        sys.executable,
        "-m",
        "quire.launch.cli",
        "chat",
        f"--url=http://127.0.0.1:{port}",
        "-q",
        "hello",
        "--max-tokens=8",
        "--stats",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0
    assert "tokens" in result.stderr
