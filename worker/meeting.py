"""How the ranks of a group find each other: a place where each leaves word for the others, in a folder or at rank 0.

Waiting happens in Python, a moment at a time, so that signals and the scheduler can end it. A rank that is killed in the
middle of it leaves word that is whole, or none.
"""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, urlsplit

import torch.distributed

from ..common.errors import ConfigError

POLL_S = 0.02
REACHING_S = 2.0  # for a connection to rank 0; then it is tried again
LISTENING_S = 5.0  # for the port of rank 0 to be free: its predecessor may be about to end
READING_S = 30.0  # NCCL's, of the place

c10d: Any = torch.distributed  # whose types leave out what is used here


class OutOfPatience(Exception):
    """Somebody did not come in time."""


class Patience:
    """How long others are waited for. `meanwhile` is called again and again; what it raises ends the wait."""

    def __init__(self, patience_s: float, meanwhile: Callable[[], None]) -> None:
        self.meanwhile = meanwhile
        self._patience_s = patience_s
        self._deadline = time.monotonic() + patience_s

    def wait(self, why: str) -> None:
        """A moment. Raises OutOfPatience, for that reason, when none is left."""
        if time.monotonic() > self._deadline:
            raise OutOfPatience(f"{why} within {self._patience_s:.0f} s")
        self.meanwhile()
        time.sleep(POLL_S)


class Place(Protocol):
    """Where every rank reads and writes. Raises OSError or RuntimeError when it is gone."""

    address: str  # of this host, as the others reach it

    def set(self, key: str, value: bytes) -> None: ...

    def check(self, keys: Sequence[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def torch_store(self) -> Any:
        """The same place for torch's own threads."""
        ...

    def leave(self) -> None: ...


class Folder:
    """Of ranks on one host: a file for each key. Unlike torch's FileStore it needs no lock and knows no half-written
    record, for the rest of which one would wait without hearing anything."""

    address = "127.0.0.1"

    def __init__(self, path: Path, epoch: int, size: int) -> None:
        path.mkdir(exist_ok=True)
        self._path, self._epoch, self._size = path, epoch, size
        self._ours: list[Path] = []

    def set(self, key: str, value: bytes) -> None:
        file = self._file(key)
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        draft.write_bytes(value)
        draft.replace(file)
        self._ours.append(file)

    def check(self, keys: Sequence[str]) -> bool:
        return all(self._file(key).is_file() for key in keys)

    def get(self, key: str) -> bytes:
        return self._file(key).read_bytes()

    def torch_store(self) -> Any:
        return c10d.FileStore(str(self._file("torch")), self._size)

    def leave(self) -> None:
        """Remove what this rank wrote, and with the last one's the folder."""
        for file in self._ours:
            file.unlink(missing_ok=True)
        self._ours.clear()
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def sweep(self) -> None:
        """Remove what ranks that were killed left of groups before this one."""
        stem, _, epoch = self._path.name.rpartition("-")
        if epoch != str(self._epoch):  # a folder that somebody else has named
            return
        for path in self._path.parent.glob(f"{stem}-*"):
            number = path.name.rpartition("-")[2]
            if number.isdecimal() and int(number) < self._epoch:
                shutil.rmtree(path, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self._path / quote(f"{self._epoch}/{key}", safe="")


class AtRankZero:
    """Of ranks on several hosts: torch's TCPStore."""

    def __init__(self, store: Any, epoch: int, address: str) -> None:
        self.address = address
        self._server = store
        self._store = c10d.PrefixStore(str(epoch), store)

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._store.check(list(keys)))

    def get(self, key: str) -> bytes:
        return bytes(self._store.get(key))

    def torch_store(self) -> Any:
        self._server.set_timeout(timedelta(seconds=READING_S))
        return self._store

    def leave(self) -> None:
        pass


class Watched(c10d.Store):  # type: ignore[misc]
    """A place as torch reads it, in the thread that made it: what is not there yet is awaited with patience."""

    def __init__(self, place: Place, patience: Patience) -> None:
        super().__init__()
        self._place = place
        self._patience = patience

    def set(self, key: str, value: bytes) -> None:
        self._place.set(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._place.get(key)

    def check(self, keys: list[str]) -> bool:
        return self._place.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # noqa: ARG002 (torch passes it)
        while not self._place.check(keys):
            self._patience.wait(f"{', '.join(keys)} did not come")


def meet(rendezvous: str, epoch: int, rank: int, size: int, patience: Patience) -> Place:
    """A place to which all ranks have come: file:///PATH (one host) or tcp://HOST:PORT (rank 0 listens there).

    Raises ConfigError for one that cannot be, OutOfPatience when ranks do not come, OSError or RuntimeError when it goes
    while they are awaited.
    """
    url = urlsplit(rendezvous)
    if url.scheme == "file" and url.path:
        try:
            folder = Folder(Path(url.path), epoch, size)
        except OSError as error:
            why = f"{error.strerror}; workers on several hosts need --master-addr"
            raise ConfigError(f"rendezvous {rendezvous}: {why}") from None
        try:
            _await_ranks(folder, rank, size, rendezvous, patience)
        except BaseException:
            folder.leave()
            raise
        if rank == 0:
            folder.sweep()
        return folder
    if url.scheme != "tcp" or not url.hostname or not url.port:
        raise ConfigError(f"rendezvous {rendezvous!r}: expected file:///PATH or tcp://HOST:PORT")
    server = _listen(url, size, patience.meanwhile) if rank == 0 else None
    while True:
        try:
            with socket.create_connection((url.hostname, url.port), timeout=REACHING_S) as probe:
                address = probe.getsockname()[0]
            place = AtRankZero(server or _tcp_store(url, size, rank), epoch, address)
            _await_ranks(place, rank, size, rendezvous, patience)
            return place
        except (OSError, RuntimeError) as error:  # not there yet, or still rank 0's store of an earlier meeting
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise ConfigError(f"rendezvous {rendezvous}: {error.strerror}") from None
            patience.wait(f"rank {rank} did not reach {rendezvous} ({error})")


def _await_ranks(place: Place, rank: int, size: int, rendezvous: str, patience: Patience) -> None:
    place.set(f"here/{rank}", b"1")
    missing: Sequence[int] = range(size)
    while missing := [other for other in missing if not place.check([f"here/{other}"])]:
        patience.wait(f"ranks {missing} did not come to {rendezvous}")


def _listen(url: SplitResult, size: int, meanwhile: Callable[[], None]) -> Any:
    patience = Patience(LISTENING_S, meanwhile)
    while True:
        try:
            return _tcp_store(url, size, 0)
        except RuntimeError as error:
            try:
                patience.wait("")
            except OutOfPatience:
                raise ConfigError(f"rank 0 cannot listen at {url.netloc}: {error}") from None


def _tcp_store(url: SplitResult, size: int, rank: int) -> Any:
    timeout = timedelta(seconds=REACHING_S)
    return c10d.TCPStore(url.hostname, url.port, size, rank == 0, timeout, wait_for_workers=False)
