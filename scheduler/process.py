"""The scheduler process: two sockets, one loop. What it decides is in `startup`, `serving` and `scheduler`."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from ..common.channel import Hub, encode, wires
from ..common.config import EngineConfig
from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError, EngineError
from ..common.messages import (
    HEARTBEAT_S,
    PEER_TIMEOUT_S,
    PHASES,
    Abort,
    Allocate,
    Allocated,
    Capacity,
    FromFrontend,
    FromWorker,
    GetStats,
    Heartbeat,
    Hello,
    Output,
    Outputs,
    Progress,
    Refused,
    RequestFault,
    Shutdown,
    Stats,
    Status,
    StepResult,
    Submit,
    Welcome,
    WorkerFault,
    WorkerReady,
)
from ..common.model_info import ModelInfo
from ..common.process import on_termination
from . import startup
from .peers import STRANGER_EPOCH, Frontends, Worker, WorkerGroup
from .recorder import Recorder
from .scheduler import Scheduler
from .serving import Serving

log = logging.getLogger(__name__)

STARTING_POLL_S = 0.1  # how often progress is passed on during a start
FRAMES_PER_TURN = 1024  # of each wire: a flood on one does not starve the other


class Process:
    """The loop. `run()` in any thread; `stop()` from any thread or signal handler."""

    def __init__(self, config: EngineConfig, info: ModelInfo, *, address: str, run_dir: Path) -> None:
        """Binds both wires. Raises ConfigError when it cannot."""
        self.config, self.info = config, info
        self.epoch = _new_epoch()  # of this scheduler, to frontends
        self._context: zmq.Context[Any] = zmq.Context()
        frontends_wire, workers_wire = wires(address)
        try:
            self._to_frontends: Hub[Any] = Hub(self._context, frontends_wire, FromFrontend)
            self._to_workers: Hub[Any] = Hub(self._context, workers_wire, FromWorker)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._frontends = Frontends()
        self._workers = _new_group(config, info, run_dir)
        self._recorder = Recorder(info.model, caching=config.cache.enable_prefix_caching)
        self._serving: Serving | None = None  # once the workers have memory
        self._status = startup.phase([], self._workers.num_ranks)
        self._told_at = self._beat_at = self._turn_at = time.monotonic()
        self._checked = True
        self._stopping = False
        self._wake_reader, self._wake_writer = os.pipe()
        self._poller = zmq.Poller()
        for socket in (self._to_workers.socket, self._to_frontends.socket, self._wake_reader):
            self._poller.register(socket, zmq.POLLIN)

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            os.write(self._wake_writer, b"x")

    def run(self) -> int:
        """Serve until `stop`, a fault or a configuration that cannot be served. Returns the process's exit code."""
        code = 0
        try:
            while not self._stopping:
                self._turn()
            self._broadcast_to_all(Shutdown())
        except ConfigError as error:
            code = self._fail(str(error), EXIT_CONFIG)
        except EngineError as error:
            if self._stopping:  # whoever stops this process may have stopped the workers, too
                log.info("%s", error)
            else:
                code = self._fail(str(error), EXIT_FATAL)
        except Exception as error:
            log.exception("the scheduler cannot go on")
            code = self._fail(f"the scheduler failed: {type(error).__name__}: {error}", EXIT_FATAL)
        finally:
            self._close()
        return code

    def _fail(self, why: str, code: int) -> int:
        log.error("%s", why)
        self._broadcast_frontends(Status("failed", detail=why))
        for identity in self._workers:
            self._to_workers.send(identity, Shutdown())
        return code

    def _close(self) -> None:
        self._stopping = True  # the pipe is about to go: a late signal must not write to it
        self._to_frontends.close()
        self._to_workers.close()
        self._context.term()  # waits for what was sent last, a second at most
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _turn(self) -> None:
        wait_s = HEARTBEAT_S if self._serving is not None else STARTING_POLL_S
        self._poller.poll(int(wait_s * 1000))
        now = time.monotonic()
        if now - self._turn_at > PEER_TIMEOUT_S / 2:
            self._frontends.forgive(now)
        self._turn_at = now
        self._receive("workers", self._to_workers, self._from_worker)
        self._receive("frontends", self._to_frontends, self._from_frontend)
        if self._serving is None:
            self._tell_progress(now)
        else:
            self._dispatch(self._serving)
            self._flush(self._serving)
        if now - self._beat_at >= HEARTBEAT_S:
            self._beat(now)

    def _receive(self, wire: str, hub: Hub[Any], handle: Callable[[bytes, Any], None]) -> None:
        bad_frames = hub.codec.bad_frames
        for identity, message in hub.received(FRAMES_PER_TURN):
            handle(identity, message)
        for _ in range(hub.codec.bad_frames - bad_frames):
            self._recorder.bad_frame(wire)

    # --- frontends ----------------------------------------------------------------------------------------------------

    def _from_frontend(self, identity: bytes, message: Any) -> None:
        now = time.monotonic()
        if isinstance(message, Hello):
            self._welcome(self._to_frontends, identity, message, self._frontends.greet(identity, message, now))
            return
        peer = self._frontends.heard(identity, now)
        if peer is None:
            self._to_frontends.send(identity, Heartbeat(STRANGER_EPOCH))
            return
        match message:
            case Submit() if self._serving is None:
                output = Output(message.id, 0, [], "error", error="the engine is not ready", rejection="overloaded")
                self._to_frontends.send(identity, Outputs([output]))
            case Submit() if peer.role == "frontend":
                assert self._serving is not None
                self._serving.submit(identity, message, now)
                self._checked = False
            case Abort() if self._serving is not None:
                self._serving.abort(identity, message.ids)
            case GetStats():
                if self._serving is not None:
                    self._recorder.levels(self._serving.scheduler)
                self._to_frontends.send(identity, Stats(self._recorder.metrics.render()))

    def _welcome(self, hub: Hub[Any], identity: bytes, hello: Hello, objection: str | None) -> None:
        if objection is not None:
            log.warning("refused %s: %s", hello.name, objection)
            hub.send(identity, Refused(objection))
            return
        log.debug("welcomed %s", hello.name)
        if hub is self._to_frontends:
            hub.send(identity, Welcome(self.epoch, self.config, self.info))
            hub.send(identity, self._status)
        else:
            hub.send(identity, Welcome(self._workers.epoch, self.config, self.info, self._workers.rendezvous))
        self._count_peers()

    def _drop_frontend(self, identity: bytes, why: str) -> None:
        peer = self._frontends.remove(identity)
        num_requests = self._serving.drop(identity) if self._serving is not None else 0
        level = logging.WARNING if num_requests else logging.DEBUG  # nothing is lost when one ends that had none
        log.log(level, "%s %s; %d requests of it were freed", peer.name, why, num_requests)
        self._count_peers()

    def _count_peers(self) -> None:
        for role in ("frontend", "observer"):
            self._recorder.peers(role, self._frontends.count(role))
        self._recorder.peers("worker", len(self._workers.all))

    # --- workers ------------------------------------------------------------------------------------------------------

    def _from_worker(self, identity: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self._welcome(self._to_workers, identity, message, self._workers.greet(identity, message))
            return
        worker = self._workers.get(identity)
        if worker is None:
            self._to_workers.send(identity, Heartbeat(STRANGER_EPOCH))
            return
        match message:
            case Progress(phase) if phase in PHASES:
                worker.progress = message
            case WorkerReady(rank) if rank == worker.rank:
                self._worker_ready(identity, worker, message)
            case Allocated(rank) if rank == worker.rank and self._workers.capacity is not None:
                worker.allocated = True
                self._serve_when_allocated(self._workers.capacity)
            case StepResult() if (
                worker.rank == 0 and message.epoch == self._workers.epoch and self._serving is not None
            ):
                self._result(self._serving, message)
            case RequestFault() if (
                worker.rank == 0 and message.epoch == self._workers.epoch and self._serving is not None
            ):
                self._serving.fault(message, time.monotonic())
            case WorkerFault(_, why, code):
                raise (ConfigError if code == EXIT_CONFIG else EngineError)(f"worker {worker.rank}: {why}")
            case Heartbeat():
                pass
            case _:
                log.warning("dropped a %s of worker %d that is out of place", type(message).__name__, worker.rank)

    def _worker_ready(self, identity: bytes, worker: Worker, ready: WorkerReady) -> None:
        if problem := startup.mismatch(ready, worker, self.info):
            raise ConfigError(problem)
        worker.ready = ready
        log.info("worker %d is loaded: %s, %s", worker.rank, ready.device, ready.dtype)
        if self._workers.capacity is not None:  # it has said so before
            self._to_workers.send(identity, self._allocate(self._workers.capacity))
            return
        reports = [worker.ready for worker in self._workers.all if worker.ready is not None]
        if len(reports) < self._workers.num_ranks:
            return
        max_model_len = self.info.max_model_len
        count = startup.num_blocks(reports, self.config, max_model_len)
        block_size = self.config.cache.block_size
        self._workers.capacity = Capacity(count, block_size, max_model_len, self.config.scheduler.max_num_seqs)
        for identity in self._workers:
            self._to_workers.send(identity, self._allocate(self._workers.capacity))

    def _allocate(self, capacity: Capacity) -> Allocate:
        return Allocate(self._workers.epoch, capacity.num_blocks, capacity.block_size)

    def _serve_when_allocated(self, capacity: Capacity) -> None:
        workers = self._workers.all
        if self._serving is not None or not all(worker.allocated for worker in workers):
            return
        config = self.config
        scheduler = Scheduler(
            config.scheduler, config.cache, capacity.num_blocks, capacity.max_model_len, epoch=self._workers.epoch
        )
        self._serving = Serving(scheduler, self.info, self._recorder, config.scheduler.pipeline_depth)
        log.info("ready: %d KV blocks of %d tokens", capacity.num_blocks, capacity.block_size)
        self._announce(Status("ready", 1.0, capacity=capacity), time.monotonic())

    def _result(self, serving: Serving, result: StepResult) -> None:
        expected = serving.expected_step()
        if expected is None or result.step < expected:
            log.warning("dropped the result of step %d, which has been answered", result.step)
            return
        if result.step > expected:
            raise EngineError(f"the result of step {expected} was lost: step {result.step} was answered next")
        serving.result(result, time.monotonic())
        self._dispatch(serving)  # the device first: the outputs can wait for it, not it for them
        self._flush(serving)

    def _dispatch(self, serving: Serving) -> None:
        while (plan := serving.plan(time.monotonic())) is not None:
            frame = encode(plan)
            for identity in self._workers:
                if not self._to_workers.send_frame(identity, frame):
                    raise self._gone(identity)

    def _gone(self, identity: bytes) -> EngineError:
        worker = self._workers.get(identity)
        assert worker is not None
        return EngineError(f"worker {worker.rank} is gone ({worker.name})")

    # --- to all -------------------------------------------------------------------------------------------------------

    def _flush(self, serving: Serving) -> None:
        for client, outputs in serving.take_outputs():
            if not self._to_frontends.send(client, outputs) and client in self._frontends:
                self._drop_frontend(client, "is gone")

    def _tell_progress(self, now: float) -> None:
        status = startup.phase(self._workers.all, self._workers.num_ranks)
        if status.phase != self._status.phase or (status != self._status and now - self._told_at >= STARTING_POLL_S):
            self._announce(status, now)

    def _announce(self, status: Status, now: float) -> None:
        self._status, self._told_at = status, now
        self._broadcast_frontends(status)

    def _beat(self, now: float) -> None:
        self._beat_at = now
        for identity in self._frontends.silent(now):
            self._drop_frontend(identity, f"has been silent for {PEER_TIMEOUT_S:.0f} s")
        self._broadcast_frontends(Heartbeat(self.epoch))
        frame = encode(Heartbeat(self._workers.epoch))
        for identity in self._workers:
            if not self._to_workers.send_frame(identity, frame):
                raise self._gone(identity)
        if self._serving is not None and self._serving.scheduler.idle and not self._checked:
            self._serving.scheduler.check()
            self._checked = True

    def _broadcast_frontends(self, message: Status | Heartbeat | Shutdown) -> None:
        frame = encode(message)
        for identity in self._frontends:
            if not self._to_frontends.send_frame(identity, frame):
                self._drop_frontend(identity, "is gone")

    def _broadcast_to_all(self, message: Shutdown) -> None:
        self._broadcast_frontends(message)
        for identity in self._workers:
            self._to_workers.send(identity, message)


def _new_epoch() -> int:
    """Higher than any before it on this host."""
    return time.time_ns() // 1_000_000


def _new_group(config: EngineConfig, info: ModelInfo, run_dir: Path) -> WorkerGroup:
    epoch = _new_epoch()
    return WorkerGroup(
        config.parallel.tensor_parallel_size,
        info.fingerprint,
        epoch=epoch,
        rendezvous=startup.rendezvous(config, run_dir, epoch),
    )


def main(config: EngineConfig, info: ModelInfo, *, address: str, run_dir: Path, supervised: bool) -> int:
    """Run the scheduler of an engine until SIGTERM. Returns the exit code; logs what is wrong."""
    try:
        process = Process(config, info, address=address, run_dir=run_dir)
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    on_termination(process.stop, supervised=supervised)
    log.debug("listening on %s", address)
    return process.run()
