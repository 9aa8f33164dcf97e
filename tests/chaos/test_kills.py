"""SIGKILL of every part, at every moment: clients see a pause, and the text that would have been without it."""

import random
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from ..conftest import Sizes
from ..e2e.server import wait_until
from .clients import Crowd, workload
from .conftest import Engines
from .engine import BACK_S, FRESH, Engine

STREAMS = 32  # every other one samples
BODIES = workload(STREAMS)
LONG_BODIES = workload(STREAMS, 120, first=100)  # for more than one blow
SHORT_BODIES = workload(STREAMS, 40, first=200)  # for two workers that share the cores


def survives(engine: Engine, *blows: Callable[[], object], bodies: list[dict[str, object]] = BODIES) -> None:
    """Blows under load, each once tokens flow (again); nothing is lost, nothing altered, nothing left."""
    engine.learn(bodies)
    with engine.crowd(bodies) as crowd:
        crowd.flowing(5)
        for blow in blows:
            blow()
            flows_again(crowd)
        engine.check_records(crowd.join())
    engine.check()


def flows_again(crowd: Crowd) -> None:
    """Until tokens come from steps planned from now on: more than what was under way could bring."""
    before = [record.tokens for record in crowd.records]
    under_way = 5  # two steps in flight, and what sockets hold

    def moved() -> bool:
        return crowd.over or any(r.tokens > b + under_way for r, b in zip(crowd.records, before, strict=True))

    wait_until(moved, BACK_S)


def test_a_worker(engine: Engine) -> None:
    victim = engine.part("worker")
    survives(engine, lambda: engine.kill("worker"))
    assert engine.part("worker") != victim


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_workers(engines: Engines, rank: int) -> None:
    engine = engines("--tp", 2)
    survives(engine, lambda: engine.kill("worker", rank), bodies=SHORT_BODIES)


def test_the_scheduler_and_the_worker_keeps_its_weights(engine: Engine) -> None:
    worker = engine.part("worker")
    survives(engine, lambda: engine.kill("scheduler"))
    assert engine.part("worker") == worker


def test_the_scheduler_of_two_workers(engines: Engines) -> None:
    engine = engines("--tp", 2)
    workers = engine.parts("worker")
    survives(engine, lambda: engine.kill("scheduler"), bodies=SHORT_BODIES)
    assert engine.parts("worker") == workers


def test_scheduler_and_worker_at_once(engine: Engine) -> None:
    survives(engine, lambda: (engine.part("scheduler").kill(), engine.part("worker").kill()))


def test_a_worker_twice_in_a_row(engine: Engine) -> None:
    survives(engine, lambda: engine.kill("worker"), lambda: engine.kill("worker"), bodies=LONG_BODIES)


def test_the_scheduler_twice_in_a_row(engine: Engine) -> None:
    survives(engine, lambda: engine.kill("scheduler"), lambda: engine.kill("scheduler"), bodies=LONG_BODIES)


@pytest.mark.parametrize("second", ["worker", "scheduler"])
def test_during_recovery(engine: Engine, second: str) -> None:
    """The worker that takes the dead one's place is killed before it serves; or the scheduler while it waits for it."""

    def blow() -> None:
        victim = engine.kill("worker")
        engine.wait_replaced(victim, "worker")
        engine.kill(second)

    survives(engine, blow)


@pytest.mark.parametrize("tp", [1, 2])
def test_at_random_moments(engines: Engines, sizes: Sizes, tp: int) -> None:
    engine = engines(*(("--tp", 2) if tp == 2 else ()))
    rng = random.Random(tp)
    victims = [("worker", rng.randrange(tp)) if rng.random() < 0.6 else ("scheduler", 0) for _ in range(sizes.kills)]
    bodies = LONG_BODIES if tp == 1 else SHORT_BODIES
    engine.learn(bodies)
    while victims:
        with engine.crowd(bodies) as crowd:
            crowd.flowing(1)
            while victims and not crowd.over:
                engine.kill(*victims.pop())
                wait = time.monotonic() + rng.uniform(0, 2)
                wait_until(lambda wait=wait, crowd=crowd: time.monotonic() > wait or crowd.over)
            engine.check_records(crowd.join())
    engine.check()


def connections(process: psutil.Process, port: int) -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in process.net_connections("tcp"))


def test_one_of_two_frontends(engines: Engines) -> None:
    """Whoever was connected to it loses the connection, nobody else anything; the port never closes."""
    engine = engines("--frontends", 2)
    engine.http.close()  # its connection would be among those counted
    engine.http = httpx.Client(base_url=engine.url)
    engine.learn(BODIES)
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        victim, other = sorted(engine.parts("frontend"), key=lambda p: connections(p, engine.port))
        num_victims, num_others = connections(victim, engine.port), connections(other, engine.port)
        assert num_victims + num_others == STREAMS
        victim.kill()
        with engine.crowd(workload(4)) as more:
            engine.check_records(more.join())
        records = crowd.join()
    lost = [record for record in records if record.error.startswith("connection")]
    assert len(lost) == num_victims
    engine.check_records([record for record in records if record not in lost])
    engine.check()


def served_at_last(engine: Engine) -> None:
    """New clients get their answers. A frontend that has just begun may say when to come back."""

    def served() -> bool:
        with engine.crowd(FRESH) as crowd:
            records = crowd.join()
        refused = [record for record in records if record.status == 503]
        assert all(record.code == "not_ready" and int(record.headers["retry-after"]) >= 1 for record in refused)
        engine.check_records([record for record in records if record not in refused])
        return not refused

    wait_until(served, BACK_S)


def test_the_only_frontend_and_its_port_stays(engine: Engine) -> None:
    """Connections that come meanwhile wait in the queue of a socket that the supervisor holds."""
    engine.kill("frontend")
    served_at_last(engine)
    engine.check()


def test_every_part_at_once(engine: Engine) -> None:
    """All but the supervisor."""
    for process in engine.tree()[1:]:
        process.kill()
    served_at_last(engine)
    engine.check()
