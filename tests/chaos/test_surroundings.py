"""What is around the engine: the clock, the terminal, other engines, what a killed one left."""

import ast
import os
import time
from pathlib import Path

import pytest

from ..e2e.server import ROOT, Server, wait_until
from .clients import whole, workload
from .conftest import Answers
from .engine import BACK_S, FAULTS, FREELY, FRESH, Engine

BODIES = workload(32)
HOUR_S = 3600

# The wall clock, and what for. Everything that waits, measures or expires has the monotonic one.
WALL_CLOCK = {
    "frontend/openai/answers.py": "`created` of an answer",
    "frontend/service.py": "`created` of the models",
    "scheduler/process.py": "epochs, which must differ between two schedulers of one engine",
    "scheduler/sight.py": "times for people, in the journal, its name, and what is tapped",
}


def readings(path: Path) -> list[str]:
    """Of the wall clock, in one file."""
    clocks = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call | ast.Attribute))
    return [ast.unparse(node) for node in calls if ast.unparse(node) in clocks]


def test_nothing_waits_by_the_wall_clock() -> None:
    packages = ("common", "frontend", "kernels", "launch", "scheduler", "worker")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py") if path.name != "train.py"]
    assert {str(path.relative_to(ROOT)) for path in files if readings(path)} == set(WALL_CLOCK)


def test_clocks_that_jump(answers: Answers) -> None:
    """An hour forth, two back, in every process, with kills between: only `created` moves."""
    with Engine(*FREELY, environment={"PYTHONPATH": str(FAULTS / "clock")}, answers=answers) as engine:
        engine.settle()
        clock = engine.switches / "clock"
        created = []
        for jump_s, victim in ((HOUR_S, "scheduler"), (-HOUR_S, "worker")):
            with engine.crowd(BODIES) as crowd:
                crowd.flowing(5)
                clock.with_suffix(".new").write_text(str(jump_s))
                clock.with_suffix(".new").replace(clock)
                crowd.flowing(20)
                assert engine.health() == (200, "ok")
                engine.kill(victim)
                engine.check_records(crowd.join())
            created.append(engine.http.post("/v1/completions", json=whole(FRESH[0])).json()["created"])
            engine.check()
        assert [round((at - time.time()) / HOUR_S) for at in created] == [1, -1]


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_nowhere_to_print(answers: Answers, output: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if output == "full disk" else writer, "w") as nowhere:  # noqa: PTH123
        engine = Engine(*FREELY, output=nowhere, answers=answers)
    with engine:
        engine.wait_ready()
        engine.learn(BODIES)
        with engine.crowd(BODIES) as crowd:
            crowd.flowing(5)
            engine.kill("worker")
            engine.check_records(crowd.join())


def test_two_engines_on_one_host(engine: Engine) -> None:
    """Of the same model and in the same folder of sockets: what happens to one is nothing to the other."""
    parts = engine.tree()
    with Server(*FREELY, environment={**os.environ, "XDG_RUNTIME_DIR": str(engine.runtime)}) as other:
        other.wait_ready()
        with engine.crowd(BODIES) as crowd:
            crowd.flowing(5)
            for process in other.tree()[1:]:
                process.kill()
            engine.check_records(crowd.join())
        wait_until(lambda: other.http.get("/ready").status_code == 200, BACK_S)
        assert other.complete("x", max_tokens=1)
    assert engine.tree() == parts
    engine.check()


def test_what_a_killed_engine_left_is_removed_and_nobody_elses(engine: Engine) -> None:
    """The next start in the same place sweeps, with another engine living beside it."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(engine.runtime)}
    (own,) = engine.runtime.iterdir()
    with Server(environment=environment) as killed:
        killed.wait_ready()
        killed.process.kill()
        killed.process.wait()
    assert len(list(engine.runtime.iterdir())) == 2
    with Server(environment=environment) as again:
        again.wait_ready()
        assert len(list(engine.runtime.iterdir())) == 2
        assert own.is_dir()
    assert list(engine.runtime.iterdir()) == [own]
    engine.check()


def test_a_run_folder_that_vanishes_does_not_disturb_who_is_connected(engine: Engine) -> None:
    """/tmp swept by a cleaner: sockets that are open stay open."""
    (own,) = engine.runtime.iterdir()
    aside = own.with_name("aside")
    with engine.crowd(BODIES) as crowd:
        crowd.flowing(5)
        own.rename(aside)
        try:
            engine.check_records(crowd.join())
        finally:
            aside.rename(own)
    engine.check()
