"""Both wires of the scheduler, and the poll that waits for them."""

import contextlib
import logging
import math
import os
from typing import Any

import zmq

from ..common import curve
from ..common.channel import Hub, wires
from ..common.errors import ConfigError
from ..common.messages import FromFrontend, FromWorker, Hello, Refused
from .taps import TappedHub, Taps

log = logging.getLogger(__name__)


class Sockets:
    """Bound to `address`, guarded by `keys`. Raises ConfigError when they cannot be."""

    def __init__(self, address: str, keys: curve.SchedulerKeys | None, taps: Taps) -> None:
        frontends_wire, workers_wire = wires(address)
        self._context: zmq.Context[Any] = zmq.Context()
        self._admission = contextlib.ExitStack()
        self._admission.enter_context(curve.admit(self._context, keys))
        try:
            self.frontends = TappedHub[Any](self._context, frontends_wire, FromFrontend, keys, "frontends", taps)
            self.workers = TappedHub[Any](self._context, workers_wire, FromWorker, keys, "workers", taps)
        except ConfigError:
            self._admission.close()
            self._context.destroy(linger=0)
            raise
        self._num_refused = 0
        self._open = True
        self._wake_reader, self._wake_writer = os.pipe()
        self._poller = zmq.Poller()
        for socket in (self.workers.socket, self.frontends.socket, self._wake_reader):
            self._poller.register(socket, zmq.POLLIN)

    def poll(self, wait_s: float) -> None:
        """Return when a frame is there, after `wake`, or in time."""
        self._poller.poll(math.ceil(wait_s * 1000))

    def wake(self) -> None:
        """End the poll. From any thread or signal handler."""
        if self._open:
            os.write(self._wake_writer, b"x")

    def refuse(self, hub: Hub[Any], identity: bytes, hello: Hello, why: str) -> None:
        """Say no to a peer of one of the wires, and have done with it."""
        self._num_refused += 1
        if self._num_refused.bit_count() == 1:  # the 1st, 2nd, 4th, ...: who is refused may come again and again
            log.warning("refused %s: %s (%d refused so far)", hello.name, why, self._num_refused)
        hub.send(identity, Refused(why))
        hub.forget(identity)

    def close(self) -> None:
        """What was sent last still goes out, for a second at most."""
        self._open = False  # the pipe is about to go: a late signal must not write to it
        self.frontends.close()
        self.workers.close()
        self._admission.close()
        self._context.term()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
