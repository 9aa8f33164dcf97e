"""The scheduler process: two sockets, one loop. What it decides is in `startup`, `workers`, `serving` and `scheduler`."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common import curve
from ..common.channel import Event, Hub, encode
from ..common.config import EngineConfig
from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError
from ..common.messages import (
    HEARTBEAT_S,
    PEER_TIMEOUT_S,
    PHASES,
    Abort,
    Allocated,
    GetJournal,
    GetStats,
    Heartbeat,
    Hello,
    Left,
    Output,
    Outputs,
    Progress,
    RequestFault,
    Shutdown,
    Stats,
    Status,
    StepResult,
    Submit,
    Tap,
    Welcome,
    WorkerFault,
    WorkerReady,
)
from ..common.model_info import ModelInfo
from ..common.pins import GetPins
from ..common.process import on_termination
from . import startup
from .disk_index import DiskIndex
from .peers import Frontends, Worker
from .recorder import Recorder
from .serving import Serving
from .sight import Sight
from .sockets import Sockets
from .workers import Claim, WorkerGroup

log = logging.getLogger(__name__)

STARTING_POLL_S = 0.1  # how often progress is passed on while workers start
NOT_READY, NOT_READY_RETRY_S = "the engine is not ready", 1.0
OUT_OF_MEMORY = "out_of_memory"  # a cause of losses; the others are words as good
FRAMES_PER_TURN = 1024  # of each wire: a flood on one does not starve the other


class Process:
    """The loop. `run()` in any thread; `stop()` from any thread or signal handler."""

    def __init__(
        self,
        config: EngineConfig,
        info: ModelInfo,
        *,
        address: str,
        run_dir: Path,
        keys: curve.SchedulerKeys | None = None,
    ) -> None:
        """Binds both wires, guarded by `keys`. Raises ConfigError when it cannot."""
        self.config, self.info = config, info
        self.epoch = _new_epoch()  # of this scheduler, to frontends
        self._sight = Sight(config, info, run_dir, self._name_of)
        self._sockets = Sockets(address, keys, self._sight.taps)
        self._to_frontends, self._to_workers = self._sockets.frontends, self._sockets.workers
        self._frontends = Frontends()
        self._workers = WorkerGroup(config, info, run_dir, _new_epoch())
        self._recorder = Recorder(info.model, caching=config.cache.enable_prefix_caching)
        self._serving: Serving | None = None  # once the workers have memory
        self._told_at = self._beat_at = self._turn_at = time.monotonic()
        self._status = self._workers.status(self._told_at)
        self._disk_ids: list[str] = []  # of the files that the index is of
        self._lost_at: float | None = None  # when a group that served was lost, until another one does
        self._stopping = False

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._sockets.wake()

    def run(self) -> int:
        """Serve until `stop`, or a configuration that cannot be served. Returns the process's exit code.

        After a bug of its own it says nothing to anybody: frontends and workers wait for the next scheduler, with all
        that they hold.
        """
        code = 0
        try:
            while not self._stopping:
                self._turn()
            self._farewell(Shutdown())
        except ConfigError as error:
            log.error("%s", error)
            self._farewell(Status("failed", detail=str(error)))
            code = EXIT_CONFIG
        except Exception as error:
            log.exception("a bug in the scheduler ends it")
            self._sight.failed(repr(error))
            code = EXIT_FATAL
        finally:
            self._close()
        return code

    def _farewell(self, message: Shutdown | Status) -> None:
        self._broadcast_frontends(message)
        for identity in self._workers:
            self._to_workers.send(identity, Shutdown())

    def _close(self) -> None:
        self._stopping = True
        if self._serving is not None:
            self._serving.close()
        self._sockets.close()

    def _turn(self) -> None:
        wait_s = HEARTBEAT_S if self._workers.complete else STARTING_POLL_S
        if self._serving is not None:
            wait_s = max(0.0, min(wait_s, self._serving.next_deadline - time.monotonic()))
        self._sockets.poll(wait_s)
        now = time.monotonic()
        if now - self._turn_at > PEER_TIMEOUT_S / 2:  # it was this process that was away
            self._frontends.forgive(now)
            self._workers.forgive(now)
        self._turn_at = now
        self._receive("workers", self._to_workers, self._from_worker)
        self._receive("frontends", self._to_frontends, self._from_frontend)
        if self._serving is not None:
            self._serving.expire(now)
            self._dispatch(self._serving)
            self._flush(self._serving)
        if now - self._beat_at >= HEARTBEAT_S:
            self._beat(now)
        self._tell(now)
        for identity, news in self._sight.take():
            self._to_frontends.send(identity, news)

    def _receive(self, wire: str, hub: Hub[Any], handle: Callable[[bytes, Any], None]) -> None:
        bad_frames = hub.codec.bad_frames
        for identity, message in hub.received(FRAMES_PER_TURN):
            if self._sight.taps.active:
                self._sight.taps.heard(wire, identity, message)
            handle(identity, message)
        if hub.codec.bad_frames > bad_frames:
            self._recorder.bad_frames(wire, hub.codec.bad_frames - bad_frames)

    # --- frontends ----------------------------------------------------------------------------------------------------

    def _from_frontend(self, identity: bytes, message: Any) -> None:
        now = time.monotonic()
        if isinstance(message, Hello):
            if objection := self._frontends.greet(identity, message, now):
                self._sockets.refuse(self._to_frontends, identity, message, objection)
                return
            log.debug("welcomed %s", message.name)
            self._to_frontends.send(identity, Welcome(self.epoch, self.config, self.info))
            self._to_frontends.send(identity, self._status)
            self._count_peers()
            return
        peer = self._frontends.heard(identity, now)
        if peer is None:
            return
        match message:
            case Event.LOST:
                self._drop_frontend(identity, "begins anew, or frames of it were lost")
            case Heartbeat(_, bad_frames):
                self._recorder.bad_frames_of(identity, "frontends", bad_frames)
            case Submit() if self._serving is None:
                output = Output(message.id, 0, [], "error", 0, NOT_READY, "overloaded", NOT_READY_RETRY_S)
                self._to_frontends.send(identity, Outputs([output]))
            case Submit() if peer.role == "frontend":
                assert self._serving is not None
                self._serving.submit(identity, message, now)
            case Abort() if self._serving is not None:
                self._serving.abort(identity, message.ids, now)
            case GetJournal() | Tap() if peer.role == "observer":
                self._sight.asked(identity, message)
            case GetPins() if self._serving is not None:
                self._to_frontends.send(identity, self._serving.pins(message, now))
            case GetStats():
                self._recorder.levels(self._serving.scheduler if self._serving is not None else None)
                self._to_frontends.send(identity, Stats(self._recorder.metrics.render()))

    def _drop_frontend(self, identity: bytes, why: str) -> None:
        peer = self._frontends.remove(identity)
        self._sight.forget(identity)
        self._to_frontends.forget(identity)
        num_requests = self._serving.drop(identity, time.monotonic()) if self._serving is not None else 0
        level = logging.WARNING if num_requests else logging.DEBUG  # nothing is lost when one ends that had none
        log.log(level, "%s %s; %d requests of it were freed", peer.name, why, num_requests)
        self._count_peers()

    def _name_of(self, wire: str, identity: bytes) -> str:
        return self._frontends.name(identity) if wire == "frontends" else self._workers.name(identity)

    def _count_peers(self) -> None:
        for role in ("frontend", "observer"):
            self._recorder.peers(role, self._frontends.count(role))
        self._recorder.peers("worker", len(self._workers.all))

    # --- workers ------------------------------------------------------------------------------------------------------

    def _from_worker(self, identity: bytes, message: Any) -> None:
        now = time.monotonic()
        if isinstance(message, Hello):
            self._admit(identity, message, now)
            return
        worker = self._workers.heard(identity, now)
        if worker is None:  # of a group that is no more
            return
        match message:
            case Heartbeat(_, bad_frames):
                self._recorder.bad_frames_of(identity, "workers", bad_frames)
            case Progress(phase) if phase in PHASES:
                worker.progress = message
            case WorkerReady(rank) if rank == worker.rank:
                log.info("worker %d is loaded: %s, %s", worker.rank, message.device, message.dtype)
                for member in self._workers.loaded(identity, message):
                    self._to_workers.send(member, self._workers.allocate())
            case Allocated(rank) if rank == worker.rank and worker.ready is not None:
                worker.allocated = message
                if self._workers.complete:
                    self._serve(now)
            case StepResult(epoch) | RequestFault(epoch) if worker.rank == 0 and epoch == self._workers.epoch:
                self._step_news(message, now)
            case _:
                self._bad_news(worker, message, now)

    def _bad_news(self, worker: Worker, message: Any, now: float) -> None:
        match message:
            case Event.LOST:
                self._lose("lost_frames", f"{worker.name} begins anew, or frames of it were lost", now)
            case Left(_, epoch, why, out_of_memory) if epoch == self._workers.epoch:
                self._lose(OUT_OF_MEMORY if out_of_memory else "left", f"{worker.name} left its group: {why}", now)
            case WorkerFault(_, why, code) if code == EXIT_CONFIG:
                raise ConfigError(f"worker {worker.rank}: {why}")
            case WorkerFault(_, why):
                self._lose("fault", f"{worker.name} cannot go on: {why}", now)
            case _:
                log.warning("dropped a %s of worker %d that is out of place", type(message).__name__, worker.rank)

    def _admit(self, identity: bytes, hello: Hello, now: float) -> None:
        """A worker says Hello."""
        if objection := self._workers.objection(hello):
            self._sockets.refuse(self._to_workers, identity, hello, objection)
            return
        if rival := self._workers.rival(identity, hello.rank):
            reached = self._to_workers.send(rival, Heartbeat(self._workers.epoch))
            claim = self._workers.claim(rival, now) if reached else Claim.VACANT
            if claim is Claim.TAKEN:
                self._sockets.refuse(self._to_workers, identity, hello, f"rank {hello.rank} is taken by another worker")
            elif claim is Claim.VACANT:
                self._lose("replaced", f"{hello.name} comes for one that is gone", now)
            if claim is not Claim.VACANT:
                return
        self._workers.join(identity, hello, now)
        log.debug("welcomed %s", hello.name)
        self._to_workers.send(identity, Welcome(self._workers.epoch, self.config, self.info, self._workers.rendezvous))
        self._count_peers()

    def _lose(self, cause: str, why: str, now: float) -> None:
        """Give the worker group up. Its members are asked to say Hello, and who does belongs to the next one."""
        lost, self._workers = self._workers, self._workers.successor(_new_epoch())
        log.warning("%s: the workers form another group", why)
        self._recorder.group_lost(cause)
        if lost.complete:
            self._lost_at = now
        for identity in lost:
            self._to_workers.ask_for_hello(identity)
        if self._serving is not None:
            self._serving.regroup(self._workers.epoch, now, out_of_memory=cause == OUT_OF_MEMORY)
        self._count_peers()

    def _serve(self, now: float) -> None:
        """The group is complete: begin, or go on."""
        capacity = self._workers.capacity
        assert capacity is not None
        if self._serving is None:
            config = self.config
            num_host, num_disk = self._workers.num_saved
            scheduler = self._sight.scheduler(
                config.scheduler,
                config.cache,
                capacity.num_blocks,
                capacity.max_model_len,
                num_host_blocks=num_host,
                num_disk_blocks=num_disk,
                window=self._workers.window,
                epoch=self._workers.epoch,
            )
            self._serving = Serving(scheduler, self.info, self._recorder, config.scheduler.pipeline_depth)
            log.info("ready: %d KV blocks of %d tokens", capacity.num_blocks, capacity.block_size)
        self._serving.served_by(self._workers.restoring_takes, self._disk_index())
        if self._lost_at is not None:
            log.info("ready again after %.2f s", now - self._lost_at)
            self._recorder.recovered(now - self._lost_at)
            self._lost_at = None

    def _disk_index(self) -> DiskIndex | None:
        """That of the files which this group has open; None for those that the group before had, or if there are none."""
        ids = [worker.allocated.disk_id for worker in self._workers.all if worker.allocated is not None]
        num_blocks = self._workers.num_saved[1]
        if not num_blocks or ids == self._disk_ids:
            return None
        if self._serving is not None:
            self._serving.close()
        self._disk_ids = ids
        return startup.disk_index(self.config, self.info, self._workers.all, num_blocks)

    def _step_news(self, message: StepResult | RequestFault, now: float) -> None:
        serving = self._serving
        if serving is None:
            return
        if isinstance(message, RequestFault):
            serving.fault(message, now)
            return
        expected = serving.expected_step()
        if expected is None or message.step < expected:
            log.warning("dropped the result of step %d, which has been answered", message.step)
        elif message.step > expected:
            self._lose("lost_frames", f"step {message.step} was answered before step {expected}", now)
        else:
            serving.result(message, now)
            self._dispatch(serving)  # the device first: the outputs can wait for it, not it for them
            self._flush(serving)

    def _dispatch(self, serving: Serving) -> None:
        while self._workers.complete and (plan := serving.plan(time.monotonic())) is not None:
            self._to_group(encode(plan))

    def _to_group(self, frame: bytes) -> None:
        for identity, worker in self._workers.members():
            if not self._to_workers.send_frame(identity, frame):
                self._lose("gone", f"{worker.name} is gone", time.monotonic())
                return

    # --- to all -------------------------------------------------------------------------------------------------------

    def _flush(self, serving: Serving) -> None:
        for client, outputs in serving.take_outputs():
            if not self._to_frontends.send(client, outputs) and client in self._frontends:
                self._drop_frontend(client, "is gone")

    def _tell(self, now: float) -> None:
        status = self._workers.status(now)
        if status.phase != self._status.phase or (status != self._status and now - self._told_at >= STARTING_POLL_S):
            if status.phase == "stalled":
                log.warning("stalled: %s", status.detail)
            self._status, self._told_at = status, now
            self._broadcast_frontends(status)

    def _beat(self, now: float) -> None:
        self._beat_at = now
        for identity in self._frontends.silent(now):
            self._drop_frontend(identity, f"has been silent for {PEER_TIMEOUT_S:.0f} s")
        self._broadcast_frontends(Heartbeat(self.epoch))
        self._to_group(encode(Heartbeat(self._workers.epoch)))
        if self._serving is not None:
            self._serving.audit()

    def _broadcast_frontends(self, message: Status | Heartbeat | Shutdown) -> None:
        frame = encode(message)
        for identity in self._frontends:
            if not self._to_frontends.send_frame(identity, frame):
                self._drop_frontend(identity, "is gone")


def _new_epoch() -> int:
    """Higher than any before it on this host."""
    return time.time_ns() // 1_000_000


def main(
    config: EngineConfig,
    info: ModelInfo,
    *,
    address: str,
    run_dir: Path,
    supervised: bool,
    keys: curve.SchedulerKeys | None = None,
) -> int:
    """Run the scheduler of an engine until SIGTERM. Returns the exit code; logs what is wrong."""
    try:
        process = Process(config, info, address=address, run_dir=run_dir, keys=keys)
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    on_termination(process.stop, supervised=supervised)
    log.debug("listening on %s", address)
    return process.run()
