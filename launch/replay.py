"""`quire replay`: runs the scheduler again on what a journal has, on no device, and compares what it decides."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from ..common.errors import ConfigError
from ..common.messages import unpack
from ..scheduler import journal, snapshot
from ..scheduler.journal import Entry
from ..scheduler.journal_file import Header, Reader
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from ..scheduler.step import Step
from .arguments import Parser
from .component import told

DIFFERENT = 2  # exit code
SHOWN_ROWS = 40
PROGRESS_S = 0.5

DESCRIPTION = """\
Run the scheduler again from a journal, on no device, and compare each plan with the one that was made then.
The journal is what a scheduler writes when a bug ends it, or `quire journal` when you ask for it."""

EXAMPLES = """\
Exit code 0 when every plan is the same, 2 when one is not or a call raises what it did not raise then.

    quire replay journal-1786000000.quire              does it decide as it did?
    quire replay journal-1786000000.quire --print      one line for each plan
    quire replay journal-1786000000.quire --step 812   what ran, waited and was planned there"""


class Stop(Exception):
    """As far as was asked for."""


@dataclass(slots=True)
class Difference:
    """The first that was found, and where."""

    plan: int
    why: str


@dataclass(slots=True)
class Replay:
    """Feeds records to a scheduler. `watch` is called behind each plan. `plan` counts the plans of the journal, from 1."""

    watch: Callable[["Replay", Step, float], None] | None = None
    check: bool = False  # the scheduler's books, behind each call
    scheduler: Scheduler | None = None
    plan: int = 0
    began_at: float | None = None
    difference: Difference | None = None
    raised: str = ""  # by the last call, as it did then
    skipped: int = 0  # records before the first state
    _live: dict[int, Request] = field(default_factory=dict)

    def run(self, entries: Iterator[Entry]) -> None:
        """Until the end, the first difference, or a call that raises."""
        ahead = chain(entries, [None])
        entry = next(ahead)
        for following in ahead:
            assert entry is not None
            if self.difference is None and not self.raised:
                self._take(entry, following)
            entry = following

    def _take(self, entry: Entry, following: Entry | None) -> None:
        if isinstance(entry, journal.Began):
            self._begin(entry)
        elif self.scheduler is None:
            self.skipped += 1
        elif isinstance(entry, journal.Raised) and entry.call != "schedule":
            self._differ(f"{entry.call} raised {entry.why} then, and does not now")
        else:
            self._call(self.scheduler, entry, following)

    def _begin(self, entry: journal.Began) -> None:
        if not entry.state:  # the records go on behind those before
            return
        try:
            objects = snapshot.load(snapshot.decode(entry.state))
        except snapshot.Damaged as error:
            raise ConfigError(f"its state at {_time(entry.at)} cannot be read: {error}") from None
        self.began_at = entry.at if self.began_at is None else self.began_at
        self.scheduler = objects[0]
        self._live = {thing.arrival: thing for thing in objects if type(thing) is Request}

    def _call(self, scheduler: Scheduler, entry: Entry, following: Entry | None) -> None:
        then = (
            entry if isinstance(entry, journal.Raised) else following if isinstance(following, journal.Raised) else None
        )
        try:
            self._repeat(scheduler, entry)
            if self.check and not isinstance(entry, journal.Blamed):  # that is half of what follows a loss
                scheduler.check()
        except Stop:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a bug raises is what is looked for)
            now = f"{type(error).__name__}: {error}"
            if then is None or then.why.partition(":")[0] != type(error).__name__:  # texts may hold addresses
                self._differ(f"{type(entry).__name__}: raises {now}{f'; then it was {then.why}' if then else ''}")
            else:
                self.raised = now
            return
        if isinstance(entry, journal.Raised):
            self._differ(f"schedule raised {entry.why} then, and does not now")

    def _repeat(self, scheduler: Scheduler, entry: Entry) -> None:
        match entry:
            case journal.Added(state=state):
                request: Request = snapshot.load(snapshot.decode(state))[0]
                scheduler.add(request)
                self._live[request.arrival] = request
            case journal.Aborted(arrival):
                scheduler.abort(self._live.pop(arrival))
            case journal.Expired(arrival, why):
                scheduler.expire(self._live.pop(arrival), why)
            case journal.Planned():
                self._compare(entry, scheduler.schedule())
            case journal.NotPlanned(count):
                for _ in range(count):
                    if (step := scheduler.schedule()) is not None:
                        self._differ(f"{_told(step)}; then nothing was planned")
                        return
            case journal.Answered(result=result):
                for request, output in scheduler.update(result):
                    if output.finish is not None:
                        self._live.pop(request.arrival, None)
            case _:
                _repeat_rare(scheduler, entry)

    def _compare(self, then: journal.Planned, step: Step | None) -> None:
        self.plan += 1
        planned = f"step {then.step} of {then.num_rows} rows and {then.num_tokens} tokens"
        if step is None:
            self._differ(f"nothing is planned; then it was {planned}")
        elif journal.digest(step.plan) != then.digest:
            self._differ(f"{_told(step)}; then it was {planned}")
        if step is not None and self.watch is not None:
            self.watch(self, step, then.at)

    def _differ(self, why: str) -> None:
        self.difference = self.difference or Difference(self.plan, why)


def _repeat_rare(scheduler: Scheduler, entry: Entry) -> None:
    match entry:
        case journal.Faulted(step, row, why):
            scheduler.fault(step, row, why)
        case journal.Unpinned(ids, why):
            scheduler.unpin(ids, why)
        case journal.Shrunk():
            scheduler.shrink()
        case journal.Blamed():
            scheduler.blame()
        case journal.Regrouped(epoch=epoch):
            scheduler.regroup(epoch)
        case journal.Raised():
            scheduler.schedule()


# --- in words ---------------------------------------------------------------------------------------------------------


def _told(step: Step) -> str:
    return f"step {step.plan.step} of {len(step.requests)} rows and {step.num_tokens} tokens"


def _time(at: float) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}.{int(at % 1 * 1000):03}"


def line(replay: Replay, step: Step, at: float) -> str:
    """A plan in one line."""
    scheduler = replay.scheduler
    assert scheduler is not None
    plan, kv = step.plan, scheduler.kv
    parts = [
        f"{replay.plan:>8}  {_time(at)}  step {plan.epoch}/{plan.step}",
        f"{len(step.requests)} rows, {step.num_tokens} tokens, {len(step.sampled)} samples",
        f"{len(plan.admitted)} admitted" if plan.admitted else "",
        f"{step.num_preempted} preempted" if step.num_preempted else "",
        f"{len(plan.released)} released" if plan.released else "",
        f"{len(plan.copies) // 8} copies" if plan.copies else "",
        "a suspect, alone" if step.alone else "",
        f"{len(scheduler.running)} run, {len(scheduler.waiting)} wait",
        f"KV {kv.num_blocks - kv.num_free}/{kv.num_blocks}",
    ]
    return ", ".join(part for part in parts if part)


def scene(replay: Replay, step: Step, at: float) -> str:
    """All about a plan: what each row computes, what waits, what is in flight."""
    scheduler = replay.scheduler
    assert scheduler is not None
    starts, counts, samples = unpack(step.plan.starts), unpack(step.plan.counts), step.plan.samples
    admitted = {admitted.row: admitted for admitted in step.plan.admitted}
    rows = []
    for request, row, start, count, sampled in zip(
        step.requests, unpack(step.plan.rows), starts, counts, samples, strict=True
    ):
        new = f"; admitted, {request.num_cached or 0} tokens cached" if row in admitted else ""
        what = "decodes" if sampled and count == 1 else "prefills" if not sampled else "prefills to its end"
        rows.append(f"row {row}: {what} [{start}, {start + count}) of {_request(request)}{new}")
    waiting = [_request(request) for request in sorted(scheduler.waiting, key=lambda request: request.rank)]
    planned = set(map(id, step.requests))
    resting = [_request(request) for request in scheduler.running if id(request) not in planned]
    lines = [line(replay, step, at)]
    for title, entries in (
        ("computes", rows),
        ("holds a row, not in this step", resting),
        ("waits, in order", waiting),
    ):
        lines += [f"{title} ({len(entries)}):"] if entries else []
        lines += [f"    {entry}" for entry in entries[:SHOWN_ROWS]]
        lines += [f"    ... and {len(entries) - SHOWN_ROWS} more"] if len(entries) > SHOWN_ROWS else []
    flight = ", ".join(f"{s.plan.step} ({len(s.requests)} rows)" for s in scheduler.dispatched)
    return "\n".join([*lines, f"in flight: steps {flight}", f"budget: {scheduler.budget} tokens a step"])


def _request(request: Request) -> str:
    words = [
        f"request {request.arrival} (id {request.id}, {request.num_prompt} prompt + {request.num_output} output tokens",
        f"of {request.limit}",
        f"priority {request.priority}" if request.priority else "",
        f"tenant {request.tenant}" if request.tenant else "",
        f"{len(request.blocks)} blocks" if request.blocks else "",
        f"{request.strikes} strikes" if request.strikes else "",
    ]
    return ", ".join(word for word in words if word) + ")"


def about(header: Header) -> str:
    kept = "token ids replaced" if header.redacted else "with the prompts and outputs themselves"
    return (
        f"{header.model} on {header.host}, written {_time(header.written_at)} ({header.why}); {kept}"
        f"{'; its beginning is lost' if header.lost else ''}"
    )


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, *, prog: str = "quire replay") -> int:
    parser = Parser(prog, DESCRIPTION, EXAMPLES, usage="FILE [OPTION ...]")
    parser.add_argument("file", metavar="FILE", type=Path, help="A journal.")
    parser.add_argument("--print", action="store_true", help="One line for each plan.")
    parser.add_argument("--step", metavar="N", type=int, help="Show everything at the Nth plan of the journal.")
    parser.add_argument("--until", metavar="N", type=int, help="Stop behind the Nth plan of the journal.")
    parser.add_argument("--check", action="store_true", help="Check the scheduler's books behind each call; slow.")
    try:
        values = parser.read(sys.argv[1:] if argv is None else argv)
        reader = Reader(values.file)
        print(about(reader.header))
        if reader.header.python != (here := "{}.{}".format(*sys.version_info)):
            print(
                f"note: written by Python {reader.header.python}, this is {here}: sums of floats may differ",
                file=sys.stderr,
            )
        return replay(reader, values)
    except ConfigError as error:
        return told(error)


def replay(reader: Reader, values: Namespace) -> int:
    last = values.until if values.until is not None else values.step
    progress = _Progress(reader)

    def watch(replay: Replay, step: Step, at: float) -> None:
        if values.step == replay.plan:
            print(scene(replay, step, at))
        elif values.print:
            print(line(replay, step, at))
        if last is not None and replay.plan >= last and replay.difference is None:
            raise Stop
        progress.show(replay.plan)

    run = Replay(watch, values.check)
    try:
        run.run(reader.entries())
    except Stop:
        print(f"the same up to plan {run.plan}")
        return 0
    finally:
        progress.end()
        reader.close()
    if run.scheduler is None:
        raise ConfigError(
            f"{values.file}: there is no state to begin from in its {run.skipped} records: it was too large for"
            " --journal-size"
        )
    if values.step is not None and values.step > run.plan and run.difference is None:
        raise ConfigError(f"--step {values.step}: there are {run.plan} plans")
    return report(run)


def report(run: Replay) -> int:
    since = f" since {_time(run.began_at)}" if run.began_at is not None else ""
    behind = f" ({run.skipped} records before had no state to begin from)" if run.skipped else ""
    if run.difference is not None:
        print(f"DIFFERENT behind plan {run.difference.plan}{since}: {run.difference.why}")
        return DIFFERENT
    print(f"the same: {run.plan} plans{since}{behind}")
    if run.raised:
        print(f"and the last call raised the same: {run.raised}")
    return 0


class _Progress:
    """On a terminal, how far it is."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._shown = False
        self._at = time.monotonic()

    def show(self, plan: int) -> None:
        if plan % 256 == 0 and sys.stderr.isatty() and time.monotonic() - self._at > PROGRESS_S:
            self._at, self._shown = time.monotonic(), True
            print(f"\r{self._reader.progress:6.1%}, plan {plan}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown:
            print(file=sys.stderr)
