"""Requests that wait for a row: priority, then fairness between tenants, then arrival."""

import heapq
from collections.abc import Iterable, Iterator

from .fairness import Tenants
from .pace import Claim
from .request import Request


class WaitingQueue:
    """A request `enter`s once, is `push`ed when it waits again, and `leave`s once. All is O(log n), but for the moving
    of pointers."""

    def __init__(self) -> None:
        self._tenants: dict[int, Tenants] = {}  # by priority, while there are requests of it
        self._heap: list[int] = []  # the priorities of those who wait, and some of nobody
        self._in_heap: set[int] = set()
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        for tenants in self._tenants.values():
            yield from tenants

    def enter(self, request: Request) -> None:
        """A new request, which waits."""
        tenants = self._tenants.setdefault(request.priority, Tenants())
        tenants.enter(request)
        self.push(request)

    def leave(self, request: Request) -> None:
        """It has ended. It must not wait."""
        tenants = self._tenants[request.priority]
        tenants.leave(request)
        if not tenants.num_requests:
            del self._tenants[request.priority]
            if len(self._heap) > 2 * len(self._tenants) + 16:
                self._heap = sorted(self._tenants)
                self._in_heap = set(self._heap)

    def push(self, request: Request) -> None:
        self._tenants[request.priority].push(request)
        self._num += 1
        if request.priority not in self._in_heap:
            self._in_heap.add(request.priority)
            heapq.heappush(self._heap, request.priority)

    def peek(self) -> Request | None:
        """Whose turn it is."""
        while self._heap:
            tenants = self._tenants.get(self._heap[0])
            if tenants is not None and (head := tenants.peek()) is not None:
                return head
            self._in_heap.remove(heapq.heappop(self._heap))
        return None

    def rows_kept(self, request: Request, num_rows: int) -> int:
        """Rows that stay free for other tenants when a waiting request is admitted."""
        return self._tenants[request.priority].rows_kept(request, num_rows)

    def claims(self, prompts: Iterable[Request], num_rows: int) -> list[Claim]:
        """What these, which run, ask of a step of so many rows."""
        return [
            request.claim._replace(crowds=self._tenants[request.priority].crowds(request, num_rows))
            for request in prompts
        ]

    def pop(self) -> Request:
        request = self.peek()
        if request is None:
            raise IndexError("pop from an empty queue")
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """Raises KeyError when the request does not wait."""
        tenants = self._tenants.get(request.priority)
        if tenants is None:
            raise KeyError(request.id)
        tenants.remove(request)
        self._num -= 1

    def part_of(self, tenant: str) -> tuple[int, int]:
        """Requests of a tenant, those that run included, and how many tenants have any, this one included."""
        accounts = [
            account for tenants in self._tenants.values() for account in tenants.accounts if account.num_requests
        ]
        held = sum(account.num_requests for account in accounts if account.tenant == tenant)
        return held, len({account.tenant for account in accounts} | {tenant})

    def check(self, running: Iterable[Request]) -> None:
        """Raises AssertionError when those who are counted are not those who wait and run."""
        for request in self:
            assert not request.blocks and request.row is None and not request.computed, request
        held: dict[tuple[int, str], int] = {}
        for request in (*self, *running):
            key = request.priority, request.tenant
            held[key] = held.get(key, 0) + 1
        counted = [account for tenants in self._tenants.values() for account in tenants.accounts]
        assert held == {(a.priority, a.tenant): a.num_requests for a in counted if a.num_requests}, (
            "a tenant's requests"
        )
        assert self._num == sum(len(account.waiting) for account in counted), "those who wait"
