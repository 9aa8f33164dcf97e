"""Requests that wait for a row, best rank first."""

import heapq
from collections.abc import Iterator

from .request import Request

_Entry = tuple[tuple[int, int], Request]  # ranks are unique, so requests are never compared


class WaitingQueue:
    """A heap in which removed requests stay until they surface or outnumber the others: everything is O(log n)."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._entries: dict[Request, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        return iter(self._entries)

    def push(self, request: Request) -> None:
        assert request not in self._entries, request.id
        entry = (request.rank, request)
        self._entries[request] = entry
        heapq.heappush(self._heap, entry)

    def peek(self) -> Request | None:
        heap = self._heap
        while heap:
            if self._entries.get(heap[0][1]) is heap[0]:
                return heap[0][1]
            heapq.heappop(heap)
        return None

    def pop(self) -> Request:
        request = self.peek()
        if request is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        del self._entries[request]
        return request

    def remove(self, request: Request) -> None:
        """Raises KeyError when the request does not wait."""
        del self._entries[request]
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
