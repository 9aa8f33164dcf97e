"""Random runs of `simulation` that keep a journal."""

from itertools import count
from pathlib import Path
from typing import Any

from quire.launch.replay import Replay
from quire.scheduler.journal import Journal, Journaled
from quire.scheduler.journal_file import Copy, Reader

from .simulation import VOCABULARY, Run


def journaled(size: int) -> Any:
    """What makes the scheduler of a run; a new journal for each, which knows no time but an order."""

    def make(*args: Any, **options: Any) -> Journaled:
        ticks = count()
        return Journaled(*args, journal=Journal(size, lambda: float(next(ticks))), **options)

    return make


def played(seed: int, depth: int, *, size: int = 1 << 26, **events: Any) -> Journal:
    """The journal of a whole run."""
    run = Run(seed, depth, make=journaled(size))
    run.scheduler.kv.prefill_s = lambda start, count: None  # that of the run is no part of the scheduler
    run.play(**events)
    assert isinstance(run.scheduler, Journaled)
    return run.scheduler.journal


def replayed(journal: Journal, file: Path, *, redacted: bool = False) -> Replay:
    """Through a file, as a person would."""
    Copy(journal, "test", VOCABULARY, "a test", redacted=redacted).write(file)
    replay = Replay(check=True)
    replay.run(Reader(file).entries())
    return replay
