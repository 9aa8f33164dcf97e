"""Worker processes, and a scheduler made of a `Hub` that says what tests tell it to, over real sockets."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from quire.common.channel import LOST, Hub, wires
from quire.common.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from quire.common.messages import (
    PROTOCOL,
    Allocate,
    Allocated,
    FromWorker,
    Heartbeat,
    Hello,
    Progress,
    StepResult,
    Welcome,
    WorkerReady,
    unpack,
)
from quire.common.model_info import read_model_info

from .plans import admit, make_plan

PATIENCE_S = 60.0
CODE = """
import sys, logging
from quire.common.process import on_termination
from quire.worker.process import main
on_termination(lambda: sys.exit(0), supervised=True)
logging.basicConfig(level="INFO")
{planted}
sys.exit(main(scheduler=sys.argv[1], rank=int(sys.argv[2]), device=None))
"""
BLOCK_SIZE = 8
PROMPT = [5, 9, 200, 31, 7]


class Scheduler:
    """The scheduler's end of the workers' wire, told what to say by the tests."""

    def __init__(self, folder: Path, path: Path, size: int = 1, **model: Any) -> None:
        self.address = f"ipc://{folder}"
        self.config = EngineConfig(
            model=ModelConfig(model=str(path), dtype="float32", **model),
            cache=CacheConfig(block_size=BLOCK_SIZE, kv_cache_memory=1 << 20),
            scheduler=SchedulerConfig(max_num_seqs=4),
            parallel=ParallelConfig(tensor_parallel_size=size, threads=1),
        )
        self.info = read_model_info(str(path), path, max_model_len=64)
        self.folder, self.size = folder, size
        self.context = zmq.Context()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.epoch = 0
        self.listen(epoch=7)

    def listen(self, epoch: int) -> None:
        """Start, or start anew."""
        if self.epoch:
            self.hub.close()
        self.hub: Hub[FromWorker] = Hub(self.context, wires(self.address)[1], FromWorker)
        self.peers: dict[int, bytes] = {}
        self.form_group(epoch)

    def form_group(self, epoch: int) -> None:
        """The workers are to meet anew: those that can be reached are told so."""
        for identity in self.peers.values():
            self.hub.send(identity, Heartbeat(epoch))
        self.epoch = epoch
        self.rendezvous = f"file://{self.folder}/rendezvous-{epoch}" if self.size > 1 else ""
        self.peers = {}
        self.hellos: dict[int, Hello] = {}

    def start_worker(self, rank: int = 0, planted: str = "") -> subprocess.Popen[bytes]:
        """`planted`: code that runs before the worker does."""
        code = CODE.format(planted=planted)
        self.workers.append(subprocess.Popen([sys.executable, "-c", code, self.address, str(rank)]))
        return self.workers[-1]

    def messages(self, patience_s: float = PATIENCE_S) -> Iterator[tuple[bytes, Any]]:
        """Whatever comes, until patience ends."""
        deadline = time.monotonic() + patience_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self.hub.socket.poll(int(left_s * 1000)):
                yield from self.hub.received(1)

    def expect(self, kind: type, patience_s: float = PATIENCE_S) -> tuple[bytes, Any]:
        """The next message of this kind. Before it comes nothing else that matters in this group; who has not said Hello
        to it is not heard."""
        for identity, message in self.messages(patience_s):
            if isinstance(message, Hello) or identity in self.peers.values():
                if isinstance(message, kind):
                    return identity, message
                assert message is LOST or isinstance(message, Heartbeat | Progress | Hello), message
        raise AssertionError(f"no {kind.__name__} came")

    def welcome(self) -> None:
        identity, hello = self.expect(Hello)
        assert hello.protocol == PROTOCOL
        self.peers[hello.rank], self.hellos[hello.rank] = identity, hello
        self.hub.send(identity, Welcome(self.epoch, self.config, self.info, self.rendezvous))

    def meet(self, num_blocks: int = 12) -> list[WorkerReady]:
        """The handshake of all ranks, up to the first plan."""
        while len(self.peers) < self.size:
            self.welcome()
        ready = [self.expect(WorkerReady)[1] for _ in range(self.size)]
        self.tell(Allocate(self.epoch, num_blocks, BLOCK_SIZE))
        for _ in range(self.size):
            self.expect(Allocated)
        return ready

    def tell(self, message: Any) -> None:
        for identity in self.peers.values():
            assert self.hub.send(identity, message)

    def plan(self, *args: Any, **fields: Any) -> None:
        self.tell(make_plan(*args, **{"epoch": self.epoch, **fields}))

    def continue_prompt(self, new_tokens: int) -> list[int]:
        """Two steps in flight: each is planned before the one before it has answered."""
        length = len(PROMPT)
        self.plan(0, [(2, 0, length, True)], admitted=[admit(2, PROMPT, [3, 1, 4, 2])])
        for step in range(1, new_tokens):
            self.plan(step, [(2, length + step - 1, 1, True)])
        ids = []
        for step in range(new_tokens):
            identity, result = self.expect(StepResult)
            assert (identity, result.epoch, result.step) == (self.peers[0], self.epoch, step)
            assert unpack(result.counts) == [1]
            ids += unpack(result.tokens)
        self.plan(new_tokens, [], released=[2])
        assert unpack(self.expect(StepResult)[1].tokens) == []
        return ids

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.hub.close()
        self.context.term()
