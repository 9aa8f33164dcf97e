"""`quire replay` says whether a scheduler decides as it did, and shows a person what it did."""

import re
from pathlib import Path

import pytest

from quire.common.errors import EXIT_CONFIG
from quire.launch.cli import main as quire
from quire.launch.replay import DIFFERENT
from quire.scheduler.journal_file import Copy
from quire.scheduler.request import Request

from ..scheduler.journaled import played
from ..scheduler.simulation import VOCABULARY, Losses


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run with priorities, preemption and a lost group."""
    path = tmp_path_factory.mktemp("journal") / "journal.quire"
    journal = played(8, 2, losses=Losses(rate=0.1))
    Copy(journal, "a model", VOCABULARY, "on demand", redacted=True).write(path)
    return str(path)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_same_scheduler_makes_the_same_plans(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["replay", file]) == 0
    first, last = said(capsys)
    assert first.startswith("a model on ") and "(on demand); token ids replaced" in first
    assert re.match(r"the same: \d+ plans since 1970-", last)
    assert quire(["replay", file, "--check"]) == 0


def test_every_plan_has_a_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quire(["replay", file, "--print"]) == 0
    _, *lines, last = said(capsys)
    plans = int(re.findall(r"the same: (\d+) plans", last)[0])
    assert [int(line.split()[0]) for line in lines] == list(range(1, plans + 1)) and plans > 20
    assert all(re.search(r"step \d+/\d+, \d+ rows, \d+ tokens, .* run, \d+ wait, KV \d+/\d+", line) for line in lines)
    assert quire(["replay", file, "--print", "--until", "3"]) == 0
    _, *lines, last = said(capsys)
    assert len(lines) == 3 and last == "the same up to plan 3"


def test_a_plan_is_shown_with_all_that_ran_and_waited(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for step in range(1, 12):
        assert quire(["replay", file, "--step", str(step)]) == 0
        about, line, *scene, last = said(capsys)
        assert line.split()[0] == str(step) and last == f"the same up to plan {step}" and about
        assert any(
            re.match(r"    row \d+: \w.* \[\d+, \d+\) of request \d+ \(id \d+, \d+ prompt", text) for text in scene
        )
        shown += "\n".join(scene)
    for words in ("decodes", "prefills to its end", "admitted", "waits, in order", "in flight: steps", "budget: "):
        assert words in shown, words


def test_another_scheduler_is_told_of_at_the_first_plan_that_differs(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "rank", property(lambda self: (-self.priority, -self.arrival)))
    assert quire(["replay", file]) == DIFFERENT
    _, last = said(capsys)
    assert re.match(r"DIFFERENT behind plan \d+ since 1970-.*: .+", last)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "FILE"),
        (["{file}", "--step", "100000"], r"--step 100000: there are \d+ plans"),
        (["{file}", "--steps"], "there is no option --steps. Did you mean --step?"),
        (["{folder}/none"], "No such file"),
        (["{folder}/text"], "this is no journal of Quire's"),
        (["{folder}/cut"], "it ends at byte 300, in the middle"),
    ],
    ids=["no file", "no step", "a typo", "nothing there", "another file", "cut off"],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], why: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("hello\n" * 100)
    (tmp_path / "cut").write_bytes(Path(file).read_bytes()[:300])
    assert quire(["replay", *(word.format(file=file, folder=tmp_path) for word in words)]) == EXIT_CONFIG
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(why, line)
