"""A scheduler that costs nothing, for one frontend: every sequence gets a token a step, from no model.

    python benchmarks/stand_in.py ipc:///DIRECTORY [--step-ms 0]

It speaks the frontends' wire (common/messages.py). Tokens are those of the prompt, over and over. Each line on stdin is
another number of milliseconds for a step; 0 makes the next one at once.
"""

import argparse
import select
import sys
import time
from array import array
from dataclasses import dataclass

import zmq

from quire.common.channel import Hub, Lost, wires
from quire.common.config import EngineConfig
from quire.common.messages import (
    HEARTBEAT_S,
    Abort,
    Capacity,
    FromFrontend,
    Heartbeat,
    Hello,
    Output,
    Outputs,
    Status,
    Submit,
    Welcome,
    unpack,
)
from quire.common.model_info import model_path, read_model_info

EPOCH = 1
ROOM = Capacity(num_blocks=65_536, block_size=16, max_model_len=2048, max_num_seqs=1024)
MODEL = "demo"  # whose tokenizer the frontend loads


@dataclass(slots=True)
class Sequence:
    prompt: array  # type: ignore[type-arg]
    length: int  # that its output is to have
    given: int = 0


class StandIn:
    def __init__(self, address: str) -> None:
        self.hub: Hub[FromFrontend] = Hub(zmq.Context(), wires(address)[0], FromFrontend)
        self._welcome = Welcome(EPOCH, EngineConfig(), read_model_info(MODEL, model_path(MODEL)))
        self._running: dict[bytes, dict[int, Sequence]] = {}
        self._beat_at = 0.0

    @property
    def idle(self) -> bool:
        return not any(self._running.values())

    def hear(self, now: float) -> None:
        for peer, message in self.hub.received(10_000):
            self._take(peer, message)
        if now - self._beat_at > HEARTBEAT_S / 2:
            self._beat_at = now
            for peer in self._running:
                self.hub.send(peer, Heartbeat(EPOCH))

    def _take(self, peer: bytes, message: FromFrontend | Lost) -> None:
        match message:
            case Hello():
                self._running[peer] = {}
                self.hub.send(peer, self._welcome)
                self.hub.send(peer, Status("ready", 1.0, capacity=ROOM))
            case Submit():
                prompt = array("i", unpack(message.prompt))
                self._running[peer][message.id] = Sequence(prompt, message.sampling.max_tokens or 1)
            case Abort(ids):
                for id in ids:
                    self._running[peer].pop(id, None)

    def step(self) -> None:
        """A token for everybody."""
        for peer, sequences in self._running.items():
            outputs = []
            for id, sequence in list(sequences.items()):
                first = sequence.given
                sequence.given += 1
                ended = sequence.given == sequence.length
                token = sequence.prompt[first % len(sequence.prompt)]
                outputs.append(Output(id, first, [token], "length" if ended else None))
                if ended:
                    del sequences[id]
            if outputs:
                self.hub.send(peer, Outputs(outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--step-ms", type=float, default=0.0)
    options = parser.parse_args()
    scheduler, step_s = StandIn(options.address), options.step_ms / 1000
    poller = zmq.Poller()
    poller.register(scheduler.hub.socket, zmq.POLLIN)
    poller.register(sys.stdin, zmq.POLLIN)
    due = 0.0
    while True:
        now = time.monotonic()
        wait_s = HEARTBEAT_S / 2 if scheduler.idle else max(due - now, 0.0)
        poller.poll(round(1000 * wait_s))
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            step_s = float(line) / 1000
        now = time.monotonic()
        scheduler.hear(now)
        if not scheduler.idle and now >= due:
            scheduler.step()
            due = max(due + step_s, now)


if __name__ == "__main__":
    main()
