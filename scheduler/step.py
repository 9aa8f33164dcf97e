"""A step: the plan that goes to the workers, while it is made and while it is in flight, and what comes back of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..common.messages import Admitted, StepPlan, StepResult, unpack
from .request import Request


@dataclass(slots=True)
class Step:
    """A plan, and what its sender wants to know besides. `requests` and `counts` are in the order of the plan's rows."""

    plan: StepPlan
    requests: list[Request]
    sampled: list[Request]  # those of `requests` that get a token
    num_tokens: int
    admitted: list[Request]  # those that got their first row
    num_preempted: int  # since the step before

    @property
    def alone(self) -> bool:
        """Whether it computes one suspect. Nothing else is then in flight."""
        return self.requests[0].suspect


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    budget: int  # tokens left
    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)
    ripe: list[Request] = field(default_factory=list)  # have a block that is full of known tokens
    admitted: list[Admitted] = field(default_factory=list)
    first: list[Request] = field(default_factory=list)
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)


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
