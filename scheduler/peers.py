"""Who is connected, and what is known of each; the handshake of the frontends' wire. No sockets here."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..common.messages import PEER_TIMEOUT_S, PROTOCOL, Allocated, Hello, Progress, WorkerReady


@dataclass(slots=True)
class Frontend:
    """A peer on the frontends' wire; an observer is one that sends no requests."""

    role: str
    name: str
    heard_at: float


@dataclass(slots=True)
class Worker:
    """`progress`, `ready` and `allocated` are what it reported last, in the order of a start."""

    rank: int
    name: str
    progress: Progress | None = None
    ready: WorkerReady | None = None
    allocated: Allocated | None = None
    heard_at: float = 0.0
    claimed_at: float | None = None  # another one wants its rank


class Frontends:
    """By identity. A peer that is silent for too long is to be removed, and may say Hello again."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Frontend] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._peers))

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._peers

    def count(self, role: str) -> int:
        return sum(peer.role == role for peer in self._peers.values())

    def name(self, identity: bytes) -> str:
        peer = self._peers.get(identity)
        return peer.name if peer is not None else "a stranger"

    def greet(self, identity: bytes, hello: Hello, now: float) -> str | None:
        """Take the peer in, or say why not. A Hello that is repeated changes nothing."""
        if problem := other_protocol(hello):
            return problem
        if hello.role not in ("frontend", "observer"):
            return f"{hello.role!r} does not belong on the frontends' wire"
        self._peers[identity] = Frontend(hello.role, hello.name, now)
        return None

    def heard(self, identity: bytes, now: float) -> Frontend | None:
        """Note a sign of life; None from a stranger."""
        peer = self._peers.get(identity)
        if peer is not None:
            peer.heard_at = now
        return peer

    def forgive(self, now: float) -> None:
        """Count everybody as heard: it was this process that was away."""
        for peer in self._peers.values():
            peer.heard_at = now

    def silent(self, now: float) -> list[bytes]:
        return [identity for identity, peer in self._peers.items() if now - peer.heard_at > PEER_TIMEOUT_S]

    def remove(self, identity: bytes) -> Frontend:
        return self._peers.pop(identity)


def other_protocol(hello: Hello) -> str | None:
    """What to tell a peer of another protocol; None to one of ours."""
    if hello.protocol == PROTOCOL:
        return None
    return (
        f"{hello.name} speaks protocol {hello.protocol}, this scheduler {PROTOCOL}: install the same version of quire"
    )
