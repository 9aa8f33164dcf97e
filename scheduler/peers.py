"""Who is connected: the handshake of both wires, and what is known of each peer. No sockets here."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..common.messages import PEER_TIMEOUT_S, PROTOCOL, Capacity, Hello, Progress, WorkerReady

STRANGER_EPOCH = 0  # in a Heartbeat to a peer that is not known: no scheduler's epoch, so the peer says Hello


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
    allocated: bool = False


class Frontends:
    """By identity. A peer that is silent for too long is to be removed; it is told to say Hello when it speaks again."""

    def __init__(self) -> None:
        self._peers: dict[bytes, Frontend] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._peers))

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._peers

    def count(self, role: str) -> int:
        return sum(peer.role == role for peer in self._peers.values())

    def greet(self, identity: bytes, hello: Hello, now: float) -> str | None:
        """Take the peer in, or say why not. A Hello that is repeated changes nothing."""
        if hello.protocol != PROTOCOL:
            return _other_protocol(hello)
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


class WorkerGroup:
    """Workers by identity, one for each rank. They are never dropped for silence: a step may take long.

    What binds them is a group's, not a scheduler's: the epoch of its plans, where its ranks meet, how much it holds.
    """

    def __init__(self, num_ranks: int, fingerprint: str, *, epoch: int, rendezvous: str) -> None:
        self.num_ranks = num_ranks
        self.epoch = epoch
        self.rendezvous = rendezvous
        self.capacity: Capacity | None = None  # decided, though not allocated yet
        self._fingerprint = fingerprint
        self._peers: dict[bytes, Worker] = {}

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._peers))

    def get(self, identity: bytes) -> Worker | None:
        return self._peers.get(identity)

    @property
    def all(self) -> list[Worker]:
        """By rank."""
        return sorted(self._peers.values(), key=lambda worker: worker.rank)

    def greet(self, identity: bytes, hello: Hello) -> str | None:
        """Take the worker in, or say why not. A Hello that is repeated changes nothing."""
        if hello.protocol != PROTOCOL:
            return _other_protocol(hello)
        if hello.role != "worker":
            return f"{hello.role!r} does not belong on the workers' wire"
        if not 0 <= hello.rank < self.num_ranks:
            return f"there is no rank {hello.rank} with --tensor-parallel-size {self.num_ranks}"
        if hello.fingerprint not in ("", self._fingerprint):
            return "it holds another model than the one that is served"
        for other, worker in self._peers.items():
            if worker.rank == hello.rank and other != identity:
                return f"rank {hello.rank} is taken by {worker.name}"
        self._peers.setdefault(identity, Worker(hello.rank, hello.name))
        return None


def _other_protocol(hello: Hello) -> str:
    return (
        f"{hello.name} speaks protocol {hello.protocol}, this scheduler {PROTOCOL}: install the same version of quire"
    )
