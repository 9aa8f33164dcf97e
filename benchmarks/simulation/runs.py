"""Simulated experiments: one trace through several policies, a flood, how many replicas, memory over a million."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from .fleet import Fleet, Planned, Replica
from .measures import Measures, fairness, first_tokens
from .picture import quantiles
from .policies import Choice, Machine, setup
from .router import ROUTERS, Router
from .work import Arrival, Job, Mix, arrivals, together

Progress = Callable[[float], None]

FLOODER = "flood"
WARM_UP = 0.25  # of the time; what arrives then is not counted
SATURATION_S = 400.0
SATURATED = 0.8  # of what is offered ends: there is more than the device can do


@dataclass(frozen=True)
class Trial:
    """Everything of a run but the policy and the trace."""

    machine: Machine
    choice: Choice
    seconds: float  # of arrivals
    replicas: int = 1
    router: str = "affinity"
    warm_up: float = WARM_UP

    def run(
        self,
        policy: str,
        trace: Iterator[Arrival],
        *,
        tenants: Sequence[str] = (),
        progress: Progress = lambda _: None,
        until: float = math.inf,
    ) -> Measures:
        measures = Measures(self.warm_up * self.seconds, self.seconds, tenants=tenants)
        router: Router = ROUTERS[self.router]()
        Fleet(setup(policy, self.machine, self.choice), router, measures, self.replicas).run(trace, progress, until)
        return measures


def capacity(machine: Machine, mix: Mix, seed: int, progress: Progress = lambda _: None) -> float:
    """Requests a second that one replica finishes when there is always more to do, with vLLM's defaults: large steps and
    as many sequences as fit, whatever that does to anybody's latency."""
    trial = Trial(machine, Choice(), SATURATION_S, warm_up=0.5)
    offered = 45_000 / (mix.mean_prompt + mix.prefix_tokens + mix.output.mean)  # 45,000: prefill alone
    while True:
        trace = arrivals(mix, offered, SATURATION_S, seed)
        measures = trial.run("vllm", trace, progress=progress, until=SATURATION_S)
        found = measures.ends / (measures.end - measures.start)
        if found > SATURATED * offered * mix.turns:
            offered *= 2
        elif found < offered * mix.turns / 4:  # most of the time went to those who will not end within it
            offered = 2 * found / mix.turns
        else:
            return found


def flood(
    trial: Trial, policy: str, mix: Mix, rate: float, flooding: float, seed: int, progress: Progress
) -> dict[str, Any]:
    """The same requests of several tenants without and with another one that sends `flooding` times as many as all of
    them, and then four times their requests, so that everybody has to wait. Figures are the others'."""
    found: dict[str, Any] = {}
    for name, own, extra in (("alone", 1.0, 0.0), ("with the flood", 1.0, flooding), ("all too many", 4.0, flooding)):
        streams = [arrivals(mix, own * rate, trial.seconds, seed)]
        tenants = list(mix.tenants)
        if extra:
            streams.append(arrivals(replace(mix, tenants=(FLOODER,)), extra * rate, trial.seconds, seed + 1))
            tenants.append(FLOODER)
        measures = trial.run(policy, together(*streams), tenants=tenants, progress=progress, until=2 * trial.seconds)
        others = [record for record in measures.records if record.tenant != FLOODER]
        found[name] = {
            "requests": sum(
                trial.warm_up * trial.seconds <= job.at for job in arrivals(mix, own * rate, trial.seconds, seed)
            ),
            "served": sum(record.ttft_s is not None for record in others),
            **first_tokens(others),
            "TTFT curve": quantiles([record.ttft_s for record in others if record.ttft_s is not None], 1),
            "fairness": fairness(measures.samples, tenants),
        }
    alone, flooded = (found[name]["TTFT s"].get("p99") for name in ("alone", "with the flood"))
    found["p99 TTFT, times alone"] = round(flooded / alone, 2) if alone and flooded else None
    return found


def replicas_for(
    attained: Callable[[int], float], share: float, told: Callable[[int, float], None], most: int = 1024
) -> int | None:
    """The smallest number for which `attained` gives `share`; more must not give less. None when `most` do not do."""

    def enough(number: int) -> bool:
        found = attained(number)
        told(number, found)
        return found >= share

    high = 1
    while not enough(high):
        high *= 2
        if high > most:
            return None
    low = high // 2  # too few
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


class Footprint:
    """A watch that keeps nothing of what it is told, but the memory of the process now and then."""

    def __init__(self, every: int, told: Callable[[int, float], None]) -> None:
        self.samples: list[tuple[int, int]] = []  # requests ended, bytes
        self.ended_total = self.tokens = 0
        self._every, self._told = every, told
        self._process = psutil.Process()

    def arrived(self, job: Job, now: float) -> None: ...

    def planned(self, replica: Replica, step: Planned, used: int, took_s: float, now: float) -> None: ...

    def ended(self, job: Job, how: str, now: float) -> None:  # noqa: ARG002
        self.ended_total += 1
        self.tokens += job.num_output
        if self.ended_total % self._every == 0:
            gc.collect()
            used = self._process.memory_full_info().uss
            self.samples.append((self.ended_total, used))
            self._told(self.ended_total, used)

    @property
    def growth(self) -> float:
        """Bytes a request, between the medians of the second and the last quarter."""
        quarter = len(self.samples) // 4
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        middle = quarter // 2
        requests = late[middle][0] - early[middle][0]
        return (sorted(b for _, b in late)[middle] - sorted(b for _, b in early)[middle]) / requests


def footprint(
    machine: Machine, choice: Choice, mix: Mix, requests: int, rate: float, seed: int, watch: Footprint
) -> Fleet:
    fleet = Fleet(setup("quire", machine, choice), ROUTERS["round-robin"](), watch)
    fleet.run(_first(arrivals(mix, rate, float("inf"), seed), requests))
    return fleet


def _first(stream: Iterator[Arrival], number: int) -> Iterator[Arrival]:
    for _ in range(number):
        yield next(stream)
