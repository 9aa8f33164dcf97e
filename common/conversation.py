"""Which frames of a peer count: each carries the number of its conversation and its own number in it.

ZeroMQ keeps the order of a connection's messages, but reconnects silently, and what was under way then is lost. A
conversation begins with the peer's `Hello` and ends when a number is missing: both sides then start over from what
they hold themselves, instead of waiting for what will never come. A frame that comes a second time is dropped.

The peer counts from 1. The scheduler begins each count somewhere else: when it forgets a conversation and takes up one
of the same name again (its peer repeats a Hello until it is answered), no frame of the second passes for one of the
first. No sockets here.
"""

import struct
from dataclasses import dataclass
from enum import Enum

_HEADER = struct.Struct("<IQ")  # conversation, number in it
HEADER_BYTES = _HEADER.size
NO_CONVERSATION = 0


class Verdict(Enum):
    """What to make of a frame."""

    NEXT = "next"
    OTHER = "other"  # of another conversation, or of one that is over
    REPEATED = "repeated"
    GAP = "gap"  # frames before it were lost, or it is of another count: this conversation is over


def outside(session: int) -> bytes:
    """Header of what is said to a peer that no conversation is held with; `session` is what it took for one."""
    return _HEADER.pack(NO_CONVERSATION, session)


def split(frame: bytes) -> tuple[int, int, memoryview]:
    """Conversation, number (outside of any, what `outside` was given) and body of a frame. Raises ValueError when it has
    no such header."""
    if len(frame) < HEADER_BYTES:
        raise ValueError(f"{len(frame)} bytes, a header has {HEADER_BYTES}")
    session, number = _HEADER.unpack_from(frame)
    if session and not number:
        raise ValueError("it has no number")
    return session, number, memoryview(frame)[HEADER_BYTES:]


@dataclass(slots=True)
class Conversation:
    """One side's count. `session` is chosen by the peer that says Hello, rising from 1; 0 before."""

    session: int = 0
    sent: int = 0
    first: int = 0  # number of the first frame that came; what is below it is of another count
    received: int = 0  # 0: nothing yet, the next frame says where the count is
    broken: bool = False

    def begin(self, session: int) -> None:
        self.session, self.sent, self.first, self.received, self.broken = session, 0, 0, 0, False

    def header(self) -> bytes:
        """Of the next frame to send."""
        self.sent += 1
        return _HEADER.pack(self.session, self.sent)

    def judge(self, session: int, number: int) -> Verdict:
        """Take note of a frame that came. After a gap nothing counts until another conversation begins."""
        if session != self.session or self.broken:
            return Verdict.OTHER
        if not self.received:
            self.first = number
        elif self.first <= number <= self.received:
            return Verdict.REPEATED
        elif number != self.received + 1:
            self.broken = True
            return Verdict.GAP
        self.received = number
        return Verdict.NEXT
