"""A process of an engine that does nothing but what a test asks: `fake_child.py BEHAVIOUR ADDRESS --lifeline=FD`.

scheduler   greets, reports a start and then "ready"
steady      holds until END
stubborn    holds, whatever is asked
config      exits as with a wrong configuration, as soon as the file ADDRESS/go exists
killed      ends as if for lack of memory, likewise
done        exits with 0
"""

import os
import signal
import sys
import time
from pathlib import Path

import zmq

from quire.common.channel import Hub, wires
from quire.common.config import EngineConfig
from quire.common.messages import Capacity, FromFrontend, Heartbeat, Hello, Status, Welcome
from quire.common.model_info import ModelInfo
from quire.common.process import END, die_with_parent, on_termination

MODEL = ModelInfo(
    model="fake",
    architecture="FakeForCausalLM",
    vocab_size=9,
    context_length=64,
    max_model_len=64,
    eos_token_ids=(),
    fingerprint="",
)


def schedule(address: str) -> None:
    hub: Hub[FromFrontend] = Hub(zmq.Context(), wires(address)[0], FromFrontend)
    while hub.socket.poll(10_000):
        for received in hub.received(1000):
            peer, message = received
            if isinstance(message, Hello):
                hub.send(peer, Welcome(7, EngineConfig(), MODEL))
                hub.send(peer, Status("loading", 0.5, "half of it"))
                hub.send(peer, Status("ready", 1.0, "", Capacity(10, 16, 64, 8)))
            elif isinstance(message, Heartbeat):
                hub.send(peer, Heartbeat(7))


def main() -> int:
    behaviour, address, lifeline = sys.argv[1:4]
    die_with_parent(int(lifeline.removeprefix("--lifeline=")))
    if behaviour == "stubborn":
        signal.signal(END, signal.SIG_IGN)
    else:
        on_termination(lambda: os._exit(0), supervised=True)
    if behaviour == "scheduler":
        schedule(address)
    go = Path(address.removeprefix("ipc://")) / "go"
    while behaviour != "done" and not (behaviour in ("config", "killed") and go.exists()):
        time.sleep(0.02)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return 1 if behaviour == "config" else 0


if __name__ == "__main__":
    sys.exit(main())
