"""What is asked of the engine: arrivals, drawn from a seed or read from a trace, and the requests they become.

Prompts are made of pieces; equal pieces in front are prefixes that replicas may share. How long an output will be is
known to the device alone: the scheduler sees a stop token when it comes, and a limit that is far away.
"""

import csv
import heapq
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np

from quire.common.sampling import SamplingParams
from quire.scheduler.request import Request

TOKEN, STOP = 1, 2  # of outputs
UNSHARED = 1 << 20  # pieces from here on are one request's own
MOONCAKE_BLOCK = 512  # tokens that one of a Mooncake trace's hash ids stands for

Piece = tuple[int, int]  # what it says, how many tokens of it


@dataclass(frozen=True, slots=True)
class Turn:
    """What follows in a conversation: so many tokens are added, so long after the answer."""

    prompt: int
    output: int
    think_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    pieces: tuple[Piece, ...]
    output: int
    tenant: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(slots=True, eq=False)
class Job(Request):
    """A request, and what its client sees of it."""

    output: int = 1  # tokens, the stop token included
    turns: tuple[Turn, ...] = ()
    replica: int = 0
    begun_at: float | None = None  # when it was first planned
    times: "array[float]" = field(default_factory=lambda: array("d"))  # of its tokens


@dataclass(frozen=True)
class Lengths:
    """`kind` "fixed": `mean`; "lognormal": with this mean and sigma; "uniform": from `low` to `high`."""

    kind: str
    mean: float
    sigma: float = 1.0
    low: int = 1
    high: int = 1 << 20

    def draw(self, rng: Random) -> int:
        if self.kind == "fixed":
            return int(self.mean)
        if self.kind == "uniform":
            return rng.randint(self.low, self.high)
        drawn = rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return min(max(round(drawn), self.low), self.high)

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """fixed:N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA[:MOST]."""
        kind, *words = text.split(":")
        if kind == "fixed" and len(words) == 1:
            return cls("fixed", float(words[0]))
        if kind == "uniform" and len(words) == 2:
            low, high = int(words[0]), int(words[1])
            return cls("uniform", (low + high) / 2, low=low, high=high)
        if kind == "lognormal" and len(words) in (2, 3):
            high = int(words[2]) if len(words) == 3 else 1 << 20
            return cls("lognormal", float(words[0]), float(words[1]), 4, high)
        raise ValueError(f"lengths are fixed:N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA[:MOST], not {text!r}")


@dataclass(frozen=True)
class Mix:
    """A stream of requests. The means are those of ShareGPT in the PagedAttention paper (161 and 338 tokens); the
    spread is not given there."""

    prompt: Lengths = Lengths("lognormal", 161, 1.2, 4, 4096)
    output: Lengths = Lengths("lognormal", 338, 0.9, 4, 2048)
    long_share: float = 0.0
    long_prompt: int = 30_000
    burstiness: float = 1.0  # shape of the gamma distribution between arrivals: 1 is Poisson, less is burstier
    prefixes: int = 0  # how many there are, each as likely
    prefix_tokens: int = 0
    turns: int = 1
    think_s: float = 5.0
    tenants: tuple[str, ...] = ("",)  # each as likely

    @property
    def mean_prompt(self) -> float:
        return (1 - self.long_share) * self.prompt.mean + self.long_share * self.long_prompt


def arrivals(mix: Mix, rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    """`rate` first turns a second for so many seconds. One seed, one trace."""
    rng = Random(f"{seed}")
    ids = count(UNSHARED + (seed << 40))
    at = rng.gammavariate(mix.burstiness, 1 / (rate * mix.burstiness))
    while at < seconds:
        length = mix.long_prompt if rng.random() < mix.long_share else mix.prompt.draw(rng)
        pieces: tuple[Piece, ...] = ((next(ids), length),)
        if mix.prefixes:
            pieces = ((rng.randrange(mix.prefixes), mix.prefix_tokens), *pieces)
        turns = tuple(
            Turn(mix.prompt.draw(rng), mix.output.draw(rng), rng.expovariate(1 / mix.think_s))
            for _ in range(mix.turns - 1)
        )
        yield Arrival(at, pieces, mix.output.draw(rng), rng.choice(mix.tenants), turns)
        at += rng.gammavariate(mix.burstiness, 1 / (rate * mix.burstiness))


def together(*streams: Iterator[Arrival]) -> Iterator[Arrival]:
    return heapq.merge(*streams, key=lambda arrival: arrival.at)


def read(path: Path, *, speed: float = 1.0) -> Iterator[Arrival]:
    """A trace, its time divided by `speed`. By its form one of

    - JSON lines with `time` (s), `prompt` and `output` (tokens), and, if liked, `tenant` and `prefix` (an id) with
      `prefix_tokens` (of the prompt);
    - Mooncake's JSON lines: `timestamp` (ms), `input_length`, `output_length`, `hash_ids`;
    - Azure's CSV: TIMESTAMP, ContextTokens, GeneratedTokens.
    """
    with path.open(newline="") as lines:
        found = _csv(csv.DictReader(lines)) if path.suffix == ".csv" else _json(lines)
        for arrival in found:
            yield replace(arrival, at=arrival.at / speed)


def _json(lines: Iterator[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines):
        row = json.loads(line)
        if "hash_ids" in row:
            at, prompt, output = row["timestamp"] / 1000, row["input_length"], row["output_length"]
            shared = [(id, MOONCAKE_BLOCK) for id in row["hash_ids"][: prompt // MOONCAKE_BLOCK]]
        else:
            at, prompt, output = row["time"], row["prompt"], row["output"]
            shared = [(crc32(str(row["prefix"]).encode()) % UNSHARED, row["prefix_tokens"])] if "prefix" in row else []
        rest = prompt - sum(tokens for _, tokens in shared)
        yield Arrival(at, (*shared, (UNSHARED + number, max(rest, 1))), max(output, 1), str(row.get("tenant", "")))


def _csv(rows: "csv.DictReader[str]") -> Iterator[Arrival]:
    began = None
    for number, row in enumerate(rows):
        now = datetime.fromisoformat(row["TIMESTAMP"][:26])
        began = began or now
        at = (now - began).total_seconds()
        yield Arrival(at, ((UNSHARED + number, int(row["ContextTokens"])),), max(int(row["GeneratedTokens"]), 1))


def job(id: int, arrival: Arrival, longest: int) -> Job:
    """The request of an arrival. Its limit says nothing of the output's length: it is the model's."""
    tokens = array("i")
    for piece in arrival.pieces:
        tokens.frombytes(_tokens(*piece))
    return _job(id, tokens, arrival.output, arrival.tenant, arrival.at, arrival.turns, longest)


def follow_up(id: int, before: Job, now: float, longest: int) -> Job:
    """The next turn of a conversation: all that was said, and some more."""
    turn, *later = before.turns
    tokens = before.tokens[:]
    tokens.frombytes(_tokens(UNSHARED + (1 << 60) + id, turn.prompt))
    return _job(id, tokens, turn.output, before.tenant, now, tuple(later), longest)


def _job(
    id: int, tokens: "array[int]", output: int, tenant: str, at: float, turns: Sequence[Turn], longest: int
) -> Job:
    sampling = SamplingParams(max_tokens=max(longest - len(tokens), 1), stop_token_ids=[STOP], seed=0)
    return Job(id, tokens, len(tokens), sampling, tenant=tenant, arrived_at=at, output=output, turns=tuple(turns))


def _tokens(id: int, count: int) -> bytes:
    """Any that begin differently for different ids."""
    first = 16 + id * 1_000_003 % (1 << 30)
    return np.arange(first, first + count, dtype=np.int32).tobytes()
