"""Fixtures of the tests that run worker processes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..checkpoints import oracle_greedy
from .scheduler import PROMPT, Scheduler


@pytest.fixture
def scheduler(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(name: str = "qwen3", **options: Any) -> Scheduler:
        made.append(Scheduler(tmp_path, checkpoint(name), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def expected(checkpoint: Callable[[str], Path], oracle: Callable[[Path], Any]) -> list[int]:
    return oracle_greedy(oracle(checkpoint("qwen3")), PROMPT, 12)
