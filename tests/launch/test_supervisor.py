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

    def __init__(self, folder: Path, behaviours: tuple[str, ...]) -> None:
        self.out, self.err = folder / "out", folder / "err"
        environment = os.environ | {"XDG_RUNTIME_DIR": "", "TMPDIR": str(folder), "QUIRE_API_KEY": "sesame"}
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

    def start(*behaviours: str, ready: bool = True, children: int = 3) -> Running:
        running = Running(tmp_path, behaviours)
        started.append(running)
        running.children(children)
        if ready:
            until(lambda: "is ready" in running.out.read_text())
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
        ("killed", EXIT_FATAL, "the worker was killed by signal 9 (SIGKILL), likely for lack of memory"),
        ("config", EXIT_CONFIG, "the worker exited with code 1"),
    ],
)
@pytest.mark.parametrize("ready", [True, False])
def test_the_end_of_a_part_ends_all_and_is_told(
    run: Callable[..., Running], behaviour: str, code: int, said: str, ready: bool
) -> None:
    engine = run("steady", "none", "scheduler" if ready else "steady", behaviour, ready=ready)
    engine.go()
    assert engine.finish() == code
    assert said in engine.err.read_text()
    assert "Traceback" not in engine.err.read_text()
    engine.assert_nothing_is_left()
    assert not engine.run_dir.exists()


def test_the_engine_starts_when_the_download_has_ended(run: Callable[..., Running]) -> None:
    engine = run("steady", "done", "scheduler", "steady")
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
    time.sleep(0.3)
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
