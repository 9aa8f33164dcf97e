"""What follows from the end of a process: it is started again, after which delay, or the engine ends. Time is an
argument and there are no effects: `keeper` has them.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from ..common.errors import EXIT_CONFIG
from .children import COMPANY_S, Exit, Role

WINDOW_S = 60.0  # in which restarts are counted
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 8.0
STEADY_S = 5.0  # nobody tells when a frontend serves; one that lived for so long did


@dataclass(frozen=True, slots=True)
class Again:
    """Start it again in `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Over:
    """The engine ends, because of `cause`. `why` says more where the cause alone would not end it."""

    cause: Exit
    why: str = ""

    def __str__(self) -> str:
        return f"{self.cause}; {self.why}" if self.why else str(self.cause)


@dataclass(slots=True)
class _Restart:
    """Of one process, or of several of a role that ended together: a fault seldom ends one worker alone."""

    role: Role
    at: float
    delay_s: float
    names: set[str] = field(default_factory=set)


class Restarts:
    """What has ended so far, and what that means for the next."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._serves = False  # or did once: a first start that fails is told at once
        self._recent: deque[_Restart] = deque()
        self._in_a_row: Counter[Role] = Counter()  # since it was last known to serve

    def ready(self) -> None:
        """The engine serves: scheduler and workers do."""
        self._serves = True
        for role in ("scheduler", "worker"):
            self._in_a_row.pop(role, None)

    def ended(self, end: Exit, now: float) -> Again | Over:
        """`end` came unasked, at `now`, which never falls."""
        if end.code == EXIT_CONFIG or not self._serves or not self._max_restarts:
            return Over(end)
        role = end.child.role
        while self._recent and now - self._recent[0].at > WINDOW_S:
            self._recent.popleft()
        last = next((restart for restart in reversed(self._recent) if restart.role == role), None)
        if last and now - last.at <= COMPANY_S and end.child.name not in last.names:
            last.names.add(end.child.name)
            return Again(max(0.0, last.at + last.delay_s - now))
        if role == "frontend" and (last is None or now - last.at - last.delay_s >= STEADY_S):
            self._in_a_row.pop(role, None)
        if len(self._recent) >= self._max_restarts:
            return Over(end, f"{_times(self._max_restarts)} within {WINDOW_S:.0f} s is the limit (--max-restarts)")
        if self._in_a_row[role] >= self._max_restarts:
            return Over(end, f"{_times(self._max_restarts)} in vain is the limit (--max-restarts)")
        delay_s = _delay_s(self._in_a_row[role])
        self._in_a_row[role] += 1
        self._recent.append(_Restart(role, now, delay_s, {end.child.name}))
        return Again(delay_s)


def _delay_s(in_a_row: int) -> float:
    """None for the first restart since the engine served; then longer each time."""
    return min(FIRST_DELAY_S * 2 ** min(in_a_row - 1, 10), LONGEST_DELAY_S) if in_a_row else 0.0


def _times(number: int) -> str:
    return "1 restart" if number == 1 else f"{number} restarts"
