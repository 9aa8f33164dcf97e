"""A request's JSON body. What it may hold is bounded before anything is built of it: 16 MiB of "[]," become half a
gigabyte of lists, and whoever builds them holds up everybody else's tokens for a second."""

from typing import Any

import msgspec

from ..common.errors import RequestError
from ..common.model_info import ENDLESS

MAX_VALUES = ENDLESS + (1 << 16)  # as many token ids as a context may have, and some besides
MAX_PARTS = 1 << 16  # strings, lists and objects, which cost more
MAX_FIELDS = 1024  # of the body itself
MAX_DEPTH = 64
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


class Census:
    """Counts what a JSON text holds, piece by piece as it arrives.

    The counts are exact as far as the text is JSON: what a parser would build of it before it finds the first fault.
    """

    def __init__(self) -> None:
        self.parts = 0
        self.lists_and_objects = 0
        self.names = 0  # of fields, wherever they are
        self._commas = 0
        self._quotes = 0
        self._rest = b""  # a backslash at the end of a piece, whose second half is in the next one

    def add(self, piece: bytes) -> None:
        """Raises RequestError once there is more than a body may hold."""
        piece = self._rest + piece
        self._rest = b"\\" if (len(piece) - len(piece.rstrip(b"\\"))) % 2 else b""
        piece = piece[: len(piece) - len(self._rest)].replace(b"\\\\", b"").replace(b'\\"', b"")
        between = piece.split(b'"')
        outside = b"".join(between[self._quotes % 2 :: 2])
        self._quotes += len(between) - 1
        self._commas += outside.count(b",")
        self.names += outside.count(b":")
        self.lists_and_objects += outside.count(b"[") + outside.count(b"{")
        self.parts = self.lists_and_objects + self._quotes // 2
        if self.parts > MAX_PARTS:
            raise RequestError(f"the body holds more than {MAX_PARTS} strings, lists and objects", headers=_CLOSE)
        if self._commas + self.lists_and_objects > MAX_VALUES:
            raise RequestError(f"the body holds more than {MAX_VALUES} values", headers=_CLOSE)


def decode(content: bytes | bytearray, census: Census) -> dict[str, Any]:
    """The object in `content`, which `census` has counted; raises RequestError for what is none."""
    try:
        value = msgspec.json.decode(memoryview(content)[3:] if content.startswith(b"\xef\xbb\xbf") else content)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except UnicodeError:
        raise RequestError("the body holds text that is not valid Unicode") from None
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is not valid JSON: {str(error).partition(' - at ')[0][:200]}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, got a {type(value).__name__}")
    if len(value) > MAX_FIELDS:
        raise RequestError(f"the body has {len(value)} fields, the limit is {MAX_FIELDS}")
    _check_objects(value, census)
    return value


def _check_objects(value: dict[str, Any], census: Census) -> None:
    """Refuse what is nested deeper than we and templates follow, and a field that is given twice: whoever stands before
    us may have read the other one."""
    depth = names = seen = 0
    level: list[dict[str, Any] | list[Any]] = [value]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError("the body is nested too deeply")
        names += sum(len(node) for node in level if isinstance(node, dict))
        seen += len(level)
        if seen == census.lists_and_objects:  # so the values in them need no look
            break
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for found in children for child in found if type(child) in (dict, list)]
    if names != census.names:
        raise RequestError("the body holds an object with the same field twice")
