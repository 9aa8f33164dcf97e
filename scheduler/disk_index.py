"""What the blocks of a file hold, noted beside it, so that an engine that starts finds what the one before has saved.

A log of records of one size, each with a checksum: this block is being written; this block holds that. The first is
noted before a plan goes out that writes the block, the second when the plan is done: so whatever dies in between, no
block is ever taken for what it does not hold. Who opens the log reads it, forgets all that is in doubt, and begins it
anew. Pages that a killed process has written to a file are the kernel's and stay; what the machine itself may lose when
it goes down is in doubt unless the log was closed.
"""

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from ..common.errors import ConfigError
from .tiers import Written

log = logging.getLogger(__name__)

MAGIC = b"quire kv index 1"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of the machine
CLOSED = -1  # as a block: all before was closed in good order
NOTHING = bytes(32)  # as a digest
SLACK = 4  # records for each block, before the log is written anew


class DiskIndex:
    """The index of `num_blocks` blocks of `block_size` tokens. One process has it open. `content` is what it found.

    `name` says whose content the files hold: an index of another name is of no use. Raises ConfigError when the file
    cannot be used.
    """

    def __init__(self, file: Path, name: Sequence[str], num_blocks: int, block_size: int) -> None:
        self._file = file
        self._num_blocks = num_blocks
        self._record = struct.Struct(f"<i32s{4 * block_size}s")
        self._header = sha256("\0".join([*name, str(num_blocks), str(block_size)]).encode()).digest()
        self._boot = sha256(BOOT_ID.read_bytes() if BOOT_ID.exists() else os.urandom(16)).digest()
        self._broken = False  # the log cannot be written
        self._latest: dict[int, Written] = {}  # of the plans under way
        with _explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lock = (file.parent / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.content = self._read()
            self._log = self._begin(self.content)

    def writing(self, written: Iterable[Written]) -> None:
        """A plan that does this is about to go out."""
        for change in written:
            self._latest[change.block] = change
            self.content.pop(change.block, None)
            self._note(change.block)

    def done(self, written: Iterable[Written]) -> None:
        """That plan is done. What a later one writes to the same block is under way, and stays in doubt."""
        for change in written:
            if self._latest.get(change.block) is change:
                del self._latest[change.block]
                if change.digest:
                    self.content[change.block] = change
                    self._note(change.block, change.digest, change.tokens)

    def lost(self) -> None:
        """The plans under way are not known to be done."""
        self._latest.clear()

    def close(self) -> None:
        """The engine ends in good order, and so may the machine."""
        self._note(CLOSED)
        if not self._broken:
            os.fsync(self._log.fileno())
            self._log.close()
        self._lock.close()

    def _note(self, block: int, digest: bytes = NOTHING, tokens: bytes = b"") -> None:
        if self._broken:
            return
        try:
            self._log.write(self._bytes(block, digest, tokens))
            self._num_records += 1
            if self._num_records > SLACK * self._num_blocks:
                self._log.close()
                self._log = self._begin(self.content)
        except OSError as error:
            self._broken = True
            log.error("%s: %s; what is on disk will not be found by the next engine", self._file, error.strerror)
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _bytes(self, block: int, digest: bytes, tokens: bytes) -> bytes:
        record = self._record.pack(block, digest, tokens)
        return record + crc32(record).to_bytes(4, "little")

    def _begin(self, content: dict[int, Written]) -> BinaryIO:
        """A log that says this and no more, in place of the one that is there."""
        new = self._file.with_suffix(".new")
        with new.open("wb") as out:
            out.write(MAGIC + self._header + self._boot)
            for block, written in content.items():
                out.write(self._bytes(block, written.digest, written.tokens))
        new.replace(self._file)
        self._num_records = len(content)
        return self._file.open("ab", buffering=0)

    def _read(self) -> dict[int, Written]:
        """What is beyond doubt, in the order in which it was written."""
        try:
            found = self._file.read_bytes()
        except FileNotFoundError:
            return {}
        begin = len(MAGIC) + len(self._header)
        if found[:begin] != MAGIC + self._header:
            return {}
        content: dict[int, Written] = {}
        closed = False
        for block, digest, tokens in self._records(found[begin + len(self._boot) :]):
            content.pop(block, None)
            closed = block == CLOSED
            if digest != NOTHING and 1 <= block <= self._num_blocks:
                content[block] = Written(block, digest, tokens)
        same_boot = found[begin : begin + len(self._boot)] == self._boot
        return content if closed or same_boot else {}

    def _records(self, log: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        """Up to the first that is not whole."""
        size = self._record.size
        for at in range(0, len(log) - size - 3, size + 4):
            record = log[at : at + size]
            if crc32(record).to_bytes(4, "little") != log[at + size : at + size + 4]:
                return
            yield self._record.unpack(record)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise ConfigError(f"{file.parent} is in use by another engine; choose another --kv-disk") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; choose another --kv-disk") from None
