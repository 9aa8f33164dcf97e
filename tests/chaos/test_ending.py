"""Ends that are meant: the cap on restarts, and signals while things go wrong. Nothing accepted is lost, nothing is left."""

import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from ..e2e.server import wait_until
from .clients import Crowd, whole, workload
from .conftest import Answers
from .engine import BACK_S, FAULTY, FREELY, Engine

BODIES = workload(32)
NOTICE_S = 2.0  # for every stream to be told of the end


@pytest.fixture
def engine(answers: Answers) -> Iterator[Engine]:
    with Engine(*FREELY, answers=answers) as engine:
        engine.wait_ready()
        engine.learn(BODIES)
        yield engine


def nobody_is_left(tree: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_crash_loop_reaches_the_cap(role: str) -> None:
    """Whoever dies again and again: every stream is told within 2 s of the last death, and the exit code is 70."""
    with Engine("--max-restarts", 2, command=FAULTY) as engine:
        tree = engine.wait_ready().tree()
        with engine.crowd(BODIES) as crowd:
            crowd.flowing(5)
            if role == "worker":
                (engine.switches / "die").touch()
            died_at = last_death(engine, role, crowd)
            records = crowd.join()
        assert engine.process.wait(10) == 70
        assert {(record.status, record.code) for record in records} == {(200, "engine_dead")}
        assert not any(record.done or record.finish for record in records)
        assert max(record.ended_at for record in records) - died_at <= NOTICE_S
        nobody_is_left(tree)
        assert f"{role}" in engine.log()
        assert not list(engine.runtime.iterdir())


def last_death(engine: Engine, role: str, crowd: Crowd) -> float:
    """When the last process of a role ended; a scheduler is helped to."""
    seen_at = time.monotonic()
    while not crowd.over:
        if living := engine.parts(role) if engine.alive else []:
            seen_at = time.monotonic()
            if role == "scheduler":
                living[0].kill()
        time.sleep(0.01)
    return seen_at


def test_requests_without_a_stream_get_500_when_the_engine_is_dead() -> None:
    bodies = [whole(body) for body in workload(32, 1500)]  # so long that all of them are seen to run
    with Engine("--max-restarts", 0) as engine:
        engine.wait_ready()
        with engine.crowd(bodies) as crowd:
            wait_until(lambda: engine.metric("vllm:num_requests_running") == len(bodies), BACK_S)
            engine.kill("worker")
            records = crowd.join()
        assert {(record.status, record.code) for record in records} == {(500, "engine_dead")}
        assert engine.process.wait(10) == 70


@pytest.mark.parametrize("role", ["worker", "scheduler", "frontend"])
def test_no_restart_is_allowed(role: str) -> None:
    """The first death ends it, named with its signal."""
    with Engine("--max-restarts", 0) as engine:
        tree = engine.wait_ready().tree()
        engine.kill(role)
        output = engine.read_output()
        assert engine.process.returncode == 70
        assert role in output
        assert (
            "signal 9 (SIGKILL), likely for lack of memory" in output
        )  # of all that kills so, the kernel does it most
        nobody_is_left(tree)


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_sigterm_while_recovering_loses_nothing(engine: Engine, role: str) -> None:
    tree = engine.tree()
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        engine.kill(role)
        engine.process.send_signal(signal.SIGTERM)
        engine.check_records(crowd.join())
    assert engine.process.wait(BACK_S) == 0
    nobody_is_left(tree)


@pytest.mark.parametrize("role", ["worker", "scheduler"])
def test_a_death_while_draining_loses_nothing(engine: Engine, role: str) -> None:
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        engine.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in engine.log(), BACK_S)
        engine.kill(role)
        engine.check_records(crowd.join())
    assert engine.process.wait(BACK_S) == 0


def test_a_second_sigterm_ends_streams_at_once_and_leaves_nobody(engine: Engine) -> None:
    tree = engine.tree()
    with engine.crowd(workload(32, 1500, first=200)) as crowd:
        crowd.flowing(5)
        engine.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in engine.log(), BACK_S)
        engine.process.send_signal(signal.SIGTERM)
        engine.process.wait(10)
        assert not any(record.done for record in crowd.join())
    nobody_is_left(tree)


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="what is ignored stays ignored: nohup")
def test_sighup_is_like_the_end_of_a_terminal(engine: Engine) -> None:
    tree = engine.tree()
    engine.process.send_signal(signal.SIGHUP)
    assert engine.process.wait(10) == 0
    nobody_is_left(tree)
