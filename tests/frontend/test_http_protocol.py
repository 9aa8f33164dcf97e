"""What one connection may cost: bytes that are no body, and time; with raw sockets against a server that counts a body."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from quire.frontend.http_protocol import BoundedHttpProtocol, Timeouts
from quire.frontend.middleware import MAX_HEADER_BYTES

SHORT_S = 0.4
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the bytes of the body and the names of the headers; GET /slow answers late."""
    size, more = 0, scope["method"] == "POST"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * SHORT_S)
    answer = b"%d %s" % (size, b",".join(name for name, _ in scope["headers"]))
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(answer)).encode())]}
    )
    await send({"type": "http.response.body", "body": answer})


@contextlib.contextmanager
def serving(timeouts: Timeouts) -> Iterator[tuple[str, int]]:
    protocol = partial(BoundedHttpProtocol, timeouts=timeouts)
    config = uvicorn.Config(
        count, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=1, timeout_graceful_shutdown=1
    )  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        yield sock.getsockname()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def patient() -> Iterator[tuple[str, int]]:
    with serving(Timeouts()) as address:
        yield address


@pytest.fixture(scope="module")
def hasty() -> Iterator[tuple[str, int]]:
    with serving(Timeouts(head_s=SHORT_S, body_s=2 * SHORT_S)) as address:
        yield address


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET / HTTP/1.1\r\n", b"x: %s\r\n" % (b"a" * 1000)),
        (CHUNKED + b"2\r\nhi\r\n0\r\n", b"x: %s\r\n" % (b"a" * 1000)),
        (CHUNKED + b"2\r\nhi\r\n0\r\nx: ", b"a" * 1000),
        (CHUNKED + b"2;a=", b"a" * 1000),
        (CHUNKED + b"0\r\nx: a\r\n\r\nGET / HTTP/1.1\r\n", b"x: %s\r\n" % (b"a" * 1000)),
    ],
    ids=["headers", "trailers", "one trailer", "chunk extension", "headers behind a request"],
)
def test_bytes_that_are_no_body_are_bounded(patient: tuple[str, int], begin: bytes, more: bytes) -> None:
    with socket.create_connection(patient, timeout=10) as connection:
        connection.sendall(begin)
        time.sleep(0.1)  # what comes in one packet with the beginning does not count
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 16 << 20:
                connection.sendall(more * 50)
                sent += len(more * 50)
        assert MAX_HEADER_BYTES <= sent < 16 << 20


@pytest.mark.parametrize("chunks", [[b"a" * (16 << 20)], [b"abc"] * 100_000, [b"a" * 70_000] * 20])
def test_a_body_of_any_shape_is_taken(patient: tuple[str, int], chunks: list[bytes]) -> None:
    url = f"http://127.0.0.1:{patient[1]}"
    with httpx.Client(timeout=20) as client:
        for _ in range(2):  # the same connection
            answer = client.post(url, content=iter(chunks))
            assert answer.text.split()[0] == str(sum(map(len, chunks)))


def test_trailers_are_no_headers(patient: tuple[str, int]) -> None:
    with socket.create_connection(patient, timeout=10) as connection:
        connection.sendall(CHUNKED + b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
        assert connection.recv(65536).endswith(b"\r\n\r\n2 host,transfer-encoding")


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost", b"HTTP/1.1 408"),
        (UPLOAD + b"{", b"HTTP/1.1 408"),
        (CHUNKED + b"2\r\nhi\r\n0\r\nx: a", b"HTTP/1.1 408"),
    ],
    ids=["nothing", "half a head", "half a body", "half a trailer"],
)
def test_a_client_that_sends_no_more_is_let_go(hasty: tuple[str, int], sent: bytes, answer: bytes) -> None:
    with socket.create_connection(hasty, timeout=10) as connection:
        connection.sendall(sent)
        received = until_closed(connection)
    assert received.startswith(answer) and bool(received) == bool(answer)
    if answer:
        assert b"connection: close" in received and b"request_timeout" in received


def test_trickling_does_not_help(hasty: tuple[str, int]) -> None:
    for head, piece in ((b"GET / HTTP/1.1\r\n", b"x: a\r\n"), (UPLOAD, b"a"), (b"", b"\r\n")):
        with socket.create_connection(hasty, timeout=10) as connection:
            connection.sendall(head)
            began = time.monotonic()
            with pytest.raises(ConnectionError):
                while time.monotonic() - began < 30 * SHORT_S:
                    connection.sendall(piece)
                    time.sleep(SHORT_S / 10)


def test_the_time_that_an_answer_takes_does_not_count(hasty: tuple[str, int]) -> None:
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    for behind in (b"", b"\r\n", b"GET / HT", UPLOAD):
        with socket.create_connection(hasty, timeout=10) as connection:
            connection.sendall(slow + behind)
            received = until_closed(connection) if behind else connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        assert (b"HTTP/1.1 408" in received) == (len(behind) > 2)
