"""When requests run out of time. Pure: times are arguments."""

import heapq
from collections.abc import Iterator
from itertools import count
from math import inf

from .request import Request

_Entry = tuple[float, int, Request]  # serial numbers are unique, so requests are never compared


class Deadlines:
    """One time for each request. As in `WaitingQueue`, what is dropped stays in the heap until it surfaces or outnumbers
    the others, so everything is O(log n) and a dropped request is not held for long."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._entries: dict[Request, _Entry] = {}
        self._serial = count()

    def __len__(self) -> int:
        return len(self._entries)

    def set(self, request: Request, at: float) -> None:
        """Whatever was set for it before counts no more."""
        entry = (at, next(self._serial), request)
        self._entries[request] = entry
        heapq.heappush(self._heap, entry)
        self._tidy()

    def drop(self, request: Request) -> None:
        """No effect when it has none."""
        if self._entries.pop(request, None) is not None:
            self._tidy()

    def next(self) -> float:
        """The earliest time of all; infinity when there is none."""
        heap = self._heap
        while heap:
            if self._entries.get(heap[0][2]) is heap[0]:
                return heap[0][0]
            heapq.heappop(heap)
        return inf

    def due(self, now: float) -> Iterator[Request]:
        """Take those whose time has come, the earliest first."""
        while self.next() <= now:
            request = heapq.heappop(self._heap)[2]
            del self._entries[request]
            yield request

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
