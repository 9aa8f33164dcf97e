"""The HTTP port: bound once, before anything else, and inherited by every frontend."""

import errno
import socket

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


def url_of(sock: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use by {_holder(port)}; stop it, or choose another port with --port (0 picks a free one)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host}: this machine has no such address; use 127.0.0.1 for this machine only, 0.0.0.0 for every interface"
    if error.errno == errno.EACCES:
        return f"--port {port}: this user may not listen on it; ports from 1024 on are free to all"
    return f"cannot listen on {host}, port {port}: {error.strerror}"


def _holder(port: int) -> str:
    import psutil  # noqa: PLC0415 (only a refusal needs it)

    try:
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                command = " ".join(psutil.Process(connection.pid).cmdline())
                shown = command if len(command) <= _WITHIN else command[:_WITHIN] + "..."
                return f"process {connection.pid} ({shown})"
    except psutil.Error:
        pass  # not ours to look at: the port is in use all the same
    return "another user's process"
