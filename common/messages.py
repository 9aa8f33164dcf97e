"""The two wires: frontend <-> scheduler and scheduler <-> worker, as tagged unions of structs."""

from msgspec import Struct

from .config import EngineConfig
from .model_info import ModelInfo
from .observing import GetJournal as GetJournal
from .observing import JournalWritten as JournalWritten
from .observing import Tap as Tap
from .observing import Tapped as Tapped
from .pins import GetPins, Pinned
from .sampling import SamplingParams
from .wire import MAX_FRAME_BYTES as MAX_FRAME_BYTES
from .wire import PROTOCOL as PROTOCOL
from .wire import Label as Label
from .wire import Message as Message
from .wire import pack as pack
from .wire import unpack as unpack

# --- both wires -------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """The first message of a peer, repeated until it is welcomed, and again whenever the scheduler's epoch changes or
    frames were lost: it begins a conversation, and what was said before counts no more."""

    protocol: int
    role: Label  # "frontend", "worker" or "observer" (told of every Status, sends no requests)
    name: Label  # for logs: role, rank, host, pid
    rank: int = 0  # of a worker
    fingerprint: Label = ""  # of the model a worker holds; "" before it is told which


class Welcome(Message, frozen=True):
    """The scheduler's answer to `Hello`: one command line decides for every process."""

    epoch: int  # changes when the scheduler restarts; a peer that sees a new one starts over
    config: EngineConfig
    model: ModelInfo
    rendezvous: str = ""  # where the ranks of a tensor-parallel group meet: file:///path or tcp://host:port


class Refused(Message, frozen=True):
    """The scheduler does not talk to this peer; it logs `why` and exits."""

    why: str


class Heartbeat(Message, frozen=True):
    """Both ways, every `HEARTBEAT_S`, and by a worker also while it computes.

    `bad_frames`, from a peer: how many frames it has dropped so far. `STRANGER_EPOCH`, from the scheduler: it does not
    know this peer, which is to say Hello.
    """

    epoch: int
    bad_frames: int = 0


STRANGER_EPOCH = 0  # no scheduler's epoch


HEARTBEAT_S = 1.0
PEER_TIMEOUT_S = 5.0  # a peer unheard of for this long is gone


# --- frontend -> scheduler --------------------------------------------------------------------------------------------


class Quota(Struct, array_like=True, frozen=True, gc=False):
    """What a tenant may use per minute, 0 being no limit, and its share when there is not enough for all."""

    requests: int = 0
    tokens: int = 0  # of prompts and outputs together
    weight: float = 1.0


MAX_TIMEOUT_S = 86400.0  # a longer one would be none


class Submit(Message, frozen=True):
    """One sequence to continue. `id` is the frontend's own and never used twice by it.

    `output` holds the ids already received when a request is submitted again (to a restarted scheduler): generation
    goes on behind them, and the indices of `Output` count from the first id of the whole output. `attempts` counts how
    often an engine failed while it held the sequence, without a token of it since: who is the cause runs alone.
    `timeout_s` and `max_queue_s` count from the arrival of the client's request, which was `waited_s` ago; 0 is none.
    """

    id: int
    prompt: bytes  # int32, at least one
    sampling: SamplingParams  # resolved: seed, max_tokens and stop_token_ids are final
    waited_s: float = 0.0  # since the client's request arrived, for latencies that include the frontend
    priority: int = 0  # lower runs first
    tenant: str = ""
    salt: str = ""  # prefixes are shared only between requests of equal salt
    output: bytes = b""  # int32
    attempts: int = 0
    quota: Quota = Quota()  # of the tenant; not charged for what is submitted again
    timeout_s: float = 0.0  # until the last token
    max_queue_s: float = 0.0  # until the first place in a step; void once there is output
    pin_s: float = 0.0  # keep the prompt's KV for so long
    pin_tokens: int = 0  # so much of it; 0: all


class Abort(Message, frozen=True):
    ids: list[int]


class GetStats(Message, frozen=True):
    """Asks for `Stats` now."""


# --- scheduler -> frontend --------------------------------------------------------------------------------------------


class Capacity(Struct, array_like=True, frozen=True, gc=False):
    """What the engine can hold, known once the workers have measured their memory."""

    num_blocks: int  # usable KV blocks; the null block is not counted
    block_size: int  # tokens
    max_model_len: int  # tokens of prompt and output together
    max_num_seqs: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def most_blocks(num_prompt: int, limit: int, num_sequences: int, block_size: int) -> int:
    """Blocks that sequences hold which share a prompt, when they are `limit` tokens long. Of one sequence the last token
    is never fed back, so it needs no KV."""
    longest, shared = -(-(limit - 1) // block_size), num_prompt // block_size
    return shared + num_sequences * (longest - shared) if num_sequences > 1 else longest


class Status(Message, frozen=True):
    """Sent to frontends and observers when it changes. `capacity` is set from the first "ready" on.

    After it, "recovering" says that workers are missing (sequences are accepted and wait), "stalled" that one has made
    no progress for `--stall-timeout`.
    """

    phase: str  # one of PHASES
    progress: float = 0.0  # of the phase, 0 to 1
    detail: str = ""
    capacity: Capacity | None = None


PHASES = ("connecting", "loading", "allocating", "warming up", "ready", "recovering", "stalled", "failed")


class Hypothesis(Struct, array_like=True, frozen=True, gc=False):
    """One of the best sequences that a beam search has found."""

    tokens: list[int]
    finish: str  # "stop" or "length"
    logprob: float  # of all its tokens together
    score: float  # by which they are ordered: the logprob over the length to the power of the length penalty


class Output(Struct, array_like=True, frozen=True, gc=False):
    """New ids of one request. A frontend drops ids it has (by index); a gap is an error.

    A beam search says nothing before its end, and then `hypotheses`, best first, instead of tokens.
    """

    id: int
    first_index: int  # position of tokens[0] in the output
    tokens: list[int]
    finish: str | None = None  # "stop" (a stop token, which is the last id), "length", "abort", "error", "timeout"
    num_cached: int = 0  # prompt tokens whose KV was found in the prefix cache at the first admission
    error: str = ""  # why, when finish is "error" or "timeout"
    # "overloaded", "rate_limited" or "too_long" when it was never accepted, "expired" when it has waited for
    # `max_queue_s`, or would have to
    rejection: str = ""
    retry_after_s: float = 0.0  # with all but "too_long": when there may be room
    hypotheses: list[Hypothesis] = []
    logprobs: list[float] = []  # of the tokens, where `SamplingParams.best_of` asks for them

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + sum(len(hypothesis.tokens) for hypothesis in self.hypotheses)


class Outputs(Message, frozen=True):
    """At most one per step and frontend."""

    outputs: list[Output]


class Stats(Message, frozen=True):
    """The scheduler's metrics in Prometheus text format."""

    text: bytes


# --- worker -> scheduler ----------------------------------------------------------------------------------------------


class Progress(Message, frozen=True):
    phase: str  # one of PHASES
    fraction: float
    detail: str = ""


class WorkerReady(Message, frozen=True):
    """The weights are loaded. Answered with `Allocate`."""

    rank: int
    fingerprint: str
    device: str  # human-readable
    dtype: str
    block_bytes: int  # of one KV block of this rank, all layers
    available_bytes: int  # for the KV cache
    host_bytes: int = 0  # of host memory, for blocks that the device has no room for
    disk_bytes: int = 0  # likewise of a file
    window: int = 0  # tokens that the layer which sees furthest sees; 0: all
    kv_layout: str = ""  # how a block is laid out: on disk it is of use only to workers that say the same


class Allocated(Message, frozen=True):
    """KV memory is there and the model has run once: plans may come.

    `host_block_s` and `disk_block_s`: what copying a block from there to the device takes, in seconds. `disk_id` names
    the content of the file: another one than before stands for a file that is new.
    """

    rank: int
    host_block_s: float = 0.0
    disk_block_s: float = 0.0
    disk_id: Label = ""


class StepResult(Message, frozen=True):
    """Of rank 0, one per `StepPlan`, in order. Row order is the plan's, only sampling rows are in it."""

    epoch: int
    step: int
    counts: bytes  # int32: new tokens of each sampling row (more than one under speculation)
    tokens: bytes  # int32, concatenated
    took_us: int = 0  # computing it, without waiting for the steps before
    # The likeliest tokens of each row that asks for `SamplingParams.num_candidates`, row after row, likeliest first; of a
    # row that asks for one, the token that was drawn.
    best_ids: bytes = b""  # int32
    best_logprobs: bytes = b""  # float32, of the model's own distribution


class RequestFault(Message, frozen=True):
    """One row cannot go on (NaN logits, for one); its neighbours are untouched. Comes before the step's result."""

    epoch: int
    step: int
    row: int
    why: str


class Left(Message, frozen=True):
    """This worker has dropped its rows and left its group, but keeps the weights: a Hello follows, and the scheduler
    forms another group. The cause is a step that failed here, or the loss of another rank."""

    rank: int
    epoch: int  # of the group
    why: str
    out_of_memory: bool = False  # the step was too large for the device


class WorkerFault(Message, frozen=True):
    """This worker cannot go on; it exits with `code` after sending this."""

    rank: int
    why: str
    code: int


# --- scheduler -> worker ----------------------------------------------------------------------------------------------


class Allocate(Message, frozen=True):
    """Allocate KV memory (block 0 is the null block, besides `num_blocks` usable ones) and forget every row.

    Also sent to a worker that is already allocated, when the epoch is new: memory of the same size is kept. Behind the
    device's blocks there are `host_blocks` in host memory and `disk_blocks` in a file; all are numbered through.
    """

    epoch: int
    num_blocks: int
    block_size: int
    host_blocks: int = 0
    disk_blocks: int = 0


class Admitted(Struct, array_like=True, frozen=True, gc=False):
    """A request gets a row. Everything the worker will ever be told of it, save growth and release."""

    row: int
    tokens: bytes  # int32: prompt and any output so far
    num_prompt: int  # of those, how many are prompt (penalties and positions of sampling need the border)
    sampling: SamplingParams
    blocks: list[int]  # the whole block table so far


class StepPlan(Message, frozen=True):
    """One step. The plan is a log: a worker replays plans in order, so a block may be reused the moment it is freed.

    Applied in field order: rows are released, then admitted, then block tables grow, then blocks are copied, one pair
    after the other (0 < block <= num_blocks is one of the device, the host's and the disk's follow), then the forward pass
    runs over `rows[i]`, tokens [starts[i], starts[i] + counts[i]), KV of all earlier tokens being in place, then a token is
    sampled for each i with samples[i]; it is appended to the row, on the device too, so that a later plan may name it
    before its value has come back. Prefilling rows (counts > 1) and decoding ones come in any order.
    """

    epoch: int
    step: int
    released: list[int]  # rows
    admitted: list[Admitted]
    new_blocks: list[tuple[int, list[int]]]  # (row, blocks appended to its table); admitted rows' are in `admitted`
    copies: bytes  # int32: from, to, from, to, ...
    rows: bytes  # int32
    starts: bytes  # int32
    counts: bytes  # int32, >= 1
    samples: bytes  # uint8, 0 or 1


class Shutdown(Message, frozen=True):
    """Finish and exit with code 0."""


FromFrontend = Hello | Heartbeat | Submit | Abort | GetStats | GetPins | GetJournal | Tap
ToFrontend = Welcome | Refused | Heartbeat | Status | Outputs | Stats | Pinned | Shutdown | JournalWritten | Tapped
FromWorker = Hello | Heartbeat | Progress | WorkerReady | Allocated | StepResult | RequestFault | Left | WorkerFault
ToWorker = Welcome | Refused | Heartbeat | Allocate | StepPlan | Shutdown
