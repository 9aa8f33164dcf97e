"""Who may connect over TCP: CURVE keys (RFC 26/ZMTP-CURVE), one pair for the scheduler, one for all its peers.

`make` writes a launch's two files. The scheduler admits only peers that prove to hold the secret of `peer.keys`, and a
peer speaks only to the scheduler that proves to hold that of `scheduler.keys`; everything between them is encrypted.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
from msgspec import Struct

from .errors import ConfigError

SCHEDULER_FILE, PEER_FILE = "scheduler.keys", "peer.keys"
_DOMAIN = "quire"
K = TypeVar("K", "SchedulerKeys", "PeerKeys")
log = logging.getLogger(__name__)


class SchedulerKeys(Struct, tag="scheduler", tag_field="role", frozen=True, forbid_unknown_fields=True):
    """Z85 text, 40 characters each."""

    public: str
    secret: str
    peer_public: str


class PeerKeys(Struct, tag="peer", tag_field="role", frozen=True, forbid_unknown_fields=True):
    """Z85 text, 40 characters each."""

    public: str
    secret: str
    scheduler_public: str


def make(directory: Path) -> tuple[Path, Path]:
    """Write both files of a new launch, readable by their owner alone: the scheduler's and the peers'.

    Raises ConfigError, and leaves neither, when they cannot be written or one of them is there already.
    """
    (public, secret), (peer_public, peer_secret) = (
        tuple(key.decode() for key in zmq.curve_keypair()) for _ in range(2)
    )
    contents = {
        directory / SCHEDULER_FILE: SchedulerKeys(public=public, secret=secret, peer_public=peer_public),
        directory / PEER_FILE: PeerKeys(public=peer_public, secret=peer_secret, scheduler_public=public),
    }
    made: list[Path] = []
    for path, keys in contents.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                made.append(path)
                out.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")
        except OSError as error:
            for half in made:  # of a pair that fits nothing
                half.unlink()
            hint = "; keys are never overwritten" if isinstance(error, FileExistsError) else ""
            raise ConfigError(f"{path}: {error.strerror}{hint}") from None
    return directory / SCHEDULER_FILE, directory / PEER_FILE


def read_scheduler_keys(path: Path) -> SchedulerKeys:
    """Raises ConfigError."""
    return _read(path, SchedulerKeys, SCHEDULER_FILE)


def read_peer_keys(path: Path) -> PeerKeys:
    """Raises ConfigError."""
    return _read(path, PeerKeys, PEER_FILE)


def _read(path: Path, kind: type[K], usual_name: str) -> K:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others on this host may read it; chmod 600 {path}")
        keys = msgspec.json.decode(path.read_bytes(), type=kind)
        for field in msgspec.structs.fields(kind):
            zmq.curve_public(getattr(keys, field.name).encode())  # a key is 40 characters of Z85
        if zmq.curve_public(keys.secret.encode()).decode() != keys.public:
            raise ValueError("its public key is not that of its secret key")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `quire keys DIR` makes keys") from None
    except (msgspec.DecodeError, ValueError, zmq.ZMQError) as error:
        raise ConfigError(f"{path}: not the file that `quire keys` calls {usual_name} ({error})") from None
    return keys


@contextlib.contextmanager
def admit(context: "zmq.Context[Any]", keys: SchedulerKeys | None) -> Iterator[None]:
    """While this runs, guarded sockets of `context` admit the peers of `keys`, and nobody else. None: nothing is
    guarded, and nothing runs."""
    if keys is None:
        yield
        return
    from zmq.auth.thread import ThreadAuthenticator  # noqa: PLC0415 (only engines on several hosts need it)

    authenticator = ThreadAuthenticator(context)
    # Before it starts: a peer that is refused, be it for a moment, does not try again for a while.
    authenticator.configure_curve_callback(_DOMAIN, _Peers(keys.peer_public.encode()))
    authenticator.start()
    try:
        yield
    finally:
        authenticator.stop()


class _Peers:
    """Decides over a peer that knows the scheduler's public key."""

    def __init__(self, public: bytes) -> None:
        self._public = public
        self._num_refused = 0

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 (pyzmq's signature)
        if key == self._public:
            return True
        self._num_refused += 1
        if self._num_refused.bit_count() == 1:  # who is refused tries again, several times a second
            log.warning("refused a peer with another key than this launch's (%d times so far)", self._num_refused)
        return False


def guard(socket: "zmq.Socket[Any]", keys: SchedulerKeys) -> None:
    """Before `bind`: only peers that `admit` knows get through the handshake; nobody while it does not run."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else ZeroMQ lets everybody in when nobody is there to ask


def introduce(socket: Any, keys: PeerKeys) -> None:
    """Before `connect`."""
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt_string(zmq.CURVE_SERVERKEY, keys.scheduler_public)
