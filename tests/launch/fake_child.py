"""A process of an engine that does nothing but what a test asks: `fake_child.py BEHAVIOUR ADDRESS --lifeline=FD`.

scheduler   greets, reports a start and then "ready"; later the phase in the file ADDRESS/phase, noted in ADDRESS/told
steady      holds until END
stubborn    holds, whatever is asked
config      exits as with a wrong configuration, as soon as the file ADDRESS/go exists
killed      ends as if for lack of memory, likewise
done        exits with 0, likewise
downloaded  exits with 0
frontend    ends at GONE with 70, leaving a file "gone" beside ADDRESS, and at END when the file ADDRESS/go exists;
            a file "listening" beside ADDRESS tells that it listens to them
"""

import os
import signal
import sys
import time
from pathlib import Path

import zmq

from quire.common.channel import Hub, wires
from quire.common.config import EngineConfig
from quire.common.errors import EXIT_FATAL
from quire.common.messages import Capacity, FromFrontend, Heartbeat, Hello, Status, Welcome
from quire.common.model_info import ModelInfo
from quire.common.process import END, GONE, die_with_parent, on_termination

MODEL = ModelInfo(
    model="fake",
    architecture="FakeForCausalLM",
    vocab_size=9,
    context_length=64,
    max_model_len=64,
    eos_token_ids=(),
    fingerprint="",
)
CAPACITY = Capacity(10, 16, 64, 8)


def schedule(folder: Path) -> None:
    hub: Hub[FromFrontend] = Hub(zmq.Context(), wires(f"ipc://{folder}")[0], FromFrontend)
    epoch, peers, told = time.time_ns(), set[bytes](), "ready"
    while True:
        hub.socket.poll(50)
        for peer, message in hub.received(1000):
            if isinstance(message, Hello):
                hub.send(peer, Welcome(epoch, EngineConfig(), MODEL))
                hub.send(peer, Status("loading", 0.5, "half of it"))
                hub.send(peer, Status(told, 1.0, "worker 0 is silent", CAPACITY))
                peers.add(peer)
            elif isinstance(message, Heartbeat):
                hub.send(peer, Heartbeat(epoch))
        phase = (folder / "phase").read_text() if (folder / "phase").exists() else "ready"
        if phase and phase != told:
            told = phase
            for peer in peers:
                hub.send(peer, Status(told, 1.0, "worker 0 is silent", CAPACITY))
            (folder / "told").write_text(told)


def front(folder: Path) -> None:
    ending = False

    def end() -> None:
        nonlocal ending
        ending = True

    def farewell(*_: object) -> None:
        (folder.parent / "gone").touch()
        os._exit(EXIT_FATAL)

    on_termination(end, supervised=True)
    signal.signal(GONE, farewell)
    (folder.parent / "listening").touch()  # to signals: one that came before would have ended it
    while not (ending and (folder / "go").exists()):
        time.sleep(0.02)


def main() -> int:
    behaviour, address, lifeline = sys.argv[1:4]
    folder = Path(address.removeprefix("ipc://"))
    die_with_parent(int(lifeline.removeprefix("--lifeline=")))
    if behaviour == "stubborn":
        signal.signal(END, signal.SIG_IGN)
        signal.signal(GONE, signal.SIG_IGN)
    else:
        on_termination(lambda: os._exit(0), supervised=True)
    if behaviour == "scheduler":
        schedule(folder)
    if behaviour == "frontend":
        front(folder)
        return 0
    go = folder / "go"
    while behaviour != "downloaded" and not (behaviour in ("config", "killed", "done") and go.exists()):
        time.sleep(0.02)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return 1 if behaviour == "config" else 0


if __name__ == "__main__":
    sys.exit(main())
