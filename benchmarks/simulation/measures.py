"""What is read off a simulated run, and how much of it held the objective."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.common.messages import unpack

from .fleet import Planned, Policy, Replica
from .work import Job

PERCENTILES = (50, 90, 99)
SERVED = ("stop", "length")
LONG = 8192  # tokens


@dataclass(frozen=True)
class Objective:
    """A request is good when its first token comes within `ttft_s` (and `ttft_per_1k_s` more for each 1,000 tokens of
    its prompt), and 99 % of its tokens within `itl_s` of the one before."""

    ttft_s: float = 2.0
    itl_s: float = 0.05
    ttft_per_1k_s: float = 0.0

    def holds(self, record: "Record") -> bool:
        if record.how not in SERVED or record.ttft_s is None:
            return False
        within = self.ttft_s + self.ttft_per_1k_s * record.prompt / 1000
        return record.ttft_s <= within and record.gap_p99_s <= self.itl_s


@dataclass(slots=True)
class Record:
    """One request."""

    arrived_at: float
    tenant: str
    how: str
    prompt: int
    output: int
    queued_s: float | None  # until its first chunk was planned
    ttft_s: float | None
    gap_p99_s: float


@dataclass(slots=True)
class Sample:
    """Of one replica, at a moment. Slots are tokens of KV."""

    at: float
    running: int
    waiting: int
    use: float  # share of the blocks that are held
    held: int  # slots
    unfilled: int  # held slots whose KV is not planned yet
    unknown: int  # those of them for which there is no token yet
    backlogged: frozenset[str] = frozenset()  # tenants that have somebody waiting
    service: Mapping[str, int] = field(default_factory=dict)  # tokens computed for each tenant so far


class Measures:
    """Listens to a fleet. Figures are of [`start`, `end`): requests that arrive then, steps that are planned then."""

    def __init__(self, start: float, end: float, *, tick_s: float = 0.25, tenants: Iterable[str] = ()) -> None:
        self.start, self.end, self.tick_s = start, end, tick_s
        self.tenants = frozenset(tenants)  # whose service is counted
        self.records: list[Record] = []
        self.gaps = array("f")
        self.samples: list[Sample] = []
        self.num_tokens = 0  # output, in the window
        self.ends = 0
        self.steps = 0
        self.busy_s = 0.0
        self.preempted = 0
        self.first_preemption: float | None = None  # share of the blocks held right before
        self.peak = 0.0  # share of the blocks held, before that
        self.saved = self.restored = 0  # blocks copied from the device and to it
        self._planned = self._needed = 0  # tokens, of the whole run
        self._ticks: dict[int, float] = defaultdict(lambda: start)
        self._service: Counter[str] = Counter()

    def arrived(self, job: Job, now: float) -> None: ...

    def planned(self, replica: Replica, step: Planned, used: int, took_s: float, now: float) -> None:
        self._planned += step.num_tokens
        for request in step.admitted:
            assert isinstance(request, Job)
            request.begun_at = now
        use = used / replica.policy.kv.num_blocks
        if self.first_preemption is None:
            if step.num_preempted:
                self.first_preemption = use
            else:
                self.peak = max(self.peak, use)
        if self.tenants:
            for request, count in zip(step.requests, unpack(step.plan.counts), strict=True):
                self._service[request.tenant] += count
        if self.start <= now < self.end:
            self.steps += 1
            self.busy_s += took_s
            self.preempted += step.num_preempted
            for source, target in pairs(unpack(step.plan.copies)):
                self.saved += source <= replica.policy.kv.num_blocks < target
                self.restored += target <= replica.policy.kv.num_blocks < source
            if now >= self._ticks[replica.index]:
                self._ticks[replica.index] = now + self.tick_s
                backlogged = frozenset(job.tenant for job in replica.policy.waiting) if self.tenants else frozenset()
                service = dict(self._service) if self.tenants else {}
                self.samples.append(sample(replica.policy, replica.setup.block_size, now, backlogged, service))

    def ended(self, job: Job, how: str, now: float) -> None:
        times = np.frombuffer(job.times)
        if len(times):
            self._needed += len(job.tokens) - 1 + job.inflight - (job.num_cached or 0)
        self.num_tokens += int(((times >= self.start) & (times < self.end)).sum())
        self.ends += how in SERVED and self.start <= now < self.end
        if not self.start <= job.arrived_at < self.end:
            return
        gaps = np.diff(times)
        self.gaps.frombytes(gaps[times[1:] < self.end].astype(np.float32).tobytes())
        worst = float(np.sort(gaps)[-1 - len(gaps) // 100]) if len(gaps) else 0.0
        ttft_s = float(times[0]) - job.arrived_at if len(times) else None
        queued_s = None if job.begun_at is None else job.begun_at - job.arrived_at
        self.records.append(
            Record(job.arrived_at, job.tenant, how, job.num_prompt, len(times), queued_s, ttft_s, worst)
        )

    @property
    def recomputed(self) -> int:
        """Tokens whose KV was computed more than once, in the whole run."""
        return self._planned - self._needed

    def report(self, objective: Objective, replicas: int, block_size: int) -> dict[str, Any]:
        """Figures under the names that readers see."""
        seconds = self.end - self.start
        good = [record for record in self.records if objective.holds(record)]
        hows = Counter(record.how for record in self.records)
        served = sum(hows[how] for how in SERVED)
        itl = percentiles(self.gaps)
        return {
            "requests": len(self.records),
            "requests/s": round(len(self.records) / seconds, 3),
            "served": served,
            "not served": {how: number for how, number in hows.items() if how not in SERVED},
            "output tokens/s": round(self.num_tokens / seconds),
            "finished/s": round(self.ends / seconds, 3),
            "goodput/s": round(len(good) / seconds, 3),
            "good share": round(len(good) / max(len(self.records), 1), 4),
            "by prompt": {
                name: self._class(long, objective) for name, long in (("below 8k", False), ("from 8k", True))
            },
            **first_tokens(self.records),
            "inter-token ms": {name: round(1000 * value, 2) for name, value in itl.items()},
            "inter-token p99/p50": round(itl["p99"] / itl["p50"], 2) if itl.get("p50") else None,
            "steps/s": round(self.steps / seconds / replicas, 1),
            "device busy": round(self.busy_s / seconds / replicas, 4),
            **self._kv(block_size),
            **({"fairness": fairness(self.samples, self.tenants)} if self.tenants else {}),
        }

    def _class(self, long: bool, objective: Objective) -> dict[str, int]:
        """Of one kind of prompts, since a policy may give up one for the other."""
        records = [record for record in self.records if (record.prompt >= LONG) == long]
        return {
            "requests": len(records),
            "served": sum(record.how in SERVED for record in records),
            "good": sum(map(objective.holds, records)),
        }

    def _kv(self, block_size: int) -> dict[str, Any]:
        held = sum(sample.held for sample in self.samples) or 1
        return {
            "KV use": round(_mean([sample.use for sample in self.samples]), 4),
            "KV waste": round(sum(sample.unknown for sample in self.samples) / held, 4),
            "KV not filled yet": round(sum(sample.unfilled - sample.unknown for sample in self.samples) / held, 4),
            "KV use before the first preemption": None
            if self.first_preemption is None
            else round(self.first_preemption, 4),
            "highest KV use without preemption": round(self.peak, 4),
            "preemptions": self.preempted,
            "recomputed blocks": round(self.recomputed / block_size),
            "saved blocks": self.saved,
            "restored blocks": self.restored,
        }


def first_tokens(records: Sequence[Record]) -> dict[str, Any]:
    """Time to the first token of those that got one, and what of it was waiting."""
    served = [(r.prompt, r.queued_s or 0.0, r.ttft_s) for r in records if r.ttft_s is not None]
    return {
        "TTFT s": percentiles([ttft for _, _, ttft in served]),
        "queued s": percentiles([queued for _, queued, _ in served]),
        "TTFT s, prompts below 8k": percentiles([ttft for prompt, _, ttft in served if prompt < LONG]),
        "TTFT s, prompts from 8k": percentiles([ttft for prompt, _, ttft in served if prompt >= LONG]),
    }


def sample(
    policy: Policy, block_size: int, now: float, backlogged: frozenset[str], service: Mapping[str, int]
) -> Sample:
    unfilled = unknown = 0
    for request in policy.running:
        slots = len(request.blocks) * block_size
        unfilled += slots - min(request.computed, slots)
        unknown += slots - min(max(request.computed, len(request.tokens) + request.inflight), slots)
    kv = policy.kv
    held = kv.num_blocks - kv.num_free
    waiting = len(policy.waiting)
    return Sample(
        now,
        len(policy.running),
        waiting,
        held / kv.num_blocks,
        held * block_size,
        unfilled,
        unknown,
        backlogged,
        service,
    )


def fairness(samples: Sequence[Sample], tenants: Iterable[str]) -> dict[str, Any]:
    """Tokens that were computed for one tenant against those for another while both had somebody waiting, of the pair
    for which they differ most. Of little meaning unless that was for long."""
    names = sorted(tenants)
    worst, seconds = 1.0, 0.0
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            of_one = of_other = 0
            lasted = 0.0
            for before, after in pairwise(samples):
                if {one, other} <= before.backlogged & after.backlogged:
                    of_one += after.service.get(one, 0) - before.service.get(one, 0)
                    of_other += after.service.get(other, 0) - before.service.get(other, 0)
                    lasted += after.at - before.at
            if lasted > 0:
                seconds = max(seconds, lasted)
                worst = max(worst, max(of_one, of_other) / max(min(of_one, of_other), 1))
    return {"max/min service": round(worst, 2), "seconds backlogged": round(seconds, 1)}


def percentiles(values: "Sequence[float] | array[float]") -> dict[str, float]:
    if not len(values):
        return {}
    numbers: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    found = np.percentile(numbers, PERCENTILES)
    return {f"p{name}": round(float(value), 5) for name, value in zip(PERCENTILES, found, strict=True)}


def pairs(values: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(values[::2], values[1::2], strict=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
