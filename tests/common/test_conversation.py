"""Whatever happens to frames: what is heard of a conversation is what was said, from its start and without a hole."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.channel import LOST, Hub, Speaker
from quire.common.config import EngineConfig
from quire.common.conversation import HEADER_BYTES, Conversation, Verdict, outside, split
from quire.common.messages import (
    PROTOCOL,
    STRANGER_EPOCH,
    Abort,
    FromFrontend,
    Heartbeat,
    Hello,
    ToFrontend,
    Welcome,
)

from .network import ADDRESS, PEER, Network
from .wire import INFO


class Scheduler:
    """Welcomes, and tells (conversation, number). Checks that each conversation is heard whole from its Hello on."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.answers: list[int] = [0]  # which of the peer's conversations each of ours answers
        self.begin_anew()

    def begin_anew(self) -> None:
        """As a new process does; nothing is known any more."""
        self.hub: Hub[Any] = Hub(self.network, ADDRESS, FromFrontend)  # type: ignore[arg-type]
        self.expected: tuple[int, int] | None = None
        self.lost = 0

    def listen(self) -> None:
        for _, message in self.hub.received(10**6):
            match message:
                case Hello(_, _, name):
                    self.greet(*map(int, name.split()))
                case Abort([session, number]):
                    assert self.expected == (session, number)
                    self.expected = (session, number + 1)
                case _:
                    assert message is LOST and self.expected is not None
                    self.expected, self.lost = None, self.lost + 1

    def greet(self, session: int, number: int) -> None:
        if self.expected is None:
            self.answers.append(session)
            self.said = 0
        else:
            assert self.expected == (session, number)
        self.expected = (session, number + 1)
        self.said += 1
        self.hub.send(PEER, Welcome(len(self.answers) - 1, EngineConfig(), INFO, str(self.said)))

    def tell(self) -> None:
        if self.expected is not None:
            self.said += 1
            self.hub.send(PEER, Heartbeat(len(self.answers) - 1, self.said))

    def drop(self) -> None:
        self.hub.forget(PEER)
        self.expected = None

    def ask(self) -> None:
        self.hub.ask_for_hello(PEER)
        self.expected = None


NOTHING = (0, 0)


class Peer:
    """Says Hello as every process of ours does, and otherwise (conversation, number). Checks what it is told likewise.

    `expected` is None before the first frame of a conversation, NOTHING once it is lost.
    """

    def __init__(self, network: Network, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.network = network
        self.speaker: Speaker[Any] = Speaker(ToFrontend)
        network.connect()
        self.session = self.said = self.lost = 0
        self.begins, self.welcomed = True, False
        self.expected: tuple[int, int] | None = None

    def speak(self) -> None:
        """What it does once in a while."""
        if not self.welcomed:
            self.greet()
        else:
            self.said += 1
            self.network.send(self.speaker.frame(Abort([self.session, self.said])))

    def greet(self) -> None:
        if self.begins:
            self.session, self.said, self.expected, self.begins = self.session + 1, 0, None, False
        self.said += 1
        self.network.send(self.speaker.frame(Hello(PROTOCOL, "frontend", f"{self.session} {self.said}")))

    def listen(self) -> None:
        while self.network.at_peer:
            frame = self.network.at_peer.popleft()
            match self.speaker.heard(frame):
                case Heartbeat(epoch) if epoch == STRANGER_EPOCH:
                    self.begins |= split(frame)[1] == self.session
                    self.asked()
                case Heartbeat(epoch, number):
                    self.heard(epoch, number)
                case Welcome(epoch, _, _, number):
                    self.heard(epoch, int(number))
                    self.begins = self.welcomed = True
                case None:
                    pass
                case lost:
                    assert lost is LOST
                    self.expected, self.begins, self.lost = NOTHING, True, self.lost + 1
                    self.welcomed = False

    def asked(self) -> None:
        """To say Hello."""
        self.welcomed = False

    def heard(self, conversation: int, number: int) -> None:
        assert self.scheduler.answers[conversation] == self.session, "a stale frame"
        assert self.expected in (None, (conversation, number))
        self.expected = (conversation, number + 1)


class EagerPeer(Peer):
    """Says Hello whenever it is asked to, be it a hundred times for a hundred frames that nobody wanted."""

    def asked(self) -> None:
        super().asked()
        self.greet()


class Both:
    """Peer and scheduler, and everything that may happen between them."""

    def __init__(self, peer: type[Peer] = Peer) -> None:
        self.network = Network()
        self.scheduler = Scheduler(self.network)
        self.peer = peer(self.network, self.scheduler)

    def deliver(self, direction: str, count: int) -> None:
        self.network.deliver(direction, count)
        (self.scheduler if direction == "up" else self.peer).listen()

    def lose(self, direction: str, which: int) -> None:
        if frames := self.network.under_way(direction):
            del frames[which % len(frames)]

    def repeat(self, direction: str, which: int) -> None:
        if frames := self.network.under_way(direction):
            frames.insert(which, frames[which % len(frames)])

    def reorder(self, direction: str, which: int) -> None:
        if frames := self.network.under_way(direction):
            frames.rotate(which)

    def replay(self, direction: str, which: int) -> None:
        if frames := self.network.seen[direction]:
            self.network.under_way(direction).append(frames[which % len(frames)])

    def reconnect(self, direction: str, num_lost: int) -> None:
        """What was on the connection is gone: some of what the peer sent, all that it was sent."""
        for _ in range(min(num_lost, len(self.network.up))):
            self.network.up.popleft()
        self.network.down.clear()
        self.network.connect()

    def restart(self, direction: str, num_lost: int) -> None:
        """Another scheduler at the same address."""
        self.reconnect(direction, num_lost)
        self.network.at_hub.clear()
        self.scheduler.begin_anew()

    def speak(self, direction: str, count: int) -> None:
        for _ in range(count % 4 + 1):
            self.peer.speak() if direction == "up" else self.scheduler.tell()

    def end(self, direction: str, which: int) -> None:
        self.scheduler.drop() if direction == "up" else self.scheduler.ask()

    def settle(self) -> None:
        """Nothing is lost any more: a few turns later both are in one conversation, and hear each other."""
        for _ in range(8):
            self.peer.speak()
            self.scheduler.tell()
            self.deliver("up", 10**9)
            self.deliver("down", 10**9)
        assert self.peer.welcomed and self.scheduler.answers[-1] == self.peer.session
        assert self.scheduler.expected == (self.peer.session, self.peer.said + 1)
        assert self.peer.expected == (len(self.scheduler.answers) - 1, self.scheduler.said + 1)


DIRECTIONS = st.sampled_from(["up", "down"])
HONEST = ("speak", "deliver", "lose", "reconnect", "restart", "end")
HOSTILE = ("repeat", "reorder", "replay")


def happenings(*kinds: str) -> st.SearchStrategy[list[tuple[str, str, int]]]:
    return st.lists(st.tuples(st.sampled_from(kinds), DIRECTIONS, st.integers(0, 9)), max_size=60)


@pytest.mark.parametrize("kinds", [HONEST, HONEST + HOSTILE], ids=["honest link", "hostile link"])
@settings(max_examples=400, deadline=None)
@given(data=st.data(), peer=st.sampled_from([Peer, EagerPeer]))
def test_conversations_are_heard_whole_or_ended(kinds: tuple[str, ...], peer: type[Peer], data: st.DataObject) -> None:
    both = Both(peer)
    for kind, direction, number in data.draw(happenings(*kinds)):
        getattr(both, kind)(direction, number)
    both.settle()


@pytest.mark.parametrize("direction", ["up", "down"])
@given(num_lost=st.integers(1, 5), num_later=st.integers(1, 3))
def test_a_loss_is_found_by_the_next_frame_and_ends_the_conversation_for_both(
    direction: str, num_lost: int, num_later: int
) -> None:
    both = Both()
    both.settle()
    session = both.peer.session
    for _ in range(num_lost):
        both.speak(direction, 0)
        both.lose(direction, 0)
    assert both.peer.lost == both.scheduler.lost == 0
    for _ in range(num_later):
        both.speak(direction, 0)
    both.deliver(direction, num_later)
    heard = both.scheduler if direction == "up" else both.peer
    assert heard.lost == 1
    both.settle()
    assert both.peer.session == session + 1
    assert heard.lost == 1


@given(num_stale=st.integers(0, 20))
def test_one_new_conversation_is_enough_however_often_it_is_asked_for(num_stale: int) -> None:
    """Each frame of the old one is answered by a request for another. A worker's group ends with each conversation."""
    both = Both(EagerPeer)
    both.settle()
    session = both.peer.session
    both.scheduler.ask()
    for _ in range(num_stale):
        both.peer.speak()
    both.settle()
    assert both.peer.session == session + 1
    assert both.scheduler.lost == both.peer.lost == 0


def test_a_peer_of_which_a_stale_hello_was_heard_last_is_asked_for_another() -> None:
    both = Both()
    both.settle()
    both.scheduler.ask()
    both.settle()
    assert both.peer.session == 2
    both.scheduler.drop()
    both.replay("up", 0)
    both.deliver("up", 1)
    assert both.scheduler.expected == (1, 2)
    both.settle()
    assert both.peer.session == 3


@given(st.lists(st.integers(1, 9)), st.integers(0, 2**48))
def test_a_count_may_begin_anywhere(numbers: list[int], base: int) -> None:
    conversation = Conversation(1)
    accepted = [n for n in numbers if conversation.judge(1, base + n) is Verdict.NEXT]
    assert accepted == list(range(numbers[0], numbers[0] + len(accepted))) if numbers else not accepted


def test_a_header_says_conversation_and_number() -> None:
    conversation = Conversation()
    conversation.begin(7)
    assert [split(conversation.header() + b"x") for _ in range(2)] == [(7, 1, b"x"), (7, 2, b"x")]
    assert split(outside(7) + b"x") == (0, 7, b"x")


@pytest.mark.parametrize("frame", [b"", b"\x01" * (HEADER_BYTES - 1), b"\x01\0\0\0" + b"\0" * 8])
def test_frames_without_a_header_are_refused(frame: bytes) -> None:
    with pytest.raises(ValueError):
        split(frame)
