"""The HTTP port: bound once, before anything else, and inherited by every frontend."""

import contextlib
import errno
import socket
from collections.abc import Iterable
from typing import Any

from ..common.errors import ConfigError

BACKLOG = 2048
_WITHIN = 60  # characters of a command line that a message shows


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError that says who holds the port, or what else is wrong."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"--host {host}: {error.strerror}; use 127.0.0.1 for this machine only, 0.0.0.0 for every interface"
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(_refusal(error, host, port)) from None
    return sock


def inherited(descriptor: int) -> socket.socket:
    """A listening socket that another process made. Raises ConfigError when `descriptor` is none."""
    try:
        sock = socket.socket(fileno=descriptor)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f"--fd {descriptor}: this socket does not listen")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--fd {descriptor}: this is no socket that was inherited ({error})") from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use by {holder_of(port)}; stop it, or choose another port with --port (0 picks a free one)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: this machine has no such address; use 127.0.0.1 for this machine only, 0.0.0.0 for every interface"
    if error.errno == errno.EACCES:
        return f"--port {port}: this user may not listen on it; ports from 1024 on are free to all"
    return f"cannot listen on {host}, port {port}: {error.strerror}"


def holder_of(port: int) -> str:
    """Who listens on this TCP port, in words."""
    import psutil  # noqa: PLC0415 (only a refusal needs it)

    def listens(connections: Iterable[Any]) -> list[Any]:
        return [c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]

    try:
        pid = next((c.pid for c in listens(psutil.net_connections("tcp")) if c.pid), None)
        if pid is None:
            return "another user's process"
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.AccessDenied):  # another user's process did not start one that holds it
            while (parent := process.parent()) is not None and listens(parent.net_connections("tcp")):
                process = parent  # a server's children have the port from it
        command = " ".join(process.cmdline())
        return f"process {process.pid} ({command[:_WITHIN]}{'...' if len(command) > _WITHIN else ''})"
    except psutil.Error:  # not ours to look at, or gone meanwhile
        return "another process"
