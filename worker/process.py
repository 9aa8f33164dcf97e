"""The worker process: says Hello, loads what it is told to, then replays plans until it is told to stop.

One thread, one socket. Between messages it waits there, unless a launched step is to be read; inside a step the ranks
wait for each other. A rank that has lost the others drops what they held together and waits to be welcomed again.
"""

import logging
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq

from ..common import kv_files
from ..common.channel import Event, Link, Lost, wires
from ..common.curve import PeerKeys
from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError
from ..common.messages import (
    HEARTBEAT_S,
    PROTOCOL,
    Allocate,
    Allocated,
    Heartbeat,
    Hello,
    Left,
    Message,
    Progress,
    Refused,
    RequestFault,
    Shutdown,
    StepPlan,
    StepResult,
    ToWorker,
    Welcome,
    WorkerFault,
    WorkerReady,
    pack,
)
from ..common.model_info import fingerprint, model_path
from . import failures, kv_cache
from .decoder import Decoder
from .failures import OutOfMemory, StepFailed
from .kv_store import KvFile, host_bytes
from .loading import load_decoder, pick_device, prepare_host
from .parallel import MEETING_S, Group, PeerLost
from .plan import PlanError
from .runner import Pending, Runner, peak_bytes

log = logging.getLogger(__name__)

PROGRESS_S = 0.1  # between two reports of loading
NO_EPOCH = 0


def main(*, scheduler: str, rank: int, device: str | None, keys: PeerKeys | None = None) -> int:
    """Serve as `rank` of the engine whose scheduler is at `scheduler`; returns the exit code.

    `device` is auto, cpu or cuda, None for what the scheduler was told. `keys` go with a scheduler that asks for them.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link: Link[ToWorker] = Link(context, wires(scheduler)[1], ToWorker, keys)
    worker = Worker(link, rank, device)
    try:
        return worker.run()
    except ConfigError as error:
        log.error("%s", error)
        link.send(WorkerFault(rank, _text(error), EXIT_CONFIG))
        return EXIT_CONFIG
    except Exception as error:
        log.exception("this worker cannot go on")
        link.send(WorkerFault(rank, f"{type(error).__name__}: {_text(error)}", EXIT_FATAL))
        return EXIT_FATAL
    finally:
        worker.group.close()
        if worker.file:
            worker.file.close()
        link.close()  # what was sent still goes out, for a second at most
        context.term()


def _text(error: Exception) -> str:
    """As it can cross the wire: a path that is not UTF-8 may be in it."""
    return str(error).encode(errors="replace").decode()


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose result is still to be told. Times are seconds of this process."""

    plan: StepPlan
    pending: Pending
    began_at: float
    done_at: float | None  # None: not yet, when the launch returned


class CalledAway(Exception):
    """The scheduler has something else in mind for this worker."""


class Worker:
    """What this process is in a scheduler's eyes. Survives the scheduler, the other ranks and steps that fail: under a
    new epoch the weights are kept, rows are not."""

    def __init__(self, link: Link[ToWorker], rank: int, device: str | None) -> None:
        self.link = link
        self.rank = rank
        self.device = device
        self.epoch = NO_EPOCH
        self.left = NO_EPOCH  # of the group that cannot come together again
        self.step: int | None = None  # the last one of this epoch
        self.welcome: Welcome | None = None  # what was loaded for
        self.ready: WorkerReady | None = None
        self.decoder: Decoder | None = None
        self.runner: Runner | None = None
        self.group = Group()
        self.file: KvFile | None = None
        self.launched: deque[Launched] = deque()  # not answered yet; of rank 0 alone
        self.done_at = 0.0  # when the last step was, that was answered
        self.ending: Shutdown | Refused | None = None  # heard while the ranks met
        self.beat_at = 0.0

    def run(self) -> int:
        while True:
            try:
                return self._converse()
            except CalledAway as error:
                log.info("%s", error)
                left = None
            except PeerLost as error:
                log.warning("%s; what runs is dropped until the scheduler forms another group", error)
                left = Left(self.rank, self.epoch, _text(error))
            except StepFailed as error:
                log.exception("what runs is dropped until the scheduler forms another group")
                left = Left(self.rank, self.epoch, _text(error), isinstance(error, OutOfMemory))
            # Not before: the error held the frames of the step, hence its tensors and the communicator.
            self._leave(left)

    def _converse(self) -> int:
        while True:
            self._beat()
            while self.launched and self.launched[0].pending.ready:
                self._answer()
            match self._receive():
                case None if self.launched:
                    self._answer()
                case StepPlan() as plan if plan.epoch == self.epoch and self.runner:
                    self._launch(self.runner, plan)
                case Welcome() as welcome if welcome.epoch not in (self.epoch, self.left):
                    self._start(welcome)
                case Allocate() as allocate if allocate.epoch == self.epoch and self.decoder:
                    self._allocate(self.decoder, allocate)
                case Heartbeat(epoch) if epoch != self.epoch and self.epoch:
                    raise CalledAway("the scheduler forms another group")
                case Event.LOST:
                    raise PeerLost("messages of the scheduler were lost")
                case Refused(why):
                    log.error("the scheduler refused this worker: %s", why)
                    return EXIT_CONFIG
                case Shutdown():
                    return 0
                case _:  # a heartbeat, or a message of another epoch
                    pass

    def _receive(self) -> ToWorker | Lost | None:
        """The next message. Does not wait while there is something to answer."""
        if self.ending:
            return self.ending
        return self.link.receive(0.0 if self.launched else max(0.0, self.beat_at - time.monotonic()))

    def _send(self, message: Message) -> None:
        self.link.send(message)
        self.beat_at = time.monotonic() + HEARTBEAT_S

    def _beat(self) -> None:
        """A sign of life, when one is due. Called between pieces of work: who is silent hangs in one of them."""
        if time.monotonic() >= self.beat_at:
            self._send(Heartbeat(self.epoch, self.link.codec.bad_frames) if self.epoch else self._hello())

    def _hello(self) -> Hello:
        name = f"worker {self.rank} on {platform.node()}, pid {os.getpid()}"
        return Hello(PROTOCOL, "worker", name, self.rank, self.ready.fingerprint if self.ready else "")

    def _leave(self, left: Left | None) -> None:
        """End what this epoch began. Rows go with it: no plan reaches them, and `Allocate` empties them."""
        self.group.close()
        self.launched.clear()
        self.left, self.epoch, self.step = self.epoch or self.left, NO_EPOCH, None
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()
        if left and left.epoch:
            self._send(left)
        self._send(self._hello())

    def _start(self, welcome: Welcome) -> None:
        """Load the model, or show that it is loaded."""
        if self.welcome and (welcome.config, welcome.model) != (self.welcome.config, self.welcome.model):
            raise ConfigError("the scheduler came back with other options; a worker must be started anew for them")
        self.epoch = welcome.epoch
        if self.decoder is None:
            self.group = self._new_group(welcome)
        # Who holds the weights waits for the others as long as the supervisor lets it: they are dear to load.
        patience_s = math.inf if self.decoder else MEETING_S
        self.group.join(welcome.rendezvous, epoch=welcome.epoch, patience_s=patience_s, meanwhile=self._stay)
        if self.decoder is None:
            self.decoder, self.welcome = self._load(welcome), welcome
        if self.ready is None:
            self.ready = _measured(welcome, self.rank, self.decoder, self._beat)
        self._send(self.ready)

    def _stay(self) -> None:
        """Called while this rank waits for the others. Raises CalledAway when there is something else to do, and PeerLost
        when something was missed that may have said so."""
        self._beat()  # a new scheduler learns of us by it
        match self.link.receive(0.0):
            case Shutdown() | Refused() as message:
                self.ending = message
            case Welcome(epoch) | Heartbeat(epoch) if epoch != self.epoch:
                pass
            case Event.LOST:
                raise PeerLost("messages of the scheduler were lost while the ranks met")
            case _:
                return
        raise CalledAway("called away while the ranks met")

    def _new_group(self, welcome: Welcome) -> Group:
        """For the model that the scheduler sees; raises ConfigError when this host has another."""
        config = welcome.config
        path = model_path(config.model.model)
        try:
            found = fingerprint(path)
        except OSError as error:
            raise ConfigError(f"{path}: {error}") from None
        if found != welcome.model.fingerprint:
            raise ConfigError(f"{path}: this is not the checkpoint that the scheduler sees; compare the files")
        prepare_host(config, path)
        device = pick_device(self.device or config.model.device, self.rank)
        return Group(self.rank, config.parallel.tensor_parallel_size, device)

    def _load(self, welcome: Welcome) -> Decoder:
        path, started = model_path(welcome.config.model.model), time.monotonic()
        reported_at = 0.0

        def report(done: int, total: int) -> None:
            nonlocal reported_at
            if time.monotonic() >= reported_at + PROGRESS_S:
                reported_at = time.monotonic()
                detail = f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
                self._send(Progress("loading", done / total, detail))

        decoder = load_decoder(
            path,
            welcome.config.model,
            self.group,
            self.group.device,
            block_size=welcome.config.cache.block_size,
            max_model_len=welcome.model.max_model_len,
            on_bytes=report,
            between=self._beat,
        )
        log.info("loaded %s in %.2f s", path, time.monotonic() - started)
        return decoder

    def _allocate(self, decoder: Decoder, message: Allocate) -> None:
        assert self.welcome, "a decoder was loaded for somebody"
        self._send(Progress("allocating", 0.0))
        config, num_saved = self.welcome.config, message.host_blocks + message.disk_blocks
        if self.runner and self.runner.size == (
            message.num_blocks,
            message.block_size,
            message.num_blocks + 1 + num_saved,
        ):
            self.runner.rows.clear()
        else:
            self.runner = None  # before there is another: both may not fit
            self.runner = Runner(
                decoder,
                num_rows=config.scheduler.max_num_seqs,
                max_len=self.welcome.model.max_model_len,
                num_blocks=message.num_blocks,
                block_size=message.block_size,
                num_host_blocks=message.host_blocks,
                file=self._file(self.welcome, decoder, message),
                between=self._beat,
            )
        self._send(Progress("warming up", 0.0))
        self.runner.warm_up()
        host_s, disk_s = self.runner.store.restoring_takes()
        self._send(Allocated(self.rank, host_s, disk_s, self.file.id if self.file else ""))

    def _file(self, welcome: Welcome, decoder: Decoder, message: Allocate) -> KvFile | None:
        """Where KV is kept on disk, if it is. Stays open."""
        if message.disk_blocks and self.file is None:
            dtype, layout = str(decoder.dtype).removeprefix("torch."), decoder.backend.kv_layout
            folder = kv_files.folder(welcome.config, welcome.model, dtype, layout)
            block = kv_cache.block_shape(decoder.kv_shape, message.block_size)
            self.file = KvFile(folder, self.rank, message.disk_blocks, block, decoder.dtype)
        return self.file

    def _launch(self, runner: Runner, plan: StepPlan) -> None:
        """Replay the next plan. One that comes again is dropped."""
        if self.step is not None and plan.step <= self.step:
            log.warning("dropped the plan of step %d, which came again", plan.step)
            return
        with failures.step():
            if self.step is not None and plan.step != self.step + 1:
                raise PlanError(f"step {plan.step} came behind step {self.step}")
            began = time.perf_counter()
            pending = runner.launch(plan)
        self.step = plan.step
        if self.rank == 0:
            self.launched.append(Launched(plan, pending, began, time.perf_counter() if pending.ready else None))

    def _answer(self) -> None:
        """The oldest step that was launched."""
        launched = self.launched.popleft()
        plan = launched.plan
        with failures.step():
            output = launched.pending.read()
        done_at = launched.done_at or time.perf_counter()
        took_us = int(1e6 * (done_at - max(launched.began_at, self.done_at)))
        self.done_at = done_at
        for row, why in output.faults:
            self._send(RequestFault(plan.epoch, plan.step, row, why))
        counts = pack(int(token is not None) for token in output.tokens)
        tokens = pack(token for token in output.tokens if token is not None)
        best = output.best_ids, output.best_logprobs
        self._send(StepResult(plan.epoch, plan.step, counts, tokens, took_us, *best))


def _measured(welcome: Welcome, rank: int, decoder: Decoder, between: Callable[[], None]) -> WorkerReady:
    config = welcome.config
    available = kv_cache.available_bytes(
        config.cache,
        decoder.device,
        num_ranks=config.parallel.tensor_parallel_size,
        peak_bytes=lambda: peak_bytes(
            decoder,
            num_rows=config.scheduler.max_num_seqs,
            max_len=welcome.model.max_model_len,
            block_size=config.cache.block_size,
            num_tokens=config.scheduler.max_num_batched_tokens,
            between=between,
        ),
    )
    return WorkerReady(
        rank=rank,
        fingerprint=welcome.model.fingerprint,
        device=_described(decoder.device),
        dtype=str(decoder.dtype).removeprefix("torch."),
        block_bytes=kv_cache.block_bytes(decoder.kv_shape, config.cache.block_size, decoder.dtype),
        available_bytes=available,
        host_bytes=host_bytes(config.cache, decoder.device, num_ranks=config.parallel.tensor_parallel_size),
        window=max(window or 0 for window in windows) if all(windows := decoder.spec.windows) else 0,
        disk_bytes=int(config.cache.kv_disk_space * 2**30) if config.cache.kv_disk else 0,
        kv_layout=decoder.backend.kv_layout,
    )


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"
