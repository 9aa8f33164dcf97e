"""A scheduler's address is its own: a second one there is told who holds it. Without this, the second of two on ipc://
would take the sockets of the first, which then serves nobody."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..common.channel import wires
from ..common.errors import ConfigError
from .listen import holder_of

_LOCK = "scheduler.lock"


@contextlib.contextmanager
def claimed(address: str) -> Iterator[None]:
    """While this runs, no other scheduler of this host claims `address`. Raises ConfigError when one has."""
    ends = wires(address)
    if address.startswith("ipc://"):
        with _locked(Path(address.removeprefix("ipc://"))):
            yield
        return
    for end in ends:
        _check_free(end)
    yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The kernel drops the lock of a scheduler that was killed, so the next may come at once."""
    try:
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(f"ipc://{folder}: {error.strerror}; name a directory that is yours") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(lock, 20, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"ipc://{folder}: another scheduler listens there, process {pid}; stop it, or choose another --listen"
            ) from None
        os.pwrite(lock, f"{os.getpid():<20}".encode(), 0)
        yield
    finally:
        os.close(lock)


def _check_free(end: str) -> None:
    host, _, port = end.removeprefix("tcp://").rpartition(":")
    with contextlib.suppress(socket.gaierror):  # the name of an interface, which ZeroMQ takes as well
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ConfigError(
                        f"{end}: this port is in use by {holder_of(int(port))}; stop it, or choose another --listen"
                    ) from None
                raise ConfigError(f"{end}: {error.strerror}; name an address of this host") from None
