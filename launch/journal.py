"""`quire journal`: has a running engine write its journal."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import ConfigError
from ..common.messages import GetJournal, JournalWritten
from .arguments import Parser
from .component import told
from .engine import add_engine, engine, heard
from .observer import Observer

WRITING_S = 120.0

DESCRIPTION = """\
Have a running engine write the journal of what its scheduler was told and what it decided; `quire replay` runs it again.
It goes on serving meanwhile."""


def main(argv: Sequence[str] | None = None, *, prog: str = "quire journal") -> int:
    parser = Parser(
        prog, DESCRIPTION, f"{prog} incident.quire && quire replay incident.quire", usage="[FILE] [OPTION ...]"
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, nargs="?", help="Where to copy it, when the scheduler is on this host."
    )
    parser.add_argument(
        "--reveal", action="store_true", help="With token ids as they are; the engine must run with --reveal-prompts."
    )
    add_engine(parser)
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        with engine(values, "journal") as observer:
            reveal = observer.welcome is not None and observer.welcome.config.sight.reveal_prompts
            if values.reveal and not reveal:
                raise ConfigError("--reveal: the engine runs without --reveal-prompts")
            written = ask(observer, GetJournal(values.reveal))
        return copy(written, values.file)
    except ConfigError as error:
        return told(error)


def ask(observer: Observer, request: GetJournal) -> JournalWritten:
    """Raises ConfigError when the engine has none, or does not answer."""
    observer.send(request)
    deadline = time.monotonic() + WRITING_S
    while time.monotonic() < deadline:
        for message in heard(observer):
            if isinstance(message, JournalWritten):
                if not message.path:
                    raise ConfigError(message.why)
                return message
    raise ConfigError(f"the engine has not written its journal within {WRITING_S:.0f} s")


def copy(written: JournalWritten, file: Path | None) -> int:
    path = Path(written.path)
    if file is not None:
        try:
            shutil.copyfile(path, file)
            file.chmod(0o600)
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: {error.strerror}; the journal is {path} on the scheduler's host"
            ) from None
    print(f"{file or path}  {written.num_bytes / 2**20:.1f} MiB")
    return 0
