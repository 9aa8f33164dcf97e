"""Who may be what kills the workers. Pure: strikes and tokens in, suspects and convicts out.

Every request that was in flight when the workers were lost gets a strike. One of them may be the cause, and would be it
again in the next step. At `SUSPECT_AT` strikes a request is computed alone, so that a further loss is its own doing or
chance; at `FAIL_AT` it has failed alone twice, and is not tried again. So a request that kills whatever computes it
costs four losses at most, two of which it shares with all others of its kind, and nobody is convicted for another's.

It takes `PROOF` tokens to take all strikes away. One would not do: computing a request anew ends in a token, so that
one which kills only where it is decoded would be cleared before each time.
"""

from collections.abc import Iterable

from .request import Request

FAIL_AT = 4  # strikes
PROOF = 2  # tokens since the last strike


class Suspects:
    """Those that are to be computed alone, among the requests of a scheduler."""

    def __init__(self) -> None:
        self._requests: set[Request] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def note(self, request: Request) -> None:
        """A request that may have brought strikes."""
        if request.suspect:
            self._requests.add(request)

    def blame(self, requests: Iterable[Request]) -> list[Request]:
        """A strike for each. Returns those that became suspects by it."""
        new = []
        for request in requests:
            request.strikes += 1
            request.proof = 0
            if request.suspect and request not in self._requests:
                self._requests.add(request)
                new.append(request)
        return new

    def acquit(self, request: Request) -> None:
        """A token of a request that has strikes came back."""
        request.proof += 1
        if request.proof >= PROOF:
            request.strikes = 0
            self._requests.discard(request)

    def drop(self, request: Request) -> None:
        """It has ended."""
        self._requests.discard(request)

    def running(self) -> Request | None:
        """The one that holds a row: no other is admitted meanwhile."""
        return next((request for request in self._requests if request.row is not None), None)

    def check(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError unless these are the ones among all that there are."""
        assert {request for request in requests if request.suspect} == self._requests, "a suspect is gone, or not known"

    def convicts(self) -> list[Request]:
        """Those that have one strike too many, by rank."""
        return sorted((r for r in self._requests if convicted(r)), key=lambda request: request.rank)


def convicted(request: Request) -> bool:
    return request.strikes >= FAIL_AT


def verdict(request: Request) -> str:
    """What its owner is told."""
    return f"the engine failed {request.strikes} times in a row while it computed this request; it is not tried again"
