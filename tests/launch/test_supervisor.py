"""The supervisor: real processes, of which only the insides are fakes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from quire.common.errors import EXIT_CONFIG, EXIT_FATAL

ENGINE = Path(__file__).with_name("fake_engine.py")


class Running:
    """A supervisor, its output in files."""

    def __init__(self, folder: Path, behaviours: tuple[str, ...], options: dict[str, str]) -> None:
        self.out, self.err = folder / "out", folder / "err"
        environment = os.environ | {"XDG_RUNTIME_DIR": "", "TMPDIR": str(folder), "QUIRE_API_KEY": "sesame"} | options
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = psutil.Popen(
                [sys.executable, str(ENGINE), *behaviours], stdout=out, stderr=err, env=environment
            )
        self.ends: list[psutil.Process] = []

    @property
    def run_dir(self) -> Path:
        return Path(self.out.read_text().partition("\n")[0])

    def children(self, count: int) -> list[psutil.Process]:
        until(lambda: len(self.process.children()) >= count)
        self.ends = self.process.children()
        return self.ends

    def part(self, behaviour: str) -> psutil.Process:
        """The child of this behaviour that runs now."""
        found: list[psutil.Process] = []

        def look() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[:] = [p for p in self.process.children() if behaviour in p.cmdline()]
            return bool(found)

        until(look)
        if found[0] not in self.ends:
            self.ends.append(found[0])
        return found[0]

    def another(self, behaviour: str, than: psutil.Process) -> psutil.Process:
        """The one that was started in its place."""
        until(lambda: self.part(behaviour) != than)
        return self.part(behaviour)

    @property
    def told_its_clients(self) -> bool:
        """Whether a frontend has heard that the engine is gone."""
        return self.out.with_name("gone").exists()

    def said(self, text: str) -> bool:
        return text in self.err.read_text()

    def phase(self, name: str) -> None:
        """Return when the scheduler has told it."""
        (self.run_dir / "phase").write_text(name)
        told = self.run_dir / "told"
        until(lambda: told.exists() and told.read_text() == name)

    def go(self) -> None:
        (self.run_dir / "go").touch()

    def finish(self, within_s: float = 10.0) -> int:
        return int(self.process.wait(within_s))

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.ends, timeout=5)
        assert not alive


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*behaviours: str, ready: bool = True, children: int = 3, **options: str) -> Running:
        running = Running(tmp_path, behaviours, options)
        started.append(running)
        running.children(children)
        if ready:
            until(lambda: "is ready" in running.out.read_text())
        if "frontend" in behaviours:
            until(lambda: (tmp_path / "listening").exists())
        return running

    yield start
    for running in started:
        for process in (running.process, *running.ends):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_with_code_0(run: Callable[..., Running], signum: int) -> None:
    engine = run("steady", "none", "scheduler", "steady")
    assert re.search(r"160 tokens in 10 blocks of 16\n.*64 tokens per request: 2\.50x", engine.out.read_text())
    assert "loading 50%: half of it" in engine.err.read_text()
    engine.process.send_signal(signum)
    assert engine.finish() == 0
    engine.assert_nothing_is_left()
    assert not engine.run_dir.exists()
    assert [line for line in engine.err.read_text().splitlines() if "stopping" in line]
    assert "Traceback" not in engine.err.read_text()


def test_a_killed_supervisor_leaves_nothing_behind(run: Callable[..., Running]) -> None:
    engine = run("stubborn", "none", "scheduler", "stubborn")
    engine.process.kill()
    engine.assert_nothing_is_left()


def test_a_second_signal_ends_all_at_once(run: Callable[..., Running]) -> None:
    engine = run("stubborn", "none", "scheduler", "stubborn")
    engine.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in engine.err.read_text())
    began = time.monotonic()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.finish() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 1.0
    engine.assert_nothing_is_left()


def test_what_does_not_stop_is_killed_after_its_grace(run: Callable[..., Running]) -> None:
    engine = run("stubborn", "none", "scheduler", "steady")
    engine.process.send_signal(signal.SIGTERM)
    assert engine.finish(15) == 0
    engine.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        (
            "killed",
            EXIT_FATAL,
            "the worker was killed by signal 9 (SIGKILL), likely for lack of memory; a lower --gpu-",
        ),
        ("config", EXIT_CONFIG, "the worker exited with code 1"),
    ],
)
def test_a_first_start_that_fails_is_told_at_once(
    run: Callable[..., Running], behaviour: str, code: int, said: str
) -> None:
    engine = run("steady", "none", "steady", behaviour, ready=False)
    engine.go()
    assert engine.finish() == code
    assert engine.said(said)
    assert not engine.said("started again")
    assert not engine.said("Traceback")
    engine.assert_nothing_is_left()
    assert not engine.run_dir.exists()


@pytest.mark.parametrize("role", ["frontend", "scheduler", "worker"])
def test_what_dies_is_named_and_started_again_and_the_others_stay(run: Callable[..., Running], role: str) -> None:
    behaviours = {"frontend": "frontend", "scheduler": "scheduler", "worker": "steady"}
    engine = run("frontend", "none", "scheduler", "steady")
    before = {name: engine.part(name) for name in behaviours.values()}
    victim = before.pop(behaviours[role])
    command = victim.cmdline()
    victim.kill()
    assert engine.another(behaviours[role], victim).cmdline() == command
    assert engine.said(f"the {role} was killed by signal 9 (SIGKILL), likely for lack of memory")
    assert engine.said("it is started again")
    assert {name: engine.part(name) for name in before} == before
    if role == "scheduler":
        until(lambda: engine.said("recovered in "))
    engine.go()
    engine.process.terminate()
    assert engine.finish() == 0
    engine.assert_nothing_is_left()


def test_a_recovery_lasts_until_the_scheduler_says_ready(run: Callable[..., Running]) -> None:
    engine = run("steady", "none", "scheduler", "done")
    engine.phase("recovering")
    worker = engine.part("done")
    engine.go()  # it ends with code 0, which nobody asked for
    until(lambda: engine.said("the worker exited with code 0"))
    (engine.run_dir / "go").unlink()
    engine.another("done", worker)
    assert not engine.said("recovered")
    engine.phase("ready")
    until(lambda: engine.said("recovered in "))


def test_what_dies_again_and_again_is_started_less_and_less_often_until_the_engine_ends(
    run: Callable[..., Running],
) -> None:
    engine = run("frontend", "none", "scheduler", "killed", MAX_RESTARTS="3")
    scheduler, frontend = engine.part("scheduler"), engine.part("frontend")
    engine.go()
    assert engine.finish(20) == EXIT_FATAL
    log = engine.err.read_text()
    assert re.findall(r"it is started again(.*)", log) == ["", " in 0.5 s", " in 1.0 s"]
    assert "the worker was killed by signal 9" in log.splitlines()[-1]
    assert "3 restarts within 60 s is the limit (--max-restarts); the engine ends" in log.splitlines()[-1]
    assert engine.told_its_clients
    assert not psutil.wait_procs([scheduler, frontend], timeout=0)[1]
    assert not engine.run_dir.exists()


@pytest.mark.parametrize("role", ["frontend", "scheduler", "worker"])
def test_without_restarts_the_first_death_ends_all(run: Callable[..., Running], role: str) -> None:
    engine = run("frontend", "none", "scheduler", "steady", MAX_RESTARTS="0")
    engine.part("steady" if role == "worker" else role).kill()
    assert engine.finish() == EXIT_FATAL
    assert engine.said(f"the {role} was killed by signal 9")
    assert engine.told_its_clients == (role != "frontend")
    engine.assert_nothing_is_left()


def test_a_configuration_that_turns_out_wrong_ends_all(run: Callable[..., Running]) -> None:
    engine = run("frontend", "none", "scheduler", "config")
    engine.go()
    assert engine.finish() == EXIT_CONFIG
    assert engine.said("the worker exited with code 1; the engine ends")
    assert engine.told_its_clients
    engine.assert_nothing_is_left()


def test_frontends_hear_that_the_engine_is_gone_and_one_that_hangs_is_killed(run: Callable[..., Running]) -> None:
    """Those that listen need no time; the others do not get much."""
    engine = run("stubborn", "none", "scheduler", "config")
    engine.go()
    began = time.monotonic()
    assert engine.finish() == EXIT_CONFIG
    assert time.monotonic() - began < 5.0
    engine.assert_nothing_is_left()


def test_a_scheduler_that_dies_while_requests_finish_is_started_again(run: Callable[..., Running]) -> None:
    engine = run("frontend", "none", "scheduler", "steady", DRAIN_TIMEOUT="30")
    engine.process.terminate()
    until(lambda: engine.said("stopping"))
    scheduler = engine.part("scheduler")
    scheduler.kill()
    engine.another("scheduler", scheduler)
    engine.go()  # the requests have finished
    assert engine.finish() == 0
    engine.assert_nothing_is_left()


def test_a_frontend_that_dies_while_requests_finish_is_not_waited_for(run: Callable[..., Running]) -> None:
    engine = run("frontend", "none", "scheduler", "steady", DRAIN_TIMEOUT="60")
    engine.process.terminate()
    until(lambda: engine.said("stopping"))
    engine.part("frontend").kill()
    assert engine.finish() == 0
    assert not engine.said("started again")
    engine.assert_nothing_is_left()


def test_workers_that_are_stalled_for_long_are_started_again(run: Callable[..., Running]) -> None:
    engine = run("steady", "none", "scheduler", "stubborn", STALL_TIMEOUT="1")
    worker = engine.part("stubborn")
    engine.phase("stalled")
    engine.another("stubborn", worker)
    assert engine.said("the worker was killed, the engine being stalled: worker 0 is silent; it is started again")


def test_a_scheduler_that_hangs_is_told_of_and_started_again(run: Callable[..., Running]) -> None:
    engine = run("steady", "none", "scheduler", "steady", STALL_TIMEOUT="1")
    scheduler = engine.part("scheduler")
    scheduler.suspend()
    until(lambda: engine.said("the scheduler has been silent for 2 s"))
    engine.another("scheduler", scheduler)
    assert engine.said("the scheduler was silent for 4 s and was killed; it is started again")
    until(lambda: engine.said("recovered in "))


def test_the_engine_starts_when_the_download_has_ended(run: Callable[..., Running]) -> None:
    engine = run("steady", "downloaded", "scheduler", "steady")
    assert "is ready" in engine.out.read_text()


def test_a_failed_download_ends_all(run: Callable[..., Running]) -> None:
    engine = run("steady", "config", "scheduler", "steady", ready=False, children=2)
    engine.go()
    assert engine.finish() == EXIT_CONFIG
    assert "the download exited with code 1" in engine.err.read_text()


def test_children_have_no_keys_in_sight_and_die_alone_of_ctrl_c(run: Callable[..., Running]) -> None:
    engine = run("steady", "none", "scheduler", "steady")
    for child in engine.ends:
        assert "QUIRE_API_KEY" not in child.environ()
        assert "sesame" not in " ".join(child.cmdline())
        assert os.getpgid(child.pid) == child.pid


def test_a_signal_while_starting_ends_all_soon(run: Callable[..., Running]) -> None:
    engine = run("steady", "none", "steady", "stubborn", ready=False)
    engine.part("stubborn")
    began = time.monotonic()
    engine.process.send_signal(signal.SIGTERM)
    assert engine.finish() == 0
    assert time.monotonic() - began < 3.0
    engine.assert_nothing_is_left()


def test_what_a_killed_engine_left_is_removed_by_the_next(run: Callable[..., Running]) -> None:
    first = run("steady", "none", "scheduler", "steady")
    left = first.run_dir
    first.process.kill()
    first.assert_nothing_is_left()
    first.process.wait()
    assert left.is_dir()
    second = run("steady", "none", "scheduler", "steady")
    assert not left.exists()
    assert second.run_dir.is_dir()
    assert second.run_dir.stat().st_mode & 0o777 == 0o700
    third = subprocess.run(
        [sys.executable, "-c", _START_ANOTHER],
        env=os.environ | {"TMPDIR": str(left.parent), "XDG_RUNTIME_DIR": ""},
        check=True,
    )
    assert third.returncode == 0
    assert second.run_dir.is_dir()


_START_ANOTHER = "from quire.launch.run_directory import run_directory\nwith run_directory(): pass"
