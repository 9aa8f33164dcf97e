"""The folder that one engine's processes share: sockets, the resolved configuration, the ranks' meeting point."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..common.errors import ConfigError

_PREFIX = "quire-"
_LOCK = "lock"
_LONGEST_BASE = 70  # the path of an ipc socket may have 107 bytes


@contextlib.contextmanager
def run_directory(given: Path | None = None) -> Iterator[Path]:
    """A new folder of mode 0700, removed at the end; `given` is used as it is and left to its owner.

    A killed engine cannot remove its own. The kernel drops its lock, though, by which the next start knows the folder.
    """
    if given is not None:
        if not given.is_dir():
            raise ConfigError(f"--run-dir {given}: no such directory")
        yield given
        return
    base = _base()
    _sweep(base)
    with _made(base) as path:
        yield path


def living() -> list[Path]:
    """The folders of this user's engines that run, of those that have one of their own."""
    found = []
    for path in sorted(_base().glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):  # gone meanwhile, or another's
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path)
            finally:
                os.close(lock)
    return found


@contextlib.contextmanager
def _made(base: Path) -> Iterator[Path]:
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=base))
    except OSError as error:
        raise ConfigError(
            f"cannot make a folder for sockets in {base}: {error.strerror}; set TMPDIR to another place"
        ) from None
    lock = os.open(hidden / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    path = hidden.with_name(hidden.name[1:])
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hidden.rename(path)  # only now can a sweep see it
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    return base if len(os.fsencode(base)) <= _LONGEST_BASE else Path("/tmp")


def _sweep(base: Path) -> None:
    """Remove folders of this user's engines that were killed. A living one's is locked, in any container that sees it."""
    for path in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, locked, or another's: each a reason to let it be
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)
