"""Each program says what it is for, runs by name, and draws."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quire.benchmarks import compare, drawing, engines, prefix, report, serve
from quire.benchmarks.engines import Turns
from quire.benchmarks.figures import Spread
from quire.benchmarks.http_client import Answer
from quire.benchmarks.load import Run
from quire.launch import bench

from ..e2e.server import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_every_program_is_listed_with_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    told = capsys.readouterr().out
    for name, line in bench.programs().items():
        assert line.endswith(".") and re.search(rf"^  {name} +{re.escape(line)}$", told, re.MULTILINE)
    assert {"serve", "offline", "prefix", "scheduler", "startup", "frontend", "compare"} <= set(bench.programs())


def test_the_readme_has_a_row_for_each_program() -> None:
    rows = set(re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE))
    assert set(bench.programs()) <= rows


def test_a_name_becomes_the_program() -> None:
    command = [sys.executable, "-m", "quire.launch.cli", "bench", "compare", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--openvino" in told and told.startswith("usage: compare.py")


def test_a_name_that_is_none_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["serv"]) == 1
    assert "serve" in capsys.readouterr().err


def test_pictures_are_drawn_of_every_kind_of_result(tmp_path: Path) -> None:
    runs = [Run([Answer(0.0, 200, [0.1, 0.2 + i], 0.3 + i, tokens=2)], 1.0, 0.1) for i in range(2)]
    serve.picture({"1 client": {"a": runs, "b": runs}}, tmp_path / "serve.png")
    prefix.picture({0.5: dict.fromkeys(prefix.KINDS, runs)}, tmp_path / "prefix.png")
    compare.picture({"1x1/1": {"ours": [1.0, 2.0], "theirs": [2.0, 3.0]}}, tmp_path / "compare.png")
    with drawing.figure(tmp_path / "lines.png", columns=2) as (left, right):
        drawing.lines(left, {"a": [(1, 2), (2, 3)]}, "x", "y")
        drawing.bars(right, {"a": Spread(1, 2, 3)})
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4


def test_without_matplotlib_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cycler", None)
    with pytest.raises(SystemExit, match=r"quire\[bench\]"), drawing.figure(tmp_path / "none.png"):
        pass


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("benchmarks/a.py --out benchmarks/results/a", "benchmarks/a.py --out benchmarks/results/a"),
        ("a.py /x/y/model --b /x/bin/python:/x/y/z --c n=/x/y/m", "a.py model --b python:z --c n=m"),
        ("a.py --url http://127.0.0.1:8000/v1/x ./a/b ../a/b", "a.py --url http://127.0.0.1:8000/v1/x ./a/b ../a/b"),
    ],
)
def test_a_command_is_told_without_the_paths_of_one_machine(command: str, told: str) -> None:
    assert report.shortened(command) == told


def test_ratios_in_the_table_are_ours_over_theirs() -> None:
    text = compare.table({"1x1/1": {"quire": [10.0, 30.0, 60.0], "other": [10.0, 10.0, 10.0]}}, 0.0)
    assert "| 1x1/1 | other | 10 (10 to 10) | 3.00 (1.00 to 6.00) |" in text


def test_only_who_has_the_turn_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are stopped, all but what must not be, and go on at the end."""
    monkeypatch.setattr(engines, "SETTLE_S", 0.0)
    code = "import time\nwhile True: time.sleep(0.001)"
    first, second, ours = (subprocess.Popen([sys.executable, "-c", code]) for _ in range(3))
    try:
        turns = Turns()
        for name, process in (("first", first), ("second", second), ("ours", ours)):
            turns.add(name, process.pid, stoppable=name != "ours")
            with turns.only(name):
                pass
        with turns.only("second"):
            wait_until(lambda: stopped(first))
            assert not stopped(second) and not stopped(ours)
        wait_until(lambda: stopped(second))
        turns.wake()
        assert not any(map(stopped, (first, second, ours)))
    finally:
        for process in (first, second, ours):
            process.kill()
            process.wait()


def stopped(process: "subprocess.Popen[bytes]") -> bool:
    """By /proc: T is a stopped one."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
