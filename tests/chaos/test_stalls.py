"""SIGSTOP of every part: /health tells the truth within the threshold, and nothing is said twice after SIGCONT."""

import time

import pytest

from ..e2e.server import wait_until
from .clients import workload
from .conftest import Engines
from .engine import BACK_S, Engine, seconds_until, stopped

STALL_S = 4.0
LATE_S = 2.0  # a heartbeat, a turn of the loop, and a machine with other things to do
PEER_TIMEOUT_S = 5.0
BODIES = workload(32)


@pytest.fixture
def engine(engines: Engines) -> Engine:
    """A step of it may compute 16 long prompts at once, which takes longer than the threshold."""
    return engines("--stall-timeout", STALL_S, "--max-num-batched-tokens", 32_768)


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_it_is_told_and_goes_on_where_it_was(engine: Engine, role: str) -> None:
    part = engine.part(role)
    threshold_s = STALL_S if role == "worker" else PEER_TIMEOUT_S
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        with stopped(part):
            assert seconds_until(lambda: engine.health() == (503, "stalled")) <= threshold_s + LATE_S
            assert engine.http.get("/ready").status_code == 503
            assert engine.http.get("/metrics").status_code == 200
        engine.check_records(crowd.join())
    assert engine.part(role) == part
    engine.check()


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_what_stays_stalled_is_started_anew(engine: Engine, role: str) -> None:
    part = engine.part(role)
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        with stopped(part):
            engine.wait_replaced(part, role)
        engine.check_records(crowd.join())
    engine.check()


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_moment_goes_unnoticed(engine: Engine, role: str) -> None:
    """Far below the threshold: nobody is told, nothing is lost."""
    pids = [process.pid for process in engine.tree()]
    with engine.crowd(BODIES) as crowd:
        for tokens in (5, 20, 40):
            crowd.flowing(tokens)
            with stopped(engine.part(role)):
                assert engine.health() == (200, "ok")
        engine.check_records(crowd.join())
    assert [process.pid for process in engine.tree()] == pids
    engine.check()


def test_a_frontend_that_was_dropped_meanwhile(engines: Engines) -> None:
    """It does not answer while it is stopped; the scheduler drops it, and its streams go on when it is back."""
    engine = engines("--frontends", 2)
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        with stopped(engine.part("frontend")):
            with engine.crowd(workload(4)) as others:  # the kernel gives new connections to the other one
                engine.check_records(others.join())
            wait_until(lambda: engine.metric("quire:peers", role="frontend") == 1, BACK_S)
        engine.check_records(crowd.join())
    engine.check()


def test_the_supervisor(engine: Engine) -> None:
    """Everything is served without it, and it takes nobody for stalled because it was away itself."""
    supervisor, *parts = engine.tree()
    with stopped(supervisor):
        end = time.monotonic() + 2 * STALL_S + LATE_S
        while time.monotonic() < end:
            with engine.crowd(BODIES) as crowd:
                engine.check_records(crowd.join())
            assert engine.health() == (200, "ok")
    engine.check()
    assert engine.tree() == [supervisor, *parts]


def test_a_dead_worker_under_a_stopped_supervisor_is_replaced_when_it_goes_on(engine: Engine) -> None:
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        with stopped(engine.tree()[0]):
            engine.kill("worker")
            wait_until(lambda: not engine.is_ready(), BACK_S)
        engine.check_records(crowd.join())
    engine.check()


def test_long_prompts_are_no_stall(engine: Engine) -> None:
    """A step that computes longer than the threshold is progress all the same."""
    prompts = [{"model": "demo", "prompt": [5 + i % 90] * 2000, "max_tokens": 1, "temperature": 0} for i in range(10)]
    parts = engine.tree()
    with engine.crowd(prompts) as crowd:
        while not crowd.over:
            assert engine.health() == (200, "ok")
            assert engine.is_ready()
            time.sleep(0.05)
        assert all(record.well for record in crowd.join())
    assert engine.tree() == parts
    engine.check()
