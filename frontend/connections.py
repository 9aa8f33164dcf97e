"""The places of a process's connections: how many there are, and who gives way when all are taken."""

import logging
import resource
from typing import Protocol

log = logging.getLogger(__name__)

RESERVED_FILES = 64  # for what the process opens besides connections
IDLE_S = 2.0  # a connection that has asked for nothing for so long gives way
TELL_EVERY_S = 10.0


class Connection(Protocol):
    def give_way(self) -> None:
        """Close. It is not waited for."""


class Connections:
    """Who holds a place. An idle connection counts, but one that comes when all places are taken may have its place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when; the oldest first
        self._refused = 0  # since that was last told
        self._told = float("-inf")

    def admit(self, connection: Connection, now: float) -> bool:
        """Give a new connection a place; False when there is none."""
        if len(self._open) >= self.limit and not self._make_room(now):
            self._refused += 1
            if now - self._told >= TELL_EVERY_S:
                log.warning("%d connections refused: all %d places are taken", self._refused, self.limit)
                self._refused, self._told = 0, now
            return False
        self._open.add(connection)
        return True

    def rests(self, connection: Connection, now: float) -> None:
        """It has been answered, or has just come, and asks for nothing."""
        if connection in self._open:
            self._idle.pop(connection, None)  # to the end
            self._idle[connection] = now

    def asks(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def left(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def _make_room(self, now: float) -> bool:
        oldest = next(iter(self._idle), None)
        if oldest is None or now - self._idle[oldest] < IDLE_S:
            return False
        self.left(oldest)
        oldest.give_way()
        return True


def affordable(wanted: int) -> int:
    """As many of the `wanted` connections as this process may have files open, after raising that limit if it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    places = max(1, soft - RESERVED_FILES)
    log.warning("%d connections at most: this process may have %d files open (ulimit -n)", places, soft)
    return places
