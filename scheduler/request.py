"""State of one request as integers, from which every phase follows: known, planned and in-flight tokens.

`target = len(tokens) + inflight` is how far the sequence is known or about to be; a step plans `target - computed`
tokens of it, and samples when it gets there. Chunked prefill, decoding, prefix hits and resumption are all this.
"""

from array import array
from dataclasses import dataclass, field

from ..common.messages import Quota
from ..common.sampling import SamplingParams

UNLIMITED = Quota()
SUSPECT_AT = 2  # strikes; see `suspects`


@dataclass(slots=True, eq=False)
class Request:
    """`tokens` is prompt and output together; a request that goes on elsewhere begins with output.

    `client`, `tenant`, `quota` and the times belong to whoever hands the request in; the scheduler never reads them.
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

    arrival: int = 0  # running number
    limit: int = 0  # most tokens, prompt included
    stops: frozenset[int] = frozenset()
    computed: int = 0  # tokens whose KV is planned: the plans before have written them when a later plan runs
    inflight: int = 0  # samples planned whose tokens have not come back
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the chain of full blocks, as far as it was needed
    publish_at: int = 0  # known tokens at which the next block can be shared
    num_cached: int | None = None  # prompt tokens found in the prefix cache at the first admission
    finish: str | None = None
    proof: int = 0  # tokens since the last strike

    def __post_init__(self) -> None:
        if self.sampling.max_tokens is None:
            raise ValueError("max_tokens must be resolved before a request is scheduled")
        self.limit = self.num_prompt + self.sampling.max_tokens
        self.stops = frozenset(self.sampling.stop_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def suspect(self) -> bool:
        """Whether it may be what kills workers: then nothing else is computed with it."""
        return self.strikes >= SUSPECT_AT

    @property
    def rank(self) -> tuple[int, int]:
        """Whose turn it is: priority, then arrival. Unique among the requests of a scheduler."""
        return self.priority, self.arrival
