"""Engines that the cases share, one for each set of options."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from .engine import FAULTY, FREELY, Engine

Engines = Callable[..., Engine]
Answers = dict[str, str]


@pytest.fixture(scope="session")
def answers_of() -> defaultdict[bool, Answers]:
    """The golden texts of engines with several workers (True), and with one (False)."""
    return defaultdict(dict)


@pytest.fixture(scope="session")
def answers(answers_of: defaultdict[bool, Answers]) -> Answers:
    """Of one worker."""
    return answers_of[False]


@pytest.fixture(scope="session")
def engines(answers_of: defaultdict[bool, Answers]) -> Iterator[Engines]:
    """engines("--tp", 2) is that engine, settled; a new one when a case before has ended it."""
    running: dict[tuple[object, ...], Engine] = {}

    def engine(*flags: object, faulty: bool = False) -> Engine:
        known = running.get((faulty, *flags))
        if known is None or not known.alive:
            if known is not None:
                known.__exit__()
            command = FAULTY if faulty else None
            known = Engine(*FREELY, *flags, command=command, answers=answers_of["--tp" in flags])
            running[(faulty, *flags)] = known
            known.settle()
        return known

    try:
        yield engine
    finally:
        for known in running.values():
            known.__exit__()


@pytest.fixture
def engine(engines: Engines) -> Engine:
    """The plain one: the built-in model, one worker, one frontend."""
    return engines()
