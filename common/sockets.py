"""Sockets as both ends of a wire need them, and what becomes of a peer's connections."""

import contextlib
import logging
import os
import time
import uuid
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from . import curve
from .conversation import HEADER_BYTES
from .errors import ConfigError
from .messages import HEARTBEAT_S, MAX_FRAME_BYTES, PEER_TIMEOUT_S

log = logging.getLogger(__name__)

HUB_BACKLOG = 10_000  # frames of, or for, one peer that may wait here; who sends more waits, who reads less is gone
NAMED = b"q"  # begins the identity of each of our peers; ZeroMQ's own names, of peers that have none, begin with 0
EVERYWHERE = "internal sockets do not listen on every interface; name the address of one"
RETRY_S = 1.0  # after a refusal
HANDSHAKE_S = 5.0  # from connection to first frame; then it is ended

_REFUSALS: Final[dict[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not know the keys of this process",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "only one of the two has keys, or no scheduler listens there",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it ends each connection at once; it has other keys, or is no scheduler",
}
_HANDSHAKES: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | sum(_REFUSALS)
_ALONE: Final = 8  # refusals without a reason that mean nothing: it may just have died


def router(context: Any, address: str, keys: "curve.SchedulerKeys | None") -> Any:
    """A bound socket. Raises ConfigError."""
    socket = context.socket(zmq.ROUTER)
    _tune(socket, address)
    if keys is not None:
        curve.guard(socket, keys)
    socket.setsockopt(zmq.SNDHWM, HUB_BACKLOG)
    socket.setsockopt(zmq.RCVHWM, HUB_BACKLOG)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error here, not a silent loss
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects takes its identity along
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    host = socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[0]
    if host.strip("[]").endswith(("//0.0.0.0", ":0.0.0.0", "[::")):  # by any spelling
        socket.close()
        raise ConfigError(f"{address}: {EVERYWHERE}")
    return socket


class _Watched:
    """A dealer that is the last to hold its monitor: ZeroMQ's own threads would wait for ever for one that is closed."""

    news: Any = None

    def watch(self: Any) -> None:
        """Have what becomes of its connections told to `news`."""
        where = f"inproc://{uuid.uuid4().hex}"
        self.monitor(where, zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_DISCONNECTED | _HANDSHAKES)
        # In a context of its own (which is the same to ZeroMQ): that of the dealer does not close it, then.
        self.news = type(self.context).shadow(self.context).socket(zmq.PAIR)
        self.news.setsockopt(zmq.RCVHWM, 0)  # nor must it ever be full
        self.news.connect(where)

    def close(self: Any, linger: int | None = None) -> None:
        if self.news is not None and not self.closed:
            with contextlib.suppress(zmq.ZMQError):  # the context is gone
                self.monitor(None, 0)
            self.news.close(linger=0)
        super().close(linger)  # type: ignore[misc]


class _Dealer(_Watched, zmq.Socket[bytes]):
    pass


class _AsyncDealer(_Watched, zmq.asyncio.Socket):
    pass


def dealer(context: Any, address: str, keys: "curve.PeerKeys | None") -> Any:
    """A connected socket of the context's kind, with an identity of its own that survives reconnection. Raises
    ConfigError."""
    kind = _AsyncDealer if isinstance(context, zmq.asyncio.Context) else _Dealer
    socket = context.socket(zmq.DEALER, socket_class=kind)
    _tune(socket, address)
    socket.setsockopt(zmq.IDENTITY, NAMED + uuid.uuid4().bytes + os.getpid().to_bytes(4, "little"))
    if keys is not None:
        curve.introduce(socket, keys)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)  # and no longer each time: a scheduler is back within half a second
    socket.watch()
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"cannot connect to {address}: {error.strerror}") from None
    return socket


def _tune(socket: Any, address: str) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)  # bounded above, by admission; a full queue here would drop messages silently
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + HEADER_BYTES)
    socket.setsockopt(zmq.IPV6, int("[" in address))
    if address.startswith("tcp://"):  # on one host a dead peer's connection closes; a paused one is waited for
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(PEER_TIMEOUT_S * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    with contextlib.suppress(AttributeError, zmq.ZMQError):  # not on every platform, and only tcp needs it
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


class Line:
    """A dealer's connections, one after the other. `news` is to be read, and given to `heed`.

    ZeroMQ connects again by itself, silently. It gives up, though, when the other side breaks the protocol or refuses
    its keys, which may be mended one day: `connect_again` is due RETRY_S after `gave_up_at`.
    """

    def __init__(self, socket: Any, address: str) -> None:
        self._socket, self._address = socket, address
        self.news = socket.news
        self.gave_up_at: float | None = None
        self._num_refusals = 0

    def heed(self, news: list[bytes]) -> bool:
        """Whether there is a new connection."""
        event = int(parse_monitor_message(news)["event"])
        if event == zmq.EVENT_DISCONNECTED:
            self.gave_up_at = time.monotonic()
            return False
        self.gave_up_at = None
        if event in _REFUSALS:
            self._refused(event)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_refusals = 0
            return True
        return False

    def _refused(self, event: int) -> None:
        self._num_refusals += 1
        telling = event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or self._num_refusals >= _ALONE
        if telling and self._num_refusals.bit_count() == 1:
            why = _REFUSALS[event]
            log.warning("cannot talk to %s (attempt %d): %s", self._address, self._num_refusals, why)

    def connect_again(self) -> None:
        self.gave_up_at = None
        with contextlib.suppress(zmq.ZMQError):  # else it holds that it is connected
            self._socket.disconnect(self._address)
        self._socket.connect(self._address)
