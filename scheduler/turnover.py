"""How fast sequences end, and so how long a queue takes. Pure: times are arguments."""

from math import exp

MEMORY_S = 30.0  # what ended longer ago counts less and less
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class Turnover:
    """The rate at which sequences end while there are any: an average over `MEMORY_S`, or what is known if that is less."""

    def __init__(self) -> None:
        self._weight = 0.0  # of all that have ended, each by its age
        self._since: float | None = None
        self._at = 0.0

    def begins(self, now: float) -> None:
        """After a time without sequences, which does not count."""
        self._since = now if self._since is None else self._since + now - self._at
        self._at = now

    def ended(self, now: float, count: int = 1) -> None:
        self._weight = self._weight * exp((self._at - now) / MEMORY_S) + count
        self._at = now

    def wait_s(self, num_waiting: int, now: float) -> float:
        """Seconds until as many as wait now will have ended, between a second and a minute."""
        if self._since is None:
            return LONGEST_WAIT_S
        known_s = max(now - self._since, 1.0)
        rate = self._weight * exp((self._at - now) / MEMORY_S) / (MEMORY_S * (1.0 - exp(-known_s / MEMORY_S)))
        return min(max(num_waiting / rate, SHORTEST_WAIT_S), LONGEST_WAIT_S) if rate > 0.0 else LONGEST_WAIT_S
