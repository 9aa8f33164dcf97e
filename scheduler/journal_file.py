"""A journal as a file: a header, the records, an end; each with its length and a checksum."""

import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import msgspec
from msgspec import Struct

from .. import __version__
from ..common.errors import ConfigError
from ..common.messages import PROTOCOL
from .journal import Entry, Journal
from .redaction import Redactor

MAGIC = b"quire journal\n"
VERSION = 1
_FRAME = struct.Struct("<II")  # length, checksum
_LONGEST = 1 << 31
_encoder = msgspec.msgpack.Encoder()


class Header(Struct, tag=True, frozen=True):
    """What there is to know before anything is replayed. By name: another version must be able to read this."""

    version: int
    quire: str
    protocol: int
    python: str
    host: str
    model: str
    written_at: float
    why: str
    redacted: bool
    lost: bool  # the beginning of the scheduler's life is not in it


class End(Struct, tag=True, array_like=True, frozen=True):
    """Behind the last record."""

    count: int


_header = msgspec.msgpack.Decoder(Header)
_rest: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Entry | End)


class Copy:
    """A journal as it was at one moment. Making it is quick, `write` may run in another thread: all that it reads stays
    as it is, or only grows."""

    def __init__(self, journal: Journal, model: str, vocab_size: int, why: str, *, redacted: bool) -> None:
        self._segments = journal.records()
        self._vocab_size = vocab_size
        self._header = Header(
            VERSION,
            __version__,
            PROTOCOL,
            "{}.{}".format(*sys.version_info),
            socket.gethostname(),
            model,
            journal.clock(),
            why,
            redacted,
            journal.num_dropped > 0,
        )

    def write(self, file: Path) -> int:
        """Returns its bytes. Nobody but its owner may read it. Raises OSError, and then leaves nothing."""
        part = file.with_name(f".{file.name}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                self._write(stream)
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)
        return file.stat().st_size

    def _write(self, stream: BinaryIO) -> None:
        stream.write(MAGIC)
        _put(stream, self._header)
        redactor = Redactor(self._vocab_size) if self._header.redacted else None
        count = 0
        for entries, requests in self._segments:
            for entry in redactor.segment(entries, requests) if redactor else entries:
                _put(stream, entry)
                count += 1
        _put(stream, End(count))


def _put(stream: BinaryIO, part: Struct) -> None:
    body = _encoder.encode(part)
    stream.write(_FRAME.pack(len(body), crc32(body)))
    stream.write(body)


class Reader:
    """Raises ConfigError for what is no journal, or one that this version cannot read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._stream = file.open("rb")
            self._size = max(1, os.fstat(self._stream.fileno()).st_size)
            magic = self._stream.read(len(MAGIC))
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
        if magic != MAGIC:
            self.close()
            raise ConfigError(f"{file}: this is no journal of Quire's; it does not begin as one")
        try:
            self.header = _header.decode(self._body())
        except msgspec.DecodeError as error:
            raise ConfigError(f"{file}: its header cannot be read: {error}") from None
        if (self.header.version, self.header.quire, self.header.protocol) != (VERSION, __version__, PROTOCOL):
            raise ConfigError(
                f"{file}: written by Quire {self.header.quire} (format {self.header.version}, protocol"
                f" {self.header.protocol}), and this is {__version__} ({VERSION}, {PROTOCOL}): only the version that wrote a"
                " journal decides as it did; install that one"
            )

    @property
    def progress(self) -> float:
        """The share of the file that has been read."""
        return self._stream.tell() / self._size

    def entries(self) -> Iterator[Entry]:
        """Raises ConfigError where the file is cut off or damaged; what comes before is good."""
        count = 0
        while True:
            where = self._stream.tell()
            try:
                part = _rest.decode(self._body())
            except msgspec.DecodeError as error:
                raise ConfigError(f"{self.file}: it is damaged at byte {where}: {error}") from None
            if isinstance(part, End):
                if part.count != count:
                    raise ConfigError(f"{self.file}: {part.count - count} of {part.count} records are missing")
                return
            count += 1
            yield part

    def _body(self) -> bytes:
        where = self._stream.tell()
        head = self._stream.read(_FRAME.size)
        length, checksum = _FRAME.unpack(head) if len(head) == _FRAME.size else (0, 0)
        body = self._stream.read(length) if length < _LONGEST else b""
        if len(head) < _FRAME.size or len(body) < min(length, self._size - where):
            raise ConfigError(f"{self.file}: it ends at byte {self._size}, in the middle: its end was not written")
        if len(body) != length or crc32(body) != checksum:
            raise ConfigError(f"{self.file}: it is damaged at byte {where}: the checksum does not fit")
        return body

    def close(self) -> None:
        self._stream.close()
