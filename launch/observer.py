"""What the scheduler tells of the engine's state, to a process that sends no requests."""

import os
import time
from typing import Any

import zmq

from ..common.channel import Link, wires
from ..common.errors import EngineError
from ..common.messages import HEARTBEAT_S, PROTOCOL, Heartbeat, Hello, Refused, Status, ToFrontend, Welcome


class Observer:
    """One end of the frontends' wire. Call `statuses` whenever `socket` is readable, and every `HEARTBEAT_S` at least."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._link: Link[Any] = Link(self._context, wires(address)[0], ToFrontend)
        self._hello = Hello(PROTOCOL, "observer", f"supervisor, pid {os.getpid()}")
        self._spoke_at = 0.0
        self.welcome: Welcome | None = None

    @property
    def socket(self) -> Any:
        return self._link.socket

    def statuses(self) -> list[Status]:
        """Those that came since the last call. Never waits. Raises EngineError when the scheduler refuses us."""
        found = []
        while self.socket.poll(0):
            match self._link.receive(0):
                case Status() as status:
                    found.append(status)
                case Welcome() as welcome:
                    self.welcome = welcome
                case Heartbeat(epoch) if self.welcome and epoch != self.welcome.epoch:
                    self.welcome, self._spoke_at = None, 0.0  # another scheduler: introduce ourselves again
                case Refused(why):
                    raise EngineError(f"the scheduler refused the supervisor: {why}")
        self._speak()
        return found

    def _speak(self) -> None:
        now = time.monotonic()
        if now - self._spoke_at >= HEARTBEAT_S:
            self._link.send(Heartbeat(self.welcome.epoch) if self.welcome else self._hello)
            self._spoke_at = now

    def close(self) -> None:
        self._link.close()
        self._context.destroy(linger=0)
