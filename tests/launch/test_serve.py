"""The real thing: serve.py and the component scripts, with a tiny random model."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from quire.common.errors import EXIT_CONFIG, EXIT_FATAL

from ..ports import free_ports
from .processes import SMALL, Server, complete


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
def test_a_part_that_is_killed_is_started_again_and_the_port_stays(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path], part: str
) -> None:
    server = start("serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL, "--frontends=2").ready(port)
    assert len(server.below) == 4
    before = complete(port, 16).json()["choices"][0]["text"]
    victim = server.part(part)
    victim.kill()
    server.said("was killed by signal 9 (SIGKILL), likely for lack of memory")
    for _ in range(4):  # of two frontends: the other one, or the connection waits in the port's queue
        assert complete(port, 16).json()["choices"][0]["text"] == before
    server.complete_again(without=victim)
    server.process.terminate()
    assert server.end() == 0
    server.assert_nothing_is_left()


@pytest.mark.parametrize("part", ["worker", "scheduler"])
def test_at_the_last_restart_streams_end_with_an_error_and_all_ends(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path], part: str
) -> None:
    server = start("serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL, "--max-restarts=0").ready(port)
    body = {"prompt": "hello", "max_tokens": 200, "n": 8, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
        server.part(part).kill()
        assert "engine_dead" in "".join(lines)
    assert server.end() == EXIT_FATAL
    assert f"{part}{' 0' if part == 'worker' else ''} was killed by signal 9 (SIGKILL)" in server.err.read_text()
    server.assert_nothing_is_left()


@pytest.mark.parametrize("streams", [">/dev/full 2>&1", ">&- 2>&-"])
def test_streams_that_cannot_be_written_to_change_nothing(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path], streams: str
) -> None:
    server = start("serve.py", str(checkpoint("llama")), "--port", str(port), *SMALL, streams=streams).ready(port)
    assert server.process.cmdline()[0] == sys.executable
    server.part("worker").kill()
    assert complete(port, 8).status_code == 200
    server.process.terminate()
    assert server.end() == 0
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
