"""HTTP by hand: what a client library would tidy up, refuse or complete goes to the server as it is."""

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def connect(url: str, timeout_s: float = 10.0) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


def request(url: str, method: str, target: str, *headers: str, host: str = "localhost") -> Answer:
    """The answer to a request without a body."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return parsed(_exchange(url, "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n", half_close=False))


def send(url: str, content: bytes) -> bytes:
    """Raw bytes to the server, the end of them, and all that comes back until it closes."""
    return _exchange(url, content, half_close=True)


def _exchange(url: str, content: bytes, *, half_close: bool) -> bytes:
    with connect(url) as connection:
        try:
            connection.sendall(content)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has closed already; what it said is still to be read
            pass
        return until_closed(connection)


def until_closed(connection: socket.socket) -> bytes:
    """Raises TimeoutError when it stays open and says nothing."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionError:
        pass
    return received


def parsed(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return Answer(int(first.split()[1]), {name.lower(): value.strip() for name, _, value in fields}, body)
