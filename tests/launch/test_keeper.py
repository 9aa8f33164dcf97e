"""A keeper whose processes cannot be started: memory, or the number of processes, is short."""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from quire.common.config import RecoveryConfig
from quire.common.errors import EXIT_FATAL
from quire.launch.children import Child, Children
from quire.launch.keeper import Keeper, Plan
from quire.launch.observer import Observer

WORKER = Child("worker", "worker 0", "no.such.module", ())


class Short(Children):
    """Starts nothing, as fork() does when memory is short."""

    def start(self, children: Iterable[Child]) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_process_that_cannot_be_started_counts_as_one_that_ended(tmp_path: Path) -> None:
    with contextlib.closing(Short()) as children, contextlib.closing(Observer(f"ipc://{tmp_path}")) as observer:
        keeper = Keeper(Plan((), (), lambda: [WORKER]), children, observer, RecoveryConfig(), 0.0)
        keeper.begin(0.0)
        over = keeper.turn(0.0)
    assert over is not None
    assert str(over) == "worker 0 could not be started: Cannot allocate memory"
    assert over.cause.engine_code == EXIT_FATAL
