"""A step: the plan that goes to the workers, while it is made and while it is in flight, and what comes back of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from ..common.messages import Admitted, Output, StepPlan, StepResult, pack, unpack
from .beams import Candidates, candidates_of
from .fairness import charge_prompt
from .pace import Load, chunk_pairs
from .request import Request
from .tiers import Written

ANY_BLOCK = 1


@dataclass(slots=True)
class Step:
    """A plan, and what its sender wants to know besides. `requests` and `counts` are in the order of the plan's rows."""

    plan: StepPlan
    requests: list[Request]
    sampled: list[Request]  # those of `requests` that get a token
    admitted: list[Request]  # those that got their first row
    num_preempted: int  # since the step before
    written: list[Written]  # what it changes on disk
    load: Load

    @property
    def num_tokens(self) -> int:
        return self.load.rows + self.load.tokens

    def request_of(self, row: int) -> Request | None:
        rows = unpack(self.plan.rows)
        return self.requests[rows.index(row)] if row in rows else None

    @property
    def alone(self) -> bool:
        """Whether it computes one suspect. Nothing else is then in flight."""
        return self.requests[0].suspect


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    budget: int  # tokens left
    rows: int = 0  # these four as in `Load`
    context: int = 0
    tokens: int = 0
    pairs: float = 0.0
    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)
    ripe: list[Request] = field(default_factory=list)  # have a block that is full of known tokens
    admitted: list[Admitted] = field(default_factory=list)
    first: list[Request] = field(default_factory=list)
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)

    def decode(self, requests: list[Request], context: int) -> None:
        """One token of each of these, which have grown and sample. They come first; `context` is what is before it."""
        num = len(requests)
        self.requests, self.sampled = requests, requests[:]
        self.counts, self.samples = [1] * num, [1] * num
        self.budget -= num
        self.rows, self.context = num, context

    def chunk(self, request: Request, count: int) -> None:
        """`count` tokens of a running request, for which it has blocks. At the last that is known it samples."""
        known, start = len(request.tokens), request.computed
        request.computed += count
        charge_prompt(request)
        samples = request.computed == known + request.inflight
        if samples:
            request.inflight += 1
            self.sampled.append(request)
        self.samples.append(samples)
        self.requests.append(request)
        self.counts.append(count)
        self.budget -= count
        if count == 1:
            self.rows += 1
            self.context += start
        else:
            self.tokens += count
            self.pairs += chunk_pairs(start, count)
        if known >= request.publish_at:
            self.ripe.append(request)

    def chunks(self, requests: Iterable[Request], counts: Iterable[int]) -> None:
        """As many tokens of each, none of some."""
        for request, count in zip(requests, counts, strict=True):
            if count:
                self.chunk(request, count)

    def plan(self, epoch: int, number: int, released: list[int], copies: bytes) -> StepPlan:
        return StepPlan(
            epoch=epoch,
            step=number,
            released=released,
            admitted=self.admitted,
            new_blocks=self.new_blocks,
            copies=copies,
            rows=pack([request.row for request in self.requests]),  # type: ignore[misc]  # those planned have rows
            starts=pack([request.computed - n for request, n in zip(self.requests, self.counts, strict=True)]),
            counts=pack(self.counts),
            samples=bytes(self.samples),
        )

    @property
    def load(self) -> Load:
        return Load(self.rows, self.context, self.tokens, self.pairs)


def admission(request: Request) -> Admitted:
    """What the workers are told of a request that has been given a row."""
    assert request.row is not None
    blocks = [block or ANY_BLOCK for block in request.blocks]  # of a retired one nothing is seen, but it must be there
    return Admitted(request.row, request.tokens.tobytes(), request.num_prompt, request.sampling, blocks)


def best_of(result: StepResult, sampled: list[Request]) -> dict[Request, Candidates]:
    """The likeliest tokens for each request that asked for them, or that which was drawn; empty where the result makes no
    sense."""
    asked = [request for request in sampled if request.num_candidates]
    counts = [request.num_candidates for request in asked]
    return dict(zip(asked, candidates_of(result.best_ids, result.best_logprobs, counts), strict=True))


def with_logprob(output: Output, drawn: Candidates) -> Output:
    """The same output of one token, whose log-probability was asked for."""
    return replace(output, logprobs=[logprob for _, logprob in drawn])


def tokens_of(result: StepResult, num_rows: int) -> Iterable[int | None]:
    """The token of each sampling row; None where there is none, and everywhere when the columns make no sense."""
    try:
        counts, tokens = unpack(result.counts), unpack(result.tokens)
    except ValueError:
        return [None] * num_rows
    if len(counts) != num_rows or len(tokens) != sum(counts) or not all(0 <= count <= 1 for count in counts):
        return [None] * num_rows
    if len(tokens) == num_rows:
        return tokens
    values = iter(tokens)
    return [next(values) if count else None for count in counts]
