"""A tap shows what is said on the wires, holds nobody up, and keeps what people wrote to itself."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.common.channel import LOST, encode
from quire.common.config import SightConfig
from quire.common.errors import EXIT_CONFIG
from quire.common.messages import (
    Admitted,
    GetJournal,
    Heartbeat,
    Hello,
    Hypothesis,
    JournalWritten,
    Output,
    Outputs,
    StepPlan,
    StepResult,
    Submit,
    Tap,
    Tapped,
    pack,
)
from quire.common.observing import COPY_BYTES, Copied
from quire.common.sampling import SamplingParams
from quire.launch import tap
from quire.launch.cli import main as quire
from quire.launch.run_directory import living
from quire.scheduler.journal_file import Reader
from quire.scheduler.taps import Taps, blank

from ..ports import free_port
from ..scheduler.peers import FakeFrontend, FakeWorker, config, running
from .processes import SMALL, Server, complete

IDS = [5, 6, 7, 71, 72]
SUBMIT = Submit(3, pack(IDS), SamplingParams(max_tokens=4, seed=0, logit_bias={71: 1.0}), output=pack([8]), salt="mine")


def taps(*, may_reveal: bool = False, window: int = 1 << 20) -> Taps:
    return Taps(lambda wire, peer: f"{peer.decode()} of {wire}", lambda: 5.0, may_reveal=may_reveal, window=window)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_every_tap_gets_what_is_heard_and_said_in_order() -> None:
    many = taps()
    assert not many.active
    many.ask(b"one", Tap())
    many.heard("frontends", b"f", Heartbeat(1))
    many.ask(b"two", Tap())
    many.said("workers", b"w", encode(Heartbeat(2)))
    many.heard("workers", b"w", LOST)
    found = dict(many.take())
    first = Copied(5.0, "frontends", True, "f of frontends", encode(Heartbeat(1)))
    rest = [
        Copied(5.0, "workers", False, "w of workers", encode(Heartbeat(2))),
        Copied(5.0, "workers", True, "w of workers", b""),
    ]
    assert found == {b"one": Tapped([first, *rest], 0), b"two": Tapped(rest, 0)}
    assert many.take() == []
    many.forget(b"one")
    assert many.active
    many.forget(b"two")
    assert not many.active


def test_taps_do_not_show_themselves() -> None:
    one = taps()
    one.ask(b"one", Tap())
    one.take()
    one.heard("frontends", b"one", Tap(received=7))
    one.said("frontends", b"one", encode(Tapped([], 0)))
    assert one.take() == []


def test_a_slow_reader_loses_copies_and_is_told_how_many() -> None:
    size = len(encode(Heartbeat(1))) + COPY_BYTES
    slow = taps(window=10 * size)
    slow.ask(b"slow", Tap())
    slow.ask(b"quick", Tap())
    for number in range(1, 26):
        slow.heard("frontends", b"f", Heartbeat(1))
        slow.ask(b"quick", Tap(received=number * size))
    found = dict(slow.take())
    assert (len(found[b"slow"].copies), found[b"slow"].dropped) == (10, 15)
    assert (len(found[b"quick"].copies), found[b"quick"].dropped) == (25, 0)
    slow.ask(b"slow", Tap(received=4 * size))
    for _ in range(6):
        slow.heard("frontends", b"f", Heartbeat(1))
    found = dict(slow.take())
    assert (len(found[b"slow"].copies), found[b"slow"].dropped) == (4, 17)
    slow.ask(b"slow", Tap(received=10**9))  # more than it was sent
    for _ in range(20):
        slow.heard("frontends", b"f", Heartbeat(1))
    assert len(dict(slow.take())[b"slow"].copies) == 10


ROW = Admitted(0, pack(IDS), 5, SamplingParams(logit_bias={71: 1.0}), [1])


@pytest.mark.parametrize(
    "message",
    [
        SUBMIT,
        Outputs([Output(3, 0, [71, 72], hypotheses=[Hypothesis([71, 72], "stop", 0.0, 0.0)])]),
        StepPlan(1, 1, [], [ROW], [], b"", pack([0]), pack([0]), pack([5]), b"\1"),
        StepResult(1, 1, pack([1]), pack([71]), 0, pack([71]), b"logp"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_token_ids_become_zeros_unless_both_sides_want_them(message: Any) -> None:
    secret = [pack([71]), msgspec.msgpack.encode([71, 72])[1:], b"mine", msgspec.msgpack.encode({71: 1.0})]
    assert any(part in encode(message) for part in secret)
    for asked, allowed in ((False, True), (True, False), (True, True)):
        one = taps(may_reveal=allowed)
        one.ask(b"one", Tap(reveal=asked))
        [(_, first)] = one.take() or [(b"", Tapped([], 0))]
        assert ("--reveal-prompts" in first.why) is (asked and not allowed)
        if isinstance(message, StepPlan):
            one.said("workers", b"w", encode(message))
        else:
            one.heard("workers", b"w", message)
        [(_, tapped)] = one.take()
        [copied] = tapped.copies
        assert any(part in copied.body for part in secret) is (asked and allowed)
    assert type(blank(message)) is type(message) and blank(blank(message)) == blank(message)


def test_what_holds_no_token_ids_is_copied_as_it_is() -> None:
    for message in (Heartbeat(1), Hello(3, "worker", "w")):
        assert blank(message) is message


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_say_what_matters() -> None:
    at = time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1)) + 0.25
    copied = Copied(at, "frontends", True, "frontend 1", encode(SUBMIT))
    assert tap.line(copied, SUBMIT, verbose=False) == (
        "03:04:05.250000 <- frontend 1  Submit 3: 5 ids, at most 4 more, again with 1 ids"
    )
    full = tap.line(copied, SUBMIT, verbose=True)
    assert "prompt=[5, 6, 7, 71, 72]" in full and "salt=mine" in full and "priority=0" in full
    outputs = Outputs([Output(1, 0, [9]), Output(2, 3, [9], "stop")])
    assert tap.essentials(outputs) == "2 ids for 1, 2, 1 stop"
    lost = msgspec.structs.replace(copied, body=b"")
    assert tap.line(lost, None, verbose=False).endswith("frontend 1  Lost frames were lost, or it begins anew")


# --- a whole engine ---------------------------------------------------------------------------------------------------


class Life:
    """A worker and a frontend that live in a thread, sending a request now and then."""

    def __init__(self, worker: FakeWorker, frontend: FakeFrontend) -> None:
        self._worker, self._frontend = worker, frontend
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        count = 0
        while not self._over.is_set():
            self._worker.serve(0.002)
            self._frontend.beat(Heartbeat(1))
            self._frontend.hear(0.002)
            if count == 0 or self._frontend.finish(count):
                count += 1
                self._frontend.submit(count, [5, 6, 7], max_tokens=3)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def address(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of an engine that serves, with what a test's `parametrize` says of its sight."""
    sight = SightConfig(**getattr(request, "param", {}))
    with running(tmp_path, msgspec.structs.replace(config(), sight=sight)) as engine:
        life = Life(*engine.ready())
        yield engine.address
        life.end()


def test_the_command_shows_what_an_engine_says(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["tap", "--scheduler", address, "--count", "30"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 30 and not shown.err
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{6} (<-|->) (frontend|worker 0)  [A-Z]\w+", line) for line in lines), lines
    for words in ("<- frontend  Submit", "-> worker 0  StepPlan", "<- worker 0  StepResult", "-> frontend  Outputs"):
        assert any(words in line for line in lines), (words, lines)
    assert not any("Heartbeat" in line or "Tap" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--kind", "Submit"], r"<- frontend  Submit \d+: 3 ids, at most 3 more"),
        (["--kind", "Submit", "--kind", "StepResult"], r"Submit|StepResult"),
        (["--peer", "work*"], r"worker 0"),
        (["-v", "--kind", "Submit"], r"prompt=\[0, 0, 0\]"),
    ],
    ids=["kind", "kinds", "peer", "all fields"],
)
def test_filters(words: list[str], pattern: str, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["tap", "--scheduler", address, "--count", "5", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(re.search(pattern, line) for line in lines)


@pytest.mark.parametrize("address", [{"reveal_prompts": True}], indirect=True)
def test_an_engine_may_reveal(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["tap", "--scheduler", address, "--count", "1", "-v", "--kind", "Submit", "--reveal"]) == 0
    shown = capsys.readouterr()
    assert "prompt=[5, 6, 7]" in shown.out and not shown.err
    assert quire(["tap", "--scheduler", address, "--count", "1", "-v", "--kind", "Submit"]) == 0
    assert "prompt=[0, 0, 0]" in capsys.readouterr().out
    for words, redacted in (([], True), (["--reveal"], False)):
        assert quire(["journal", str(tmp_path / "out"), "--scheduler", address, *words]) == 0
        assert Reader(tmp_path / "out").header.redacted is redacted


def test_an_engine_that_does_not_reveal_says_so(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["tap", "--scheduler", address, "--count", "1", "-v", "--kind", "Submit", "--reveal"]) == 0
    shown = capsys.readouterr()
    assert "prompt=[0, 0, 0]" in shown.out and "the engine runs without --reveal-prompts" in shown.err
    assert quire(["journal", "--reveal", "--scheduler", address]) == EXIT_CONFIG
    assert "the engine runs without --reveal-prompts" in capsys.readouterr().err


def test_a_journal_on_demand_replays(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["tap", "--scheduler", address, "--count", "3", "--kind", "Submit"]) == 0
    assert quire(["journal", str(tmp_path / "out"), "--scheduler", address]) == 0
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert quire(["replay", str(tmp_path / "out")]) == 0
    assert re.search(r"the same: [1-9]\d* plans", capsys.readouterr().out)


@pytest.mark.parametrize(
    "address", [{"journal_size": 0}, {"journal_dir": "/proc/nowhere"}], indirect=True, ids=["off", "no place"]
)
def test_a_journal_that_cannot_be_had_is_told_of(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["journal", "--scheduler", address]) == EXIT_CONFIG
    assert re.search(r"error: (the engine keeps no journal|/proc/nowhere/journal-\d+.quire: )", capsys.readouterr().err)


def test_only_observers_may_look(tmp_path: Path) -> None:
    with running(tmp_path, config()) as engine:
        worker, frontend = engine.ready()
        observer = engine.frontend("observer")
        observer.greet()
        for peer in (frontend, observer):
            peer.send(Tap())
            peer.send(GetJournal())
        while not observer.seen[JournalWritten] or not observer.seen[Tapped]:
            worker.serve(0.002)
            observer.hear()
        frontend.metrics()
        assert not frontend.seen[Tapped] and not frontend.seen[JournalWritten]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.launch.engine.ANSWER_S", 0.1)
    for words, why in (
        (["tap", "--kind", "Submitt"], "--kind Submitt: there is no such message; there are Abort, "),
        (["tap", "--scheduler", f"ipc://{tmp_path}"], "no scheduler answers there"),
        (["journal", "--scheduler", f"ipc://{tmp_path}"], "no scheduler answers there"),
        (["tap", "--scheduler", "tcp://192.0.2.1:7700"], "other hosts reach this address"),
    ):
        assert quire(words) == EXIT_CONFIG
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and why in line, line


def test_the_built_in_model_is_tapped_and_its_journal_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = Server(tmp_path, "serve", "serve.py", f"--port={port}", *SMALL).ready(port)
    try:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("XDG_RUNTIME_DIR", "")
        monkeypatch.setattr("tempfile.tempdir", None)
        assert len(living()) == 1
        found = [complete(port, 6).json()["choices"][0]["text"]]

        def ask() -> None:
            while not over.is_set():
                found.append(complete(port, 6).json()["choices"][0]["text"])

        over, asking = threading.Event(), threading.Thread(target=ask)
        asking.start()
        code = quire(["tap", "--count", "20"])
        over.set()
        asking.join()
        assert code == 0
        assert len(set(found)) == 1 and "StepPlan" in capsys.readouterr().out
        assert quire(["journal", str(tmp_path / "out.quire")]) == 0
        assert quire(["replay", str(tmp_path / "out.quire"), "--check"]) == 0
        assert f"the same: {6 * len(found)} plans" in capsys.readouterr().out
    finally:
        server.process.terminate()
        server.end()
    server.assert_nothing_is_left()
