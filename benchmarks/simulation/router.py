"""Which replica gets a request. Pure: loads are arguments, in requests that have not ended or any weight of them."""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil
from typing import Protocol

POINTS = 64  # of each replica on the ring: shares then differ by about an eighth
SLACK = 1.25


class Router(Protocol):
    def choose(self, key: bytes, loads: Sequence[int]) -> int:
        """A replica's index. Equal keys stand for equal prefixes."""
        ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, key: bytes, loads: Sequence[int]) -> int:  # noqa: ARG002
        chosen = self._next % len(loads)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The one with the fewest requests."""

    def choose(self, key: bytes, loads: Sequence[int]) -> int:  # noqa: ARG002
        return min(range(len(loads)), key=loads.__getitem__)


class Affinity:
    """Equal prefixes meet where their KV is, unless that replica has `slack` times its share of all requests.

    Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016): the first replica clockwise of the
    key on a ring that has room. Where each request weighs 1, no replica ever gets above ceil(slack * (all requests + 1)
    / replicas), and one that is added or removed moves only its own share of the keys.
    """

    def __init__(self, slack: float = SLACK) -> None:
        if slack < 1:
            raise ValueError(f"slack must be at least 1, not {slack}: no replica would have room")
        self.slack = slack
        self._ring: list[tuple[int, int]] = []
        self._places = 0

    def bound(self, loads: Sequence[int]) -> int:
        """Requests that one replica may have once this one is placed."""
        return ceil(self.slack * (sum(loads) + 1) / len(loads))

    def choose(self, key: bytes, loads: Sequence[int]) -> int:
        if self._places != len(loads):
            self._places = len(loads)
            points = ((_place(b"%d/%d" % (i, k)), i) for i in range(len(loads)) for k in range(POINTS))
            self._ring = sorted(points)
        bound = self.bound(loads)
        first = bisect_right(self._ring, (_place(key), len(loads)))
        for step in range(len(self._ring)):
            _, replica = self._ring[(first + step) % len(self._ring)]
            if loads[replica] < bound:
                return replica
        raise AssertionError("every replica is above the mean")


ROUTERS: dict[str, type[RoundRobin] | type[LeastLoaded] | type[Affinity]] = {
    "affinity": Affinity,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
}


def _place(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
