"""What every message is: a positional struct with a tag, packed columns inside, and a protocol that all peers share.

Arrays on the wire: hot columns are packed little-endian int32 (`pack`/`unpack`), since a step of 256 rows decodes in
3 us as columns and in 120 us as row structs. Structs are positional: a change of any field is a change of `PROTOCOL`,
and peers of another protocol are refused at `Hello`.
"""

import sys
from array import array
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

PROTOCOL = 4
MAX_FRAME_BYTES = 64 << 20

assert sys.byteorder == "little" and array("i").itemsize == 4, "the wire's columns are little-endian int32"


def pack(values: Iterable[int]) -> bytes:
    return array("i", values).tobytes()


def unpack(column: bytes) -> list[int]:
    """Raises ValueError when `column` is not a whole number of int32."""
    values = array("i")
    values.frombytes(column)
    return values.tolist()


class Message(Struct, tag=True, array_like=True, frozen=True, gc=False):
    """Base of everything that crosses a process boundary."""


Label = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*\Z")]  # goes into logs as it is
