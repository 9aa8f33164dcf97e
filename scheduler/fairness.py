"""Who is next among tenants, and who yields. Pure.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
level, the tokens it was served over its weight, and whoever waits with the least level is next. It is work-conserving,
and between two tenants that always have somebody waiting, levels differ by a constant: the cost of the longest prompt
or that of all outputs that fit the KV cache at once. A tenant that had nobody waiting is lifted to the least level of
those that have: it cannot save up. Prompts are charged when they are admitted, less what the cache has of them, and
outputs as they come; being computed again after a preemption is not the tenant's doing and free.

Each priority has levels of its own.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from heapq import heappop, heappush, heapreplace
from math import inf

from .request import Account, Request

SAVED = 131_072.0  # of a level, that a tenant may be behind when it comes back, and so catch up with: four long prompts
OUTPUT_COST = 2.0  # of a token, a prompt's being 1: as in the paper, and about what their prices are
KEPT_ROWS = 16  # one of so many is kept from those that hold more than an equal part of them
LATELY = 16  # times that, and a tenant that left is forgotten; for its level, once would do
MOST_REMEMBERED = 4096  # tenants that have nothing here and had more than others

_Entry = tuple[float, int, Account]  # level, arrival of the first that waits; arrivals are unique


class Tenants:
    """Those of one priority, and their requests that wait. The least level is found in O(log n) of the changes."""

    def __init__(self) -> None:
        self.num_requests = 0  # waiting and running
        self._accounts: dict[str, Account] = {}
        self._order: list[_Entry] = []  # a heap; levels and arrivals have grown since an entry was made, if anything
        self._entries: dict[Account, _Entry] = {}  # the valid one of each that has somebody waiting
        self._last: Account | None = None  # whose waiting ended last
        self._left: list[tuple[float, str]] = []  # a heap of tenants that have nothing here

    def __iter__(self) -> Iterator[Request]:
        """Those who wait."""
        for account in self._entries:
            yield from account.waiting

    @property
    def accounts(self) -> Collection[Account]:
        return self._accounts.values()

    def enter(self, request: Request) -> None:
        """A request that is new."""
        account = self._accounts.get(request.tenant)
        if account is None:
            account = self._accounts[request.tenant] = Account(request.tenant, request.priority, -inf)
        account.num_requests += 1
        account.output_cost = OUTPUT_COST / request.weight
        self.num_requests += 1
        request.account = account
        if not account.waiting:
            account.level = max(account.level, self._least() - SAVED)

    def leave(self, request: Request) -> None:
        """It has ended, and does not wait any more."""
        account = request.account
        account.num_requests -= 1
        self.num_requests -= 1
        if not account.num_requests:
            heappush(self._left, (account.level, account.tenant))
        while self._left and (self._left[0][0] <= self._least() - LATELY * SAVED or len(self._left) > MOST_REMEMBERED):
            level, tenant = heappop(self._left)  # it would be lifted to the least level anyway
            left = self._accounts.get(tenant)
            if left is not None and not left.num_requests and left.level == level:
                del self._accounts[tenant]

    def push(self, request: Request) -> None:
        account = request.account
        insort(account.waiting, request, key=_arrival)
        if account.waiting[0] is request:
            self._enlist(account)

    def remove(self, request: Request) -> None:
        """Raises KeyError when the request does not wait."""
        waiting = request.account.waiting
        index = bisect_left(waiting, request.arrival, key=_arrival)
        if index == len(waiting) or waiting[index] is not request:
            raise KeyError(request.id)
        del waiting[index]
        if not waiting:
            del self._entries[request.account]
            self._last = request.account

    def peek(self) -> Request | None:
        """Of the tenant with the least level that has any, the first that came."""
        order = self._order
        while order:
            entry = order[0]
            level, arrival, account = entry
            if self._entries.get(account) is not entry:
                heappop(order)
            elif level < account.level or arrival != account.waiting[0].arrival:
                self._entries[account] = fresh = (account.level, account.waiting[0].arrival, account)
                heapreplace(order, fresh)
            else:
                return account.waiting[0]
        return None

    def rows_kept(self, request: Request, num_rows: int) -> int:
        """Rows that stay free when the request is admitted: for others that were here lately and are not waiting now. To
        wait for a row is what a tenant would notice most of another one's flood."""
        return num_rows // KEPT_ROWS if self.crowds(request, num_rows) else 0

    def crowds(self, request: Request, num_rows: int) -> bool:
        """Whether its tenant runs more than an equal part of the rows, while others were here lately."""
        account, num_tenants = request.account, len(self._accounts)
        num_running = account.num_requests - len(account.waiting)
        return num_tenants > 1 and num_running * num_tenants > num_rows

    def _enlist(self, account: Account) -> None:
        self._entries[account] = entry = (account.level, account.waiting[0].arrival, account)
        heappush(self._order, entry)
        if len(self._order) > 2 * len(self._entries) + 16:
            self._order = sorted(self._entries.values(), key=lambda entry: entry[:2])

    def _least(self) -> float:
        """The level of the next in turn; else of the one that waited last."""
        if (head := self.peek()) is not None:
            return head.account.level
        return self._last.level if self._last is not None else 0.0


def charge_prompt(request: Request) -> None:
    """For what was planned of the prompt, at most once for each token."""
    end = min(request.computed, request.num_prompt)
    if end > request.charged:
        request.account.level += (end - request.charged) / request.weight
        request.charged = end


def victim(running: Sequence[Request], index: int) -> Request | None:
    """Who behind running[index], in the order of rank, gives its blocks to it; None when nobody has to. -1 is for one
    that does not run.

    Of the worst priority, the latest of the tenant that holds most blocks over its weight. A request does not take from
    a tenant that holds less than its own, unless it is the first of all: that one never waits and never yields to its
    equals, so something always gets on until it ends, and then another one is the first.
    """
    if index == len(running) - 1:
        return None
    taker, last = running[index], running[-1]
    begin = len(running) - 1
    held: defaultdict[str, float] = defaultdict(float)
    while begin >= 0 and running[begin].priority == last.priority:
        one = running[begin]
        held[one.tenant] += (len(one.blocks) - one.retired) / one.weight
        begin -= 1
    most, chosen = -inf, last
    for behind in range(len(running) - 1, max(begin, index), -1):
        if held[running[behind].tenant] > most:
            most, chosen = held[running[behind].tenant], running[behind]
    spared = index > 0 and taker.priority == last.priority and most < held[taker.tenant]
    return None if spared else chosen


def _arrival(request: Request) -> int:
    return request.arrival
