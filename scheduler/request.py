"""State of one request as integers, from which every phase follows: known, planned and in-flight tokens.

`target = len(tokens) + inflight` is how far the sequence is known or about to be; a step plans `target - computed`
tokens of it, and samples when it gets there. Chunked prefill, decoding, prefix hits and resumption are all this.
"""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..common.messages import Quota
from ..common.sampling import SamplingParams
from .pace import Claim

if TYPE_CHECKING:
    from .groups import Group

UNLIMITED = Quota()
SUSPECT_AT = 2  # strikes; see `suspects`
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0


@dataclass(slots=True, eq=False)
class Account:
    """What a tenant has had of the service among requests of one priority; see `fairness`."""

    tenant: str = ""
    priority: int = 0
    level: float = 0.0  # cost of its tokens over its weight
    output_cost: float = 0.0  # of one token of an output, over its weight
    num_requests: int = 0  # waiting and running
    waiting: "list[Request]" = field(default_factory=list)  # by arrival


@dataclass(slots=True, eq=False)
class Request:
    """`tokens` is prompt and output together; a request that goes on elsewhere begins with output.

    `client`, `quota` and the times belong to whoever hands the request in; the scheduler never reads them.
    Everything from `arrival` on belongs to the scheduler.
    """

    id: int  # the client's own
    tokens: "array[int]"
    num_prompt: int
    sampling: SamplingParams
    priority: int = 0  # lower runs first
    salt: str = ""
    client: bytes = b""
    arrived_at: float = 0.0  # seconds of the client's clock
    last_token_at: float = 0.0
    tenant: str = ""
    quota: Quota = UNLIMITED  # of the tenant
    strikes: int = 0  # losses of workers with this in flight, or of the schedulers that held it; see `suspects`
    weight: float = 0.0  # of the tenant against others; 0: the quota's
    pin_s: float = 0.0  # seconds that its prefix is to be pinned for; 0 when that is done, too
    pin_tokens: int = 0  # so much of it

    arrival: int = 0  # running number
    turn: int = 0  # running number of its last admission
    charged: int = 0  # tokens of the prompt that the tenant was charged for, or had for nothing
    account: Account = field(default_factory=Account)
    limit: int = 0  # most tokens, prompt included
    stops: frozenset[int] = frozenset()
    computed: int = 0  # tokens whose KV is planned: the plans before have written them when a later plan runs
    inflight: int = 0  # samples planned whose tokens have not come back
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the chain of full blocks, as far as it was needed
    publish_at: int = 0  # known tokens at which the next block can be shared
    retired: int = 0  # blocks at the beginning of the table that were given back: nobody sees their tokens any more
    private: bool = False  # its blocks are found by itself alone
    num_cached: int | None = None  # prompt tokens found in the prefix cache at the first admission
    finish: str | None = None
    proof: int = 0  # tokens since the last strike
    num_candidates: int = 0  # that the workers are asked for
    group: "Group | None" = None  # of a beam search, whose requests are one to the client

    def __post_init__(self) -> None:
        if self.sampling.max_tokens is None:
            raise ValueError("max_tokens must be resolved before a request is scheduled")
        self.limit = self.num_prompt + self.sampling.max_tokens
        self.stops = frozenset(self.sampling.stop_token_ids)
        self.num_candidates = self.sampling.num_candidates
        self.weight = min(
            max(LEAST_WEIGHT, self.weight or self.quota.weight), MOST_WEIGHT
        )  # in this order NaN is least

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def claim(self) -> Claim:
        """What is left to compute of it."""
        left = len(self.tokens) + self.inflight - self.computed
        return Claim(self.computed, left, self.priority, self.account.level, self.turn)

    @property
    def suspect(self) -> bool:
        """Whether it may be what kills workers: then nothing else is computed with it."""
        return self.strikes >= SUSPECT_AT

    @property
    def rank(self) -> tuple[int, int]:
        """Who keeps its place when not all can: priority, then arrival. Unique among the requests of a scheduler."""
        return self.priority, self.arrival
