"""What probes are told, and how a frontend process ends when its engine is gone for good."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest

from quire.common.config import ServerConfig
from quire.common.errors import EXIT_FATAL, ConfigError
from quire.common.messages import Status
from quire.common.process import END, GONE
from quire.frontend.service import Service
from quire.frontend.streams import EngineDead

from .fake_scheduler import FakeScheduler, frontend_process, http, never_reading, until, wait_ready

LONG = {"prompt": "hello world", "max_tokens": 100, "ignore_eos": True, "seed": 0}
PROBES = ("/health", "/ready", "/startup")


@pytest.fixture
def scheduler(make_scheduler) -> Iterator[FakeScheduler]:
    with make_scheduler() as scheduler:
        yield scheduler


def told(url: str, health: int, ready: int, startup: int, status: str) -> bool:
    """Whether the probes say so; HEAD, too."""
    for path, code in zip(PROBES, (health, ready, startup), strict=True):
        answer = http.get(url + path)
        body = answer.json()
        assert {"status", "phase", "progress", "detail"} <= body.keys()
        assert ("error" in body) == (answer.status_code == 503) == ("retry-after" in answer.headers)
        if (answer.status_code, body["status"]) != (code, status) or http.head(url + path).status_code != code:
            return False
    return True


def alive(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return http.get(f"{url}/health", timeout=1).status_code == 200
    return False


def test_probes_from_the_start_to_the_end(scheduler: FakeScheduler) -> None:
    scheduler.status = Status("loading", 0.25, "layer 3 of 12")
    with frontend_process(scheduler.address, peer_timeout_s=1.0) as (_, url):
        until(lambda: alive(url))
        until(lambda: http.get(f"{url}/startup").json()["phase"] == "loading")
        assert told(url, 200, 503, 503, "starting")
        body = http.get(f"{url}/startup").json()
        assert (body["progress"], body["detail"], body["error"]["code"]) == (0.25, "layer 3 of 12", "not_ready")
        scheduler.set_status(Status("ready", 1.0))
        wait_ready(url)
        assert told(url, 200, 200, 200, "ok")

        scheduler.set_status(Status("recovering", detail="worker 1 is gone"))
        until(lambda: told(url, 200, 503, 200, "recovering"))
        assert "worker 1 is gone" in http.get(f"{url}/ready").json()["error"]["message"]
        scheduler.set_status(Status("stalled", detail="worker 1 has been silent for 30 s"))
        until(lambda: told(url, 503, 503, 200, "stalled"))
        assert http.get(f"{url}/health").json()["error"]["code"] == "stalled"
        scheduler.set_status(Status("ready", 1.0))
        until(lambda: told(url, 200, 200, 200, "ok"))

        scheduler.restart(status=Status("loading", 0.5))
        until(lambda: told(url, 200, 503, 200, "recovering"))
        scheduler.set_status(Status("ready", 1.0))
        until(lambda: told(url, 200, 200, 200, "ok"))

        scheduler.awake.clear()
        until(lambda: told(url, 503, 503, 200, "stalled"))
        assert "not been heard" in http.get(f"{url}/health").json()["detail"]
        scheduler.awake.set()
        until(lambda: told(url, 200, 200, 200, "ok"))


@pytest.mark.parametrize("failure", [EngineDead("worker 0 was killed"), ConfigError("no such file"), None])
def test_an_engine_that_is_gone_is_dead(failure: EngineDead | ConfigError | None) -> None:
    class Client:
        """Of the process, in the moments before it exits."""

        ended, silent, ready, served = True, False, False, True
        status = Status("ready", 1.0)

    client = Client()
    client.failure = failure  # type: ignore[attr-defined]
    service = Service(client)  # type: ignore[arg-type]
    health, unready = service.health, service.unready
    assert health.status == "dead" and health.detail == str(failure or "the engine was shut down")
    assert unready is not None and (unready.status, unready.code, unready.message) == (
        503,
        "engine_dead",
        health.detail,
    )


def test_probes_are_described(url: str) -> None:
    paths = http.get(f"{url}/openapi.json").json()["paths"]
    for path in PROBES:
        described = paths[path]["get"]
        assert described["description"] and {"200", "503"} <= described["responses"].keys()
        body = http.get(url + path).json()
        for code in ("200", "503"):
            schema = described["responses"][code]["content"]["application/json"]["schema"]
            assert schema["properties"].keys() == body.keys()


def test_an_engine_that_computes_for_long_is_well(scheduler: FakeScheduler) -> None:
    """Probes ask nobody: a prefill that keeps the workers busy, and every request waiting, is no illness."""
    with frontend_process(scheduler.address, peer_timeout_s=1.0) as (_, url), ThreadPoolExecutor(16) as pool:
        wait_ready(url)
        scheduler.hold.clear()
        asked = [pool.submit(http.post, f"{url}/v1/completions", json=LONG) for _ in range(16)]
        until(lambda: scheduler.num_running == 16)
        ends = time.monotonic() + 2.0
        while time.monotonic() < ends:
            assert told(url, 200, 200, 200, "ok")
        scheduler.hold.set()
        assert {future.result().status_code for future in asked} == {200}


# --- ends -------------------------------------------------------------------------------------------------------------


def test_requests_are_told_that_the_engine_is_gone(scheduler: FakeScheduler) -> None:
    """Within 2 s, though a client reads nothing; the exit code says that it was no clean end."""
    scheduler.delay_s = 0.002
    with frontend_process(scheduler.address, send_buffer=4096) as (process, url), ThreadPoolExecutor(4) as pool:
        wait_ready(url)
        body = {**LONG, "max_tokens": 450}
        asked = [
            pool.submit(http.post, f"{url}/v1/completions", json={**body, "stream": bool(i % 2)}) for i in range(4)
        ]
        with never_reading(url, {**body, "n": 16, "stream": True}):
            until(lambda: scheduler.num_running == 4 + 16 and scheduler.shortest > 300)
            scheduler.hold.clear()
            began = time.monotonic()
            process.send_signal(GONE)
            answers = [future.result() for future in asked]
            assert process.wait(5) == EXIT_FATAL
            assert time.monotonic() - began < 2.0
    for i, answer in enumerate(answers):
        if i % 2:
            assert answer.status_code == 200 and "[DONE]" not in answer.text
            error = msgspec.json.decode(answer.text.strip().rpartition("data: ")[2])["error"]
        else:
            assert answer.status_code == 500
            error = answer.json()["error"]
        assert error["code"] == "engine_dead" and "gone" in error["message"]


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_drain_while_the_engine_recovers(make_scheduler, comes_back: bool) -> None:
    """What waits for the engine gets the time of the drain."""
    with (
        make_scheduler(ServerConfig(drain_timeout=30.0 if comes_back else 1.0)) as scheduler,
        frontend_process(scheduler.address) as (process, url),
        ThreadPoolExecutor(2) as pool,
    ):
        wait_ready(url)
        undisturbed = http.post(f"{url}/v1/completions", json=LONG).json()["choices"]
        scheduler.hold.clear()
        running = pool.submit(http.post, f"{url}/v1/completions", json=LONG)
        until(lambda: scheduler.num_running == 1)
        scheduler.restart(status=Status("loading"))
        until(lambda: told(url, 200, 503, 200, "recovering"))
        held = pool.submit(http.post, f"{url}/v1/completions", json=LONG)
        with httpx.Client() as late:
            late.get(f"{url}/version")
            until(lambda: "draining" in process_says(late, url, process))
            if comes_back:
                scheduler.hold.set()
                scheduler.set_status(Status("ready", 1.0))
                assert [future.result().json()["choices"] for future in (running, held)] == [undisturbed] * 2
        assert process.wait(10) == 0
        if not comes_back:
            for future in (running, held):
                answer = future.result()
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def process_says(client: httpx.Client, url: str, process: Any) -> str:
    """The first call asks the process to drain."""
    if not getattr(process, "asked", False):
        process.asked = True
        process.send_signal(END)
    with contextlib.suppress(httpx.TransportError):
        return client.post(f"{url}/v1/completions", json=LONG).text
    return "draining: the connection is closed"
