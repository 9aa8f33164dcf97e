"""How fast a queue moves, and what follows for who is to wait or to come again. Pure: times are arguments."""

from math import exp

MEMORY_S = 30.0  # what happened longer ago counts less and less
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # openai-python takes a longer Retry-After for none
PROMISED = 0.8  # share of the places that become free; the others are for who comes for the first time
KNOWN, KNOWN_S = 8.0, 3.0  # events, and a time, that make a rate to refuse somebody by


class Rate:
    """Of events, in the time that counts: an average over `MEMORY_S`, or over what there was if that is less."""

    def __init__(self) -> None:
        self._weight = 0.0  # of all events, each by its age
        self._since: float | None = None
        self._at = 0.0

    def begins(self, now: float) -> None:
        """The time since `add` was called last does not count."""
        self._since = now if self._since is None else self._since + now - self._at
        self._at = now

    def add(self, now: float, count: int = 1) -> None:
        self._weight = self.recent(now) + count
        self._at = now

    def recent(self, now: float) -> float:
        """Events in `window_s`."""
        return self._weight * exp((self._at - now) / MEMORY_S)

    def known_s(self, now: float) -> float:
        return now - self._since if self._since is not None else 0.0

    def window_s(self, now: float) -> float:
        """What is measured in less than a second is believed for a second."""
        return MEMORY_S * (1.0 - exp(-max(self.known_s(now), 1.0) / MEMORY_S))


class Turnover:
    """Two rates: at which sequences end, while there are any, and at which they leave the queue, while some stay in it."""

    def __init__(self) -> None:
        self._ends = Rate()
        self._moves = Rate()
        self._stuck = False  # some had to stay in the queue
        self._promised_until = 0.0

    def begins(self, now: float) -> None:
        """After a time without sequences."""
        self._ends.begins(now)

    def ended(self, now: float) -> None:
        self._ends.add(now)

    def moved(self, now: float, count: int, *, left: int) -> None:
        """So many have left the queue for a place in a step, and no more could: `left` are in it."""
        if self._stuck:
            self._moves.add(now, count)
        if left and not self._stuck:
            self._moves.begins(now)
        self._stuck = left > 0

    def turn_s(self, now: float) -> float:
        """Seconds until there is likely to be a place for one more that finds none now. A promise: the next one to ask
        is told a later time. Told the same, all would come back at once, and most of them in vain."""
        ends = max(self._ends.recent(now), 1.0)  # the first end is expected to take as long again as it has taken
        turn = max(self._promised_until, now) + self._ends.window_s(now) / ends / PROMISED
        self._promised_until = min(turn, now + LONGEST_WAIT_S)
        return _bounded(self._promised_until - now)

    def drain_s(self, num_queued: int, now: float) -> float | None:
        """Seconds until so many will have left the queue; None while nobody has to stay in it, or too little is known."""
        moves = self._moves.recent(now)
        if not self._stuck or moves < KNOWN or self._moves.known_s(now) < KNOWN_S:
            return None
        return num_queued * self._moves.window_s(now) / moves

    def shorter_s(self, num_queued: int, waited_s: float, now: float) -> float:
        """When to come again for who will not wait for longer than `waited_s`: the queue is likely to take no longer
        then."""
        drain_s = self.drain_s(num_queued, now)
        return _bounded(waited_s if drain_s is None else drain_s - waited_s)


def _bounded(wait_s: float) -> float:
    return min(max(wait_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)
