"""What an operator may look at: the journal, written on demand and after a bug, and taps of the wires."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.config import EngineConfig
from ..common.messages import GetJournal, JournalWritten, Message, Tap
from ..common.model_info import ModelInfo
from .journal import Journal, Journaled
from .journal_file import Copy
from .scheduler import Scheduler
from .taps import Taps

log = logging.getLogger(__name__)

MOST_FILES = 8  # a scheduler that dies again and again does not fill the disk
NO_JOURNAL = "the engine keeps no journal (--journal-size 0), or is not ready"


class Sight:
    """Of one scheduler process. `name` says who a peer of a wire is."""

    def __init__(self, config: EngineConfig, info: ModelInfo, run_dir: Path, name: Callable[[str, bytes], str]) -> None:
        self._config = config.sight
        self._info = info
        self._folder = Path(config.sight.journal_dir).expanduser() if config.sight.journal_dir else run_dir
        self._journal: Journal | None = None
        self._writer: threading.Thread | None = None
        self._written: JournalWritten | None = None
        self._asked: dict[bytes, None] = {}  # who waits for it
        self.taps = Taps(name, time.time, may_reveal=config.sight.reveal_prompts)

    def scheduler(self, *args: Any, **options: Any) -> Scheduler:
        """One that keeps a journal, if any is to be kept."""
        if not self._config.journal_size:
            return Scheduler(*args, **options)
        self._journal = Journal(self._config.journal_size, time.time)
        return Journaled(*args, journal=self._journal, **options)

    def asked(self, observer: bytes, message: GetJournal | Tap) -> None:
        if isinstance(message, Tap):
            if not self.taps.active:
                log.info("an observer taps the wires")
            self.taps.ask(observer, message)
            return
        copy = self._copy("on demand", reveal=message.reveal)
        if copy is None:
            self._written = JournalWritten("", 0, NO_JOURNAL)
        elif self._writer is None:  # else it gets what is being written
            self._writer = threading.Thread(target=self._store, args=(copy,), daemon=True)
            self._writer.start()
        self._asked[observer] = None

    def take(self) -> list[tuple[bytes, Message]]:
        """What there is to send to observers."""
        news: list[tuple[bytes, Message]] = list(self.taps.take()) if self.taps.active else []
        if self._written is not None:
            news += [(observer, self._written) for observer in self._asked]
            self._asked.clear()
            self._writer = self._written = None
        return news

    def forget(self, observer: bytes) -> None:
        """It is gone."""
        self.taps.forget(observer)
        self._asked.pop(observer, None)

    def failed(self, why: str) -> None:
        """A bug ends the scheduler: what led to it is kept."""
        if (copy := self._copy(why, reveal=True)) is None:
            return
        written = self._store(copy)
        if written.path:
            log.error("the journal of what led to it is %s; `quire replay` runs it again", written.path)
        else:
            log.error("the journal of what led to it could not be written: %s", written.why)

    def _copy(self, why: str, *, reveal: bool) -> Copy | None:
        if self._journal is None:
            return None
        redacted = not (reveal and self._config.reveal_prompts)
        return Copy(self._journal, self._info.model, self._info.vocab_size, why, redacted=redacted)

    def _store(self, copy: Copy) -> JournalWritten:
        """Also in a thread of its own: then `take` finds what came of it."""
        file = self._folder / f"journal-{time.time_ns() // 1_000_000}.quire"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            written = JournalWritten(str(file), copy.write(file))
            for old in sorted(self._folder.glob("journal-*.quire"))[:-MOST_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            written = JournalWritten("", 0, f"{file}: {error.strerror}")
        self._written = written
        return written
