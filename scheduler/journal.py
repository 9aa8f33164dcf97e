"""What a scheduler was told and what it decided, so that it can be run again without any device (`quire replay`).

`Journaled` is a `Scheduler` that notes each call that changes it, in order: the core has neither clock nor chance, so
from the same state the same calls lead to the same plans. Of a plan its digest is noted, which is enough to compare.

A journal is bounded, so it forgets its beginning. It is made of segments, each of which begins with the state
(`snapshot`) that its first call met: when one is full, another begins, and the oldest is dropped for it. A state is
saved at an idle moment where there is one; under a load that never ends, in the middle of it, with all that runs. One
that is larger than a quarter of the journal is left out, and the journal says so: such a segment can be replayed
only behind the one before it.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import msgspec
from msgspec import Struct

from ..common.messages import Output, StepPlan, StepResult
from . import snapshot
from .request import Request
from .scheduler import Scheduler
from .step import Step

log = logging.getLogger(__name__)

ENTRY_BYTES = 160  # of memory that the smallest record takes, with what holds it
DIGEST_BYTES = 80  # of memory that the name of a block takes
_encoder = msgspec.msgpack.Encoder()


class Record(Struct, tag=True, array_like=True, frozen=True, gc=False):
    """Base of all that is noted. Times are seconds since 1970; requests go by their arrival."""


class Began(Record, frozen=True):
    """A segment begins: with a state, or where the last one ended when there is none."""

    at: float
    state: bytes
    why: str = ""  # there is none


class Added(Record, frozen=True):
    at: float
    state: bytes  # of the request


class Aborted(Record, frozen=True):
    arrival: int


class Expired(Record, frozen=True):
    arrival: int
    why: str


class Unpinned(Record, frozen=True):
    ids: list[int]
    why: str


class Planned(Record, frozen=True):
    at: float
    step: int
    digest: int
    num_rows: int
    num_tokens: int


class NotPlanned(Record, frozen=True):
    """So often in a row `schedule` found nothing to do."""

    count: int


class Answered(Record, frozen=True):
    at: float
    result: StepResult


class Faulted(Record, frozen=True):
    step: int
    row: int
    why: str


class Shrunk(Record, frozen=True):
    pass


class Blamed(Record, frozen=True):
    pass


class Regrouped(Record, frozen=True):
    at: float
    epoch: int


class Raised(Record, frozen=True):
    """The call before this did not return; of `schedule`, which is noted when it does, this is the call."""

    call: str
    why: str


Entry = (
    Began
    | Added
    | Aborted
    | Expired
    | Unpinned
    | Planned
    | NotPlanned
    | Answered
    | Faulted
    | Shrunk
    | Blamed
    | Regrouped
    | Raised
)


def digest(plan: StepPlan) -> int:
    """Of what a plan decides. Not of token ids and sampling, which come from elsewhere: a journal may replace them."""
    head = [(a.row, a.num_prompt, len(a.tokens), a.blocks) for a in plan.admitted] if plan.admitted else ()
    value = crc32(_encoder.encode((plan.epoch, plan.step, plan.released, head, plan.new_blocks)))
    return crc32(plan.samples, crc32(plan.copies, crc32(plan.counts, crc32(plan.starts, crc32(plan.rows, value)))))


@dataclass(slots=True)
class Segment:
    """`requests` are those that its records speak of: what was named since is asked of them when it is written."""

    records: list[Entry]
    requests: list[Request] = field(default_factory=list)
    num_bytes: int = 0


class Journal:
    """The last `size` bytes of a scheduler's life. `clock` says the time of day."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self.size = size
        self.clock = clock
        self.segments: deque[Segment] = deque()
        self.stale = True  # the state has changed otherwise than by what was noted
        self.num_dropped = 0  # segments
        self.num_stateless = 0
        self.vain = 0  # calls of `schedule` that found nothing, and are not noted yet
        self._current = Segment([])

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)

    @property
    def full(self) -> bool:
        """Whether the segment is."""
        return self._current.num_bytes > self.size // 3

    @property
    def worth_ending(self) -> bool:
        """Whether the segment may end early, where a state is small."""
        return self._current.num_bytes > self.size // 8

    def begin(self, scheduler: Scheduler) -> None:
        """Begin another segment, with the scheduler as it is."""
        self._settle()
        self.stale = self.stale and bool(self.segments)
        state, why = b"", ""
        try:
            nodes = snapshot.save(scheduler, as_class=Scheduler, without=frozenset({"journal"}))
            state = snapshot.encode(nodes)
        except snapshot.Unsavable as error:
            why = f"the state cannot be saved: {error}"
        if len(state) > self.size // 4:
            why = f"the state takes {len(state) >> 10} KiB, --journal-size is {self.size >> 10} KiB"
            state = b""
        if why:
            self.num_stateless += 1
            if self.num_stateless.bit_count() == 1:  # the 1st, 2nd, 4th, ...
                log.warning("part of the journal can be replayed only behind the part before it: %s", why)
        self._current = Segment([Began(self.clock(), state, why)], [*scheduler.running, *scheduler.waiting])
        self._current.num_bytes = len(state) + ENTRY_BYTES
        self.segments.append(self._current)
        self._forget()

    def note(self, record: Entry, num_bytes: int = ENTRY_BYTES) -> None:
        if self.vain:
            self._settle()
        self._current.records.append(record)
        self._current.num_bytes += num_bytes

    def request(self, request: Request) -> None:
        """One that records speak of from now on."""
        self._current.requests.append(request)

    def records(self) -> list[tuple[list[Entry], list[Request]]]:
        """A copy, by segment, that does not change any more."""
        self._settle()
        return [(segment.records[:], segment.requests[:]) for segment in self.segments]

    def _settle(self) -> None:
        count, self.vain = self.vain, 0
        if count:
            self.note(NotPlanned(count))

    def _forget(self) -> None:
        while len(self.segments) > 1 and self.num_bytes + self.size // 3 > self.size:
            self.segments.popleft()
            self.num_dropped += 1


class Journaled(Scheduler):
    """A scheduler that notes what it is told and what it decides."""

    def __init__(self, *args: Any, journal: Journal, **options: Any) -> None:
        super().__init__(*args, **options)
        self.journal = journal

    def add(self, request: Request) -> Output | None:
        journal = self.journal
        if journal.full or not journal.segments:
            journal.begin(self)
        state = snapshot.encode(snapshot.save(request))
        kept = len(request.tokens) * (request.tokens.itemsize + DIGEST_BYTES // self.kv.block_size)
        journal.note(Added(journal.clock(), state), ENTRY_BYTES + len(state) + kept)
        journal.request(request)
        return super().add(request)

    def abort(self, request: Request) -> None:
        if request.finish is None:
            self.journal.note(Aborted(request.arrival))
        super().abort(request)

    def expire(self, request: Request, why: str) -> Output:
        self.journal.note(Expired(request.arrival, why))
        return super().expire(request, why)

    def unpin(self, ids: Sequence[int], why: str) -> None:
        self.journal.note(Unpinned(list(ids), why), ENTRY_BYTES + 8 * len(ids))
        super().unpin(ids, why)

    def schedule(self) -> Step | None:
        journal = self.journal
        if journal.stale or journal.full:
            journal.begin(self)
            journal.stale = False
        try:
            step = super().schedule()
        except Exception as error:
            self._raised("schedule", error)
            raise
        if step is None:
            journal.vain += 1
            if journal.worth_ending and self.idle:
                journal.begin(self)
            return None
        plan = step.plan
        journal.note(Planned(journal.clock(), plan.step, digest(plan), len(step.requests), step.num_tokens))
        return step

    def update(self, result: StepResult) -> list[tuple[Request, Output]]:
        journal = self.journal
        # Its tokens are in the requests, too, which the journal holds longer than others do, with the names of blocks.
        size = ENTRY_BYTES + len(result.counts) + 4 * len(result.tokens) + 2 * len(result.best_ids)
        journal.note(Answered(journal.clock(), result), size)
        try:
            return super().update(result)
        except Exception as error:
            self._raised("update", error)
            raise

    def fault(self, step_number: int, row: int, why: str) -> tuple[Request, Output] | None:
        self.journal.note(Faulted(step_number, row, why))
        return super().fault(step_number, row, why)

    def shrink(self) -> bool:
        self.journal.note(Shrunk())
        return super().shrink()

    def blame(self) -> list[Request]:
        self.journal.note(Blamed())
        return super().blame()

    def regroup(self, epoch: int) -> list[tuple[Request, Output]]:
        journal = self.journal
        journal.note(Regrouped(journal.clock(), epoch))
        journal.stale = True  # the next group may be told other things of its memory
        return super().regroup(epoch)

    def _raised(self, call: str, error: Exception) -> None:
        self.journal.note(Raised(call, f"{type(error).__name__}: {error}"))
