"""The worker group: who belongs to it, how far its start is, who of it hangs. No sockets; times are arguments.

A group is never mended. When a member is lost, `successor` is formed of whoever says Hello then: under another epoch,
with another place to meet. Nothing is carried over but what was decided for good, the capacity.
"""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..common.messages import (
    HEARTBEAT_S,
    PEER_TIMEOUT_S,
    Allocate,
    Capacity,
    Hello,
    Status,
    WorkerReady,
)
from ..common.model_info import ModelInfo
from . import startup
from .peers import Worker, other_protocol

SHORTEST_STALL_S = 2 * HEARTBEAT_S  # who lives may be silent for one beat and the delay of another
STARTING_STALL = 10  # stall timeouts: while it starts, a worker may have long work to do between two signs of life


class Claim(Enum):
    """Of a worker, to a rank that another one holds."""

    TAKEN = "taken"  # the holder lives
    OPEN = "open"  # it may be dead: the claimant will ask again
    VACANT = "vacant"


class WorkerGroup:
    """Workers by identity, one for each rank. None is dropped for silence alone: a process may be paused."""

    def __init__(self, config: EngineConfig, info: ModelInfo, run_dir: Path, epoch: int) -> None:
        self.epoch = epoch
        self.rendezvous = startup.rendezvous(config, run_dir, epoch)
        self.num_ranks = config.parallel.tensor_parallel_size
        self.capacity: Capacity | None = None  # decided, though not allocated yet
        self.num_saved = (0, 0)  # blocks in host memory and on disk, likewise
        self.window = 0  # of tokens that the model sees; 0: all
        self.served = False  # a group before this one was complete
        self._config, self._info, self._run_dir = config, info, run_dir
        self._peers: dict[bytes, Worker] = {}

    def successor(self, epoch: int) -> "WorkerGroup":
        """The group that comes after this one, without members. `epoch` is that of no group before."""
        group = WorkerGroup(self._config, self._info, self._run_dir, max(epoch, self.epoch + 1))
        group.capacity, group.num_saved, group.window = self.capacity, self.num_saved, self.window
        group.served = self.served or self.complete
        return group

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._peers))

    def members(self) -> list[tuple[bytes, Worker]]:
        return list(self._peers.items())

    @property
    def all(self) -> list[Worker]:
        """By rank."""
        return sorted(self._peers.values(), key=lambda worker: worker.rank)

    @property
    def complete(self) -> bool:
        """Whether plans may be sent: every rank is here and has its memory."""
        return len(self._peers) == self.num_ranks and all(
            worker.allocated is not None for worker in self._peers.values()
        )

    # --- who belongs to it --------------------------------------------------------------------------------------------

    def objection(self, hello: Hello) -> str | None:
        """Why this engine has no use for a worker, whoever else is here."""
        if problem := other_protocol(hello):
            return problem
        if hello.role != "worker":
            return f"{hello.role!r} does not belong on the workers' wire"
        if not 0 <= hello.rank < self.num_ranks:
            return f"there is no rank {hello.rank} with --tensor-parallel-size {self.num_ranks}"
        if hello.fingerprint not in ("", self._info.fingerprint):
            return "it holds another model than the one that is served"
        return None

    def rival(self, identity: bytes, rank: int) -> bytes | None:
        """Another worker that holds this rank."""
        return next((i for i, worker in self._peers.items() if worker.rank == rank and i != identity), None)

    def claim(self, rival: bytes, now: float) -> Claim:
        """What becomes of a claim to the rank of `rival`, which can be reached. A refusal ends a process, and the
        connection of one that was killed outlives it for a moment: so the rival must be heard after the claim."""
        worker = self._peers[rival]
        if now - worker.heard_at > PEER_TIMEOUT_S:
            return Claim.VACANT
        if worker.claimed_at is None or worker.heard_at <= worker.claimed_at:
            worker.claimed_at = now if worker.claimed_at is None else worker.claimed_at
            return Claim.OPEN
        worker.claimed_at = None
        return Claim.TAKEN

    def join(self, identity: bytes, hello: Hello, now: float) -> None:
        """Take a worker in that nothing speaks against. A Hello that is repeated changes nothing."""
        self._peers.setdefault(identity, Worker(hello.rank, hello.name)).heard_at = now

    def name(self, identity: bytes) -> str:
        worker = self._peers.get(identity)
        return worker.name if worker is not None else "a stranger"

    def heard(self, identity: bytes, now: float) -> Worker | None:
        """Note a sign of life; None from one that is no member."""
        worker = self._peers.get(identity)
        if worker is not None:
            worker.heard_at = now
        return worker

    # --- how far it is ------------------------------------------------------------------------------------------------

    def loaded(self, identity: bytes, ready: WorkerReady) -> list[bytes]:
        """Take a member's report. Returns who is to allocate now. Raises ConfigError for weights that cannot serve."""
        worker = self._peers[identity]
        if problem := startup.mismatch(ready, worker.rank, self._info):
            raise ConfigError(problem)
        worker.ready = ready
        if self.capacity is not None:  # decided before, for all that will ever come
            return [identity]
        reports = [worker.ready for worker in self._peers.values() if worker.ready is not None]
        if len(reports) < self.num_ranks:
            return []
        max_model_len = self._info.max_model_len
        count = startup.num_blocks(reports, self._config, max_model_len)
        block_size = self._config.cache.block_size
        self.num_saved = startup.num_saved(reports)
        self.window = reports[0].window
        self.capacity = Capacity(count, block_size, max_model_len, self._config.scheduler.max_num_seqs)
        return list(self._peers)

    def allocate(self) -> Allocate:
        assert self.capacity is not None, "nobody has loaded yet"
        return Allocate(self.epoch, self.capacity.num_blocks, self.capacity.block_size, *self.num_saved)

    @property
    def restoring_takes(self) -> tuple[float, float]:
        """Seconds that the slowest member needs to copy a block to its device, from the host and from disk."""
        reports = [worker.allocated for worker in self._peers.values() if worker.allocated is not None]
        return max(r.host_block_s for r in reports), max(r.disk_block_s for r in reports)

    def status(self, now: float) -> Status:
        """What frontends and observers are to know."""
        capacity = self.capacity if self.served or self.complete else None
        if hanging := self._hanging(now):
            return Status("stalled", 0.0, hanging, capacity)
        if self.complete:
            return Status("ready", 1.0, capacity=capacity)
        start = startup.phase(self.all, self.num_ranks)
        if not self.served:
            return start
        detail = f"{start.phase}: {start.detail}" if start.detail else start.phase
        return Status("recovering", start.progress, detail, capacity)

    def forgive(self, now: float) -> None:
        """Count everybody as heard: it was this process that was away."""
        for worker in self._peers.values():
            worker.heard_at = now

    def _hanging(self, now: float) -> str:
        """The members that have been silent for too long, for people; the same text as long as they are the same."""
        timeout_s = max(self._config.recovery.stall_timeout, SHORTEST_STALL_S)
        limit_s = timeout_s if self.complete else STARTING_STALL * timeout_s
        names = [f"rank {worker.rank} ({worker.name})" for worker in self.all if now - worker.heard_at > limit_s]
        return f"no sign of life for {limit_s:g} s from {', '.join(names)}" if names else ""
