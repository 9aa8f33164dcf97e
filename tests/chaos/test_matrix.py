"""The fault matrix of README.md: every row of it is covered by tests that exist, or says why it need not be."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
ROWS = 52
LINES = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (Path(__file__).parent / "README.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]


@cache
def names(file: Path) -> frozenset[str]:
    """Of the tests in a file."""
    functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    return frozenset(function.name for function in functions if function.name.startswith("test_"))


def test_no_row_is_missing() -> None:
    assert [int(row) for row, *_ in LINES] == list(range(1, ROWS + 1))


@pytest.mark.parametrize("row", LINES, ids=lambda row: f"row {row[0]}")
def test_what_a_row_names_exists(row: list[str]) -> None:
    _, _, covered = row
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", covered)
    assert named or covered.startswith("Does not apply: "), covered
    assert [f"{file}::{name}" for file, name in named if name not in names(TESTS / file)] == []
