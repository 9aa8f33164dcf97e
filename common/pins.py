"""What is asked and told of pinned prefixes, between frontends and the scheduler."""

from msgspec import Struct

from .wire import Message

MOST_PINS_TOLD = 4096


class GetPins(Message, frozen=True):
    """Asks for `Pinned`: the pins of a tenant, or of all, or the one of this id; `unpin` says that they are to end."""

    serial: int  # comes back with the answer
    unpin: bool = False
    tenant: str | None = None
    id: int = 0


class PinnedPrefix(Struct, array_like=True, frozen=True, gc=False):
    """Blocks may be in several, since prefixes begin alike."""

    id: int
    tenant: str
    num_tokens: int
    num_blocks: int
    left_s: float


class Pinned(Message, frozen=True):
    """Those that were asked for, the one used last first, `MOST_PINS_TOLD` at most."""

    serial: int
    pins: list[PinnedPrefix]
    count: int  # all that were asked for
    num_blocks: int  # that are pinned now, and that may be
    most_blocks: int
