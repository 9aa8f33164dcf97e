"""What the scheduler tells of the engine's state, to a process that sends no requests."""

import os
import time
from typing import TYPE_CHECKING, Any

import zmq

from ..common.channel import LOST, Link, wires
from ..common.errors import EngineError
from ..common.messages import (
    HEARTBEAT_S,
    PROTOCOL,
    STRANGER_EPOCH,
    Heartbeat,
    Hello,
    Message,
    Refused,
    Status,
    ToFrontend,
    Welcome,
)

if TYPE_CHECKING:
    from ..common.curve import PeerKeys

_SEEKING_S = 0.05


class Observer:
    """One end of the frontends' wire. Call `received` or `statuses` whenever `socket` is readable, and every `wait_s` at
    least. `role` names it in logs."""

    def __init__(self, address: str, role: str = "supervisor", keys: "PeerKeys | None" = None) -> None:
        self._role = role
        self._context: zmq.Context[Any] = zmq.Context()
        self._link: Link[Any] = Link(self._context, wires(address)[0], ToFrontend, keys)
        self._hello = Hello(PROTOCOL, "observer", f"{role}, pid {os.getpid()}")
        self._spoke_at = 0.0
        self.welcome: Welcome | None = None
        self.heard = False  # anything at all, at the last call of `statuses`

    @property
    def socket(self) -> Any:
        return self._link.socket

    def statuses(self) -> list[Status]:
        """Those that came since the last call; as `received`."""
        return [message for message in self.received() if isinstance(message, Status)]

    def received(self) -> list[Message]:
        """What came since the last call, but for signs of life. Never waits. Raises EngineError when the scheduler refuses
        us."""
        found: list[Message] = []
        self.heard = False
        while (message := self._link.receive(0)) is not None or self.socket.poll(0):
            self.heard |= message is not None
            match message:
                case Welcome() as welcome:
                    if self.welcome is None:  # else it answers a Hello that was repeated
                        found.append(welcome)
                    self.welcome = welcome
                case Heartbeat(epoch) if epoch == STRANGER_EPOCH or (self.welcome and epoch != self.welcome.epoch):
                    self.introduce()
                case Refused(why):
                    raise EngineError(f"the scheduler refused the {self._role}: {why}")
                case _ if message is LOST:
                    self.introduce()
                case Message() if not isinstance(message, Heartbeat):
                    found.append(message)
        self._speak()
        return found

    def send(self, message: Message) -> None:
        """Once there is a `welcome`."""
        self._link.send(message)

    @property
    def wait_s(self) -> float:
        """Shorter while a connection may come: that makes nothing readable."""
        return HEARTBEAT_S if self.welcome else _SEEKING_S

    def introduce(self) -> None:
        """Say Hello (again) at the next call: this is another scheduler, or one that has missed something."""
        self.welcome, self._spoke_at = None, 0.0

    def _speak(self) -> None:
        now = time.monotonic()
        if now - self._spoke_at >= HEARTBEAT_S:
            self._link.send(Heartbeat(self.welcome.epoch) if self.welcome else self._hello)
            self._spoke_at = now

    def close(self) -> None:
        self._link.close()
        self._context.destroy(linger=0)
