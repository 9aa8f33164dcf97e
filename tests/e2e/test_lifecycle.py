"""Starting, stopping and dying: what is answered when, what is finished, and that nothing is left behind."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from .server import START_S, Server, wait_until

LONG = {"model": "demo", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_http_answers_while_the_model_loads(server: Server) -> None:
    """/health is 200 as soon as anything answers; /startup says the phase; requests are told when to come back."""
    seen = set()
    while True:
        try:
            startup = server.http.get("/startup")
        except httpx.HTTPError:
            time.sleep(0.01)
            continue
        health = server.http.get("/health")
        assert health.status_code == 200
        if startup.status_code == 200:
            break
        assert startup.status_code == 503
        seen.add(startup.json()["phase"])
        assert 0 <= startup.json()["progress"] <= 1
        refused = server.http.post("/v1/completions", json=LONG)
        if refused.status_code != 200:  # it may have become ready between the two
            assert server.http.get("/ready").status_code in (200, 503)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "not_ready"
    assert seen
    server.wait_ready()
    assert server.http.get("/health").json()["status"] == "ok"


def test_startup_stays_over_and_ready_does_not(server: Server) -> None:
    """What a part's death changes for probes: /ready, until it is back, and nothing else."""
    victim = next(p for p in server.wait_ready().tree() if "quire.launch.worker" in " ".join(p.cmdline()))
    victim.kill()
    wait_until(lambda: server.http.get("/ready").status_code == 503)
    assert server.http.get("/startup").status_code == 200
    assert server.http.get("/health").json()["status"] == "recovering"
    server.wait_ready()


@pytest.mark.parametrize("everybody", [False, True], ids=["supervisor", "whole control group"])
def test_sigterm_lets_running_requests_finish(server: Server, everybody: bool) -> None:
    """systemd signals every process of a service at once; it makes no difference."""
    whole = server.wait_ready().http.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
    answers: list[str] = []
    accepted = threading.Semaphore(0)

    def ask() -> None:
        with (
            httpx.Client(base_url=server.url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream,
        ):
            accepted.release()
            lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
        answers.append("".join(json.loads(line)["choices"][0]["text"] for line in lines))

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    assert all(accepted.acquire(timeout=START_S) for _ in clients)
    for process in server.tree()[1:] if everybody else []:
        process.send_signal(signal.SIGTERM)
    assert server.stop() == 0
    for client in clients:
        client.join()
    assert answers == [whole] * 8


def test_ctrl_c_ends_it_with_one_line(server: Server) -> None:
    server.wait_ready().process.send_signal(signal.SIGINT)
    output = server.read_output()
    assert server.process.returncode == 0
    assert "Traceback" not in output


def test_sigkill_of_the_supervisor_leaves_no_process(server: Server) -> None:
    tree = server.wait_ready().tree()
    assert len(tree) >= 4  # supervisor, frontend, scheduler, worker
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    _, alive = psutil.wait_procs(tree[1:], timeout=5)
    assert not alive


def test_frontend_and_scheduler_stay_small(demo: Server) -> None:
    """150 MB each with the built-in model, after it has served."""
    demo.complete("hello", max_tokens=4)
    sizes = {}
    for process in demo.tree():
        for part in ("frontend", "scheduler"):
            if f"quire.launch.{part}" in " ".join(process.cmdline()):
                sizes[part] = process.memory_info().rss / 1e6
    assert sizes.keys() == {"frontend", "scheduler"}
    assert max(sizes.values()) <= 150, sizes


def test_two_frontends_and_two_workers_serve_the_same(demo: Server) -> None:
    """Every connection is a new one, so both frontends get some."""
    expected = demo.complete("import os", max_tokens=24)
    with Server("--tp", 2, "--frontends", 2) as server:
        server.wait_ready()
        commands = [" ".join(process.cmdline()) for process in server.tree()]
        assert sum("quire.launch.frontend" in command for command in commands) == 2
        assert sum("quire.launch.worker" in command for command in commands) == 2
        body = {"model": "demo", "prompt": "import os", "max_tokens": 24, "temperature": 0}
        answers = [httpx.post(f"{server.url}/v1/completions", json=body, timeout=30) for _ in range(8)]
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}


def test_the_run_directory_is_private_and_goes_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Server() as server:
        server.wait_ready()
        (run_dir,) = tmp_path.iterdir()
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert (run_dir / "config.json").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.iterdir())
