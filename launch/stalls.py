"""Which processes hang, judged by what the scheduler says and by its silence. Time is an argument; no effects."""

from dataclasses import dataclass

from ..common.messages import HEARTBEAT_S, Status

LONGEST_TURN_S = 2 * HEARTBEAT_S
STARTING_S = 30.0  # on a busy host a process takes long until it says its first word


class Awake:
    """Time that stands still while this process is stopped: a turn of its loop counts for `LONGEST_TURN_S` at most."""

    def __init__(self, now: float) -> None:
        self._turn_at = now
        self._away_s = 0.0

    def time(self, now: float) -> float:
        """To be asked in every turn."""
        self._away_s += max(0.0, now - self._turn_at - LONGEST_TURN_S)
        self._turn_at = now
        return now - self._away_s


@dataclass(frozen=True, slots=True)
class Silent:
    """The scheduler has not been heard for `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SchedulerHangs:
    why: str


@dataclass(frozen=True, slots=True)
class WorkersHang:
    why: str


class Watch:
    """A scheduler that is silent for `timeout_s` (at its start for STARTING_S) is told of, and hangs at twice that; the
    workers do when they have been stalled for `timeout_s` in the words of a scheduler that speaks.

    A verdict is given once; what hangs is to be ended then, and is judged anew.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._silence_s = max(timeout_s, LONGEST_TURN_S)  # it speaks once in HEARTBEAT_S
        self._heard_at: float | None = None  # or started; None: there is no scheduler
        self._speaks = False
        self._told = False
        self._stalled_at: float | None = None
        self._detail = ""

    def began(self, now: float) -> None:
        """A scheduler was started."""
        self._heard_at, self._speaks, self._told, self._stalled_at = now, False, False, None

    def ended(self) -> None:
        """There is no scheduler."""
        self._heard_at = None

    def heard(self, now: float) -> None:
        if self._heard_at is not None:
            self._heard_at, self._speaks, self._told = now, True, False

    def told(self, status: Status, now: float) -> None:
        if status.phase != "stalled":
            self._stalled_at = None
        elif self._stalled_at is None:
            self._stalled_at, self._detail = now, status.detail

    def verdict(self, now: float) -> Silent | SchedulerHangs | WorkersHang | None:
        if self._heard_at is None:
            return None
        silent_s = now - self._heard_at
        limit_s = self._silence_s if self._speaks else max(self._silence_s, STARTING_S)
        if silent_s >= 2 * limit_s:
            self.began(now)
            return SchedulerHangs(f"was silent for {silent_s:.0f} s and was killed")
        if silent_s >= limit_s and not self._told:
            self._told = True
            return Silent(silent_s)
        if self._stalled_at is None or silent_s >= LONGEST_TURN_S or now - self._stalled_at < self._timeout_s:
            return None
        self._stalled_at = now
        return WorkersHang(f"was killed, the engine being stalled: {self._detail}")
