"""Frames that nobody of ours sends, at both wires of an engine: they are dropped and counted, and nothing else is felt."""

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from quire.common.channel import Codec
from quire.common.conversation import outside
from quire.common.messages import (
    PROTOCOL,
    Abort,
    Allocated,
    GetStats,
    Heartbeat,
    Hello,
    Left,
    Message,
    Progress,
    Refused,
    RequestFault,
    StepPlan,
    StepResult,
    Submit,
    ToFrontend,
    ToWorker,
    Welcome,
    WorkerFault,
    WorkerReady,
    pack,
)
from quire.common.sampling import SamplingParams

from ..common.attack import Stranger
from ..common.mutation import Mutator
from ..conftest import Sizes
from ..e2e.server import wait_until
from .engine import Engine

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=4)
OF_FRONTENDS: list[Message] = [
    Hello(PROTOCOL, "frontend", "stranger"),
    Heartbeat(1),
    Submit(1, pack([5, 6, 7]), GREEDY, salt="s", tenant="t", output=pack([8])),
    Abort([1, 2, 3]),
    GetStats(),
]
OF_WORKERS: list[Message] = [
    Hello(PROTOCOL, "worker", "stranger", 0),
    Heartbeat(1),
    Progress("loading", 0.5, "half"),
    WorkerReady(0, "fingerprint", "cpu", "float32", 100, 10**9),
    Allocated(0),
    StepResult(1, 1, pack([1, 1]), pack([5, 6])),
    RequestFault(1, 1, 0, "why"),
    Left(0, 1, "why"),
    WorkerFault(0, "why", 70),
]
WIRES = {"frontends": OF_FRONTENDS, "workers": OF_WORKERS}
LOG_LINES = 60  # that any number of bad frames and of strangers may cost: one at each doubling


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def socket_of(engine: Engine, wire: str) -> str:
    (run_dir,) = engine.runtime.glob("quire-*")
    return f"ipc://{run_dir}/{wire}"


@contextlib.contextmanager
def unmoved(engine: Engine) -> Iterator[None]:
    """What is done in the block does not change what the engine serves, holds, or prints."""
    parts = [engine.part(role) for role in ("frontend", "scheduler", "worker")]
    before = [part.memory_info().rss for part in parts]
    printed = len(engine.log().splitlines())
    yield
    engine.check()
    assert [engine.part(role).pid for role in ("frontend", "scheduler", "worker")] == [part.pid for part in parts]
    grown = [part.memory_info().rss - rss for part, rss in zip(parts, before, strict=True)]
    assert max(grown) < 40 << 20, grown  # the first thousands cost some arenas, the next hundred thousands nothing
    lines = engine.log().splitlines()[printed:]
    complaints = [line for line in lines if "dropped a frame" in line or "refused" in line]
    assert len(complaints) < LOG_LINES, "\n".join(complaints[-5:])
    assert not [line for line in lines if "Traceback" in line]
    since = time.monotonic()
    engine.complete("import os", max_tokens=1)
    assert time.monotonic() - since < 5.0


def bad_frames(engine: Engine, wire: str) -> float:
    with contextlib.suppress(AssertionError):  # none yet
        return engine.metric("quire:bad_frames_total", wire=wire)
    return 0.0


@pytest.mark.parametrize("wire", WIRES)
def test_noise_and_spoilt_messages_of_strangers(
    engine: Engine, context: zmq.Context[Any], sizes: Sizes, wire: str
) -> None:
    mutator = Mutator(1, WIRES[wire])
    before = bad_frames(engine, wire)
    with unmoved(engine):
        named = Stranger(context, socket_of(engine, wire))
        nameless = Stranger(context, socket_of(engine, wire), named=False)
        for _ in range(sizes.frames // 4):
            named.send(mutator.next())
            named.send(outside(0) + mutator.next())
            named.send(*(mutator.next() for _ in range(mutator.random.randint(2, 5))))
            nameless.say(mutator.next())
        wait_until(lambda: bad_frames(engine, wire) - before > sizes.frames * 0.6, 60)
        named.close()
        nameless.close()
    assert bad_frames(engine, wire) - before <= sizes.frames


@pytest.mark.parametrize("wire", WIRES)
def test_a_peer_that_says_hello_and_then_anything(
    engine: Engine, context: zmq.Context[Any], sizes: Sizes, wire: str
) -> None:
    """On the workers' wire it is refused, the rank being taken; on the other it is heard, and may ask for anything."""
    mutator = Mutator(2, WIRES[wire])
    before = bad_frames(engine, wire)
    with unmoved(engine):
        peer = Stranger(context, socket_of(engine, wire))
        for i in range(sizes.frames):
            if i % 50 == 0:
                peer.hello("frontend" if wire == "frontends" else "worker")
            peer.say(mutator.next())
        wait_until(lambda: bad_frames(engine, wire) - before > sizes.frames * 0.5, 60)
        peer.close()


@pytest.mark.parametrize("wire", WIRES)
def test_frames_that_come_twice_late_or_in_another_order(
    engine: Engine, context: zmq.Context[Any], sizes: Sizes, wire: str
) -> None:
    chance = random.Random(3)
    before = bad_frames(engine, wire)
    with unmoved(engine):
        peer = Stranger(context, socket_of(engine, wire))
        for _ in range(sizes.frames // 20):
            peer.hello("frontend" if wire == "frontends" else "worker", rank=chance.randint(0, 1))
            for _ in range(9):
                peer.say(chance.choice(WIRES[wire][1:]))
            again = [chance.choice(peer.sent[-200:]) for _ in range(10)]
            for frame in chance.choice((sorted, list, lambda frames: frames * 1))(again):
                peer.send(frame)
        wait_until(lambda: bad_frames(engine, wire) > before, 60)
        peer.close()


@pytest.mark.parametrize("wire", WIRES)
def test_strangers_of_other_versions_roles_and_ranks(
    engine: Engine, context: zmq.Context[Any], sizes: Sizes, wire: str
) -> None:
    codec: Codec[Any] = Codec(ToFrontend if wire == "frontends" else ToWorker)
    role = "frontend" if wire == "frontends" else "worker"
    hellos = [
        Hello(PROTOCOL + 1, role, "newer"),
        Hello(PROTOCOL - 1, role, "older"),
        Hello(2**63, role, "much newer"),
        Hello(PROTOCOL, "worker" if wire == "frontends" else "frontend", "lost"),
        Hello(PROTOCOL, "worker", "another", -1),
        Hello(PROTOCOL, "worker", "another", 2**62),
        Hello(PROTOCOL, "worker", "twin", 0),
    ]
    with unmoved(engine):
        peer = Stranger(context, socket_of(engine, wire))
        for i in range(sizes.frames):
            peer.conversation.begin(i + 1)
            peer.say(hellos[i % len(hellos)])
        wait_until(lambda: peer.drain() or len(peer.told) >= sizes.frames // 2, 60)
        peer.close()
    messages = [codec.decode(body) for body in peer.told]
    assert any(isinstance(message, Refused) for message in messages)
    assert not any(isinstance(message, Welcome) for message in messages)


def test_a_stranger_that_comes_for_the_rank_of_a_living_worker(engine: Engine, context: zmq.Context[Any]) -> None:
    codec: Codec[Any] = Codec(ToWorker)

    def told() -> list[Any]:
        peer.drain()
        return [codec.decode(body) for body in peer.told]

    def refused() -> bool:
        peer.hello("worker")
        return any(isinstance(message, Refused) for message in told())

    with unmoved(engine):
        peer = Stranger(context, socket_of(engine, "workers"))
        wait_until(refused, 30)
        peer.say(WorkerFault(0, "end it all", 1))
        peer.say(Left(0, 1, "end it all"))
        engine.complete("import os", max_tokens=1)
        assert not [message for message in told() if isinstance(message, Welcome | StepPlan)]
        peer.close()
