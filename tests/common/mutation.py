"""Frames that nobody of ours would send: real ones with something wrong, and noise. Seeded, so that a failure comes again."""

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import msgspec

from quire.common.channel import encode
from quire.common.messages import Message

ODD: Sequence[Any] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 10_000,
    "\x00\n\x1b[31m\u202e",
    b"",
    b"\xff" * 7,
    b"\xff\xff\xff\x7f" * 64,
    [],
    {},
    {"a": [{}]},
    [[[]]] * 20,
)
DEEP = b"\x91" * 100  # msgpack: a list in a list in a list, ...


class Mutator:
    """Spoils bodies of frames; `bodies` are good ones."""

    def __init__(self, seed: int, messages: Sequence[Message]) -> None:
        self.random = random.Random(seed)
        self.bodies = [encode(message) for message in messages]

    def next(self) -> bytes:
        """A body. Some still are messages, though not the ones they were."""
        how = self.random.choice((self._noise, self._bytes, self._deep, *(self._fields,) * 5))
        return how(self.random.choice(self.bodies))

    def _noise(self, body: bytes) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 5, 50, 5000)))

    def _bytes(self, body: bytes) -> bytes:
        spoilt = bytearray(body)
        for _ in range(self.random.randint(1, 4)):
            spoilt[self.random.randrange(len(spoilt))] = self.random.randrange(256)
        cut = self.random.randrange(len(spoilt)) if self.random.random() < 0.3 else len(spoilt)
        return bytes(spoilt[:cut]) + self.random.randbytes(self.random.choice((0, 0, 3)))

    def _deep(self, body: bytes) -> bytes:
        at = self.random.randrange(len(body))
        return body[:at] + DEEP + body[at:]

    def _fields(self, body: bytes) -> bytes:
        message = msgspec.msgpack.decode(body)
        for _ in range(self.random.randint(1, 3)):
            self._spoil(message)
        return msgspec.msgpack.encode(message)

    def _spoil(self, fields: list[Any]) -> None:
        """One thing wrong in a list, or deeper down."""
        within = [field for field in fields if isinstance(field, list) and field]
        if within and self.random.random() < 0.5:
            self._spoil(self.random.choice(within))
            return
        match self.random.randrange(5):
            case 0:
                fields.append(self._odd())
            case 1 if len(fields) > 1:
                del fields[self.random.randrange(len(fields))]
            case 2 if len(fields) > 1:
                i, j = self.random.sample(range(len(fields)), 2)
                fields[i], fields[j] = fields[j], fields[i]
            case 3:
                fields += deepcopy(fields)
            case _ if fields:
                fields[self.random.randrange(len(fields))] = self._odd()

    def _odd(self) -> Any:
        return deepcopy(self.random.choice(ODD))
