"""How many requests there may be, and how much stays free."""

from ..common.config import SchedulerConfig
from ..common.messages import most_blocks
from .request import Request

MOST_PASSED = 16  # requests in a step that wait for what another one computes
OPEN_PROMPTS = 2  # prompts that are being computed while more wait; each holds blocks for all of its tokens
QUEUED_PER_SEQ = 16  # waiting requests for each row, unless configured


def num_queueable(config: SchedulerConfig) -> int:
    """Requests that may wait besides those that could run."""
    return config.max_num_queued_reqs or QUEUED_PER_SEQ * config.max_num_seqs


def num_places(config: SchedulerConfig) -> int:
    """Requests that may run or wait, as long as nobody is kept out of its part."""
    return config.max_num_seqs + num_queueable(config)


def within_part(held: int, num_requests: int, num_tenants: int, config: SchedulerConfig) -> bool:
    """Whether a tenant may hold so many though all places are taken, `num_requests` being all: who fills the queue does
    not keep others out of an equal part. There is an end to it, however many tenants come."""
    places = num_places(config)
    return held <= places // num_tenants and num_requests <= 2 * places


def fits(request: Request, limit: int, config: SchedulerConfig, num_blocks: int, block_size: int) -> bool:
    """Whether it can run at all, up to a length of `limit` tokens."""
    width = request.sampling.num_sequences
    return (
        request.num_prompt < limit
        and len(request.tokens) <= limit
        and width <= config.max_num_seqs
        and most_blocks(request.num_prompt, limit, width, block_size) <= num_blocks
    )


def reserve(num_running: int) -> int:
    """Free blocks that an admission leaves to `num_running` requests to grow into.

    256 requests over 1,000 blocks: a quarter of a block each halves preemptions and computes 10 % fewer tokens, for
    0.6 % more steps; a whole block each costs 3 % more steps.
    """
    return num_running // 4
