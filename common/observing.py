"""What an observer asks of the scheduler, on the frontends' wire: its journal, and copies of what is said."""

from msgspec import Struct

from .wire import Message


class GetJournal(Message, frozen=True):
    """Asks for `JournalWritten`. Token ids are replaced, unless `reveal` asks for them and the engine allows it."""

    reveal: bool = False


class JournalWritten(Message, frozen=True):
    """Where the scheduler's host has it now; or `why` it has not."""

    path: str
    num_bytes: int
    why: str = ""


class Tap(Message, frozen=True):
    """Asks for copies of what is said on both wires. Said again for every `Tapped`: what was not acknowledged is bounded,
    and what does not fit is not copied. Token ids are zeros, unless `reveal` asks for them and the engine allows it."""

    reveal: bool = False
    received: int = 0  # bytes so far, of bodies and `COPY_BYTES` for each


COPY_BYTES = 100  # what else there is to a copy


class Copied(Struct, array_like=True, frozen=True, gc=False):
    """A message that the scheduler has heard or said."""

    at: float  # seconds since 1970
    wire: str  # "frontends" or "workers"
    inbound: bool
    peer: str  # its name
    body: bytes  # as in a frame; empty when the conversation was lost


class Tapped(Message, frozen=True):
    copies: list[Copied]
    dropped: int  # since the tap began
    why: str = ""  # it cannot be as it was asked for
