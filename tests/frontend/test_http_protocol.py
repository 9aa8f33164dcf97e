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
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from quire.frontend.connections import IDLE_S, TELL_EVERY_S, Connections
from quire.frontend.http_protocol import MAX_PIPELINED, BoundedHttpProtocol, Timeouts
from quire.frontend.middleware import MAX_HEADER_BYTES

SHORT_S = 0.4
LARGE = 16 << 20  # bytes, more than the kernel's buffers hold
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the bytes of the body and the names of the headers; GET /slow answers late, GET /large with much, POST /early before the body has come."""
    size, more = 0, scope["method"] == "POST" and scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * SHORT_S)
    if scope["path"] == "/begun":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"and", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    answer = b"%d %s" % (size, b",".join(name for name, _ in scope["headers"]))
    if scope["path"] == "/large":
        answer = b"a" * LARGE
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(answer)).encode())]}
    )
    await send({"type": "http.response.body", "body": answer})


@contextlib.contextmanager
def serving(timeouts: Timeouts, places: int = 1000) -> Iterator[tuple[str, int]]:
    protocol = partial(BoundedHttpProtocol, timeouts=timeouts, connections=Connections(places))
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
    trailers = CHUNKED + b"2\r\nhi\r\n0\r\n"
    for head, piece in (
        *((b"GET / HTTP/1.1\r\n", b"x: a\r\n"), (UPLOAD, b"a"), (b"", b"\r\n"), (b"GET / HTTP/1.1\r\nx: ", b"a")),
        *((trailers, b"x: a\r\n"), (trailers + b"x: ", b"a"), (CHUNKED, b"1\r\na\r\n"), (CHUNKED + b"2;a=", b"a")),
    ):
        with socket.create_connection(hasty, timeout=10) as connection:
            connection.sendall(head)
            began = time.monotonic()
            with pytest.raises(ConnectionError):
                while time.monotonic() - began < 30 * SHORT_S:
                    connection.sendall(piece)
                    time.sleep(SHORT_S / 10)


def test_a_request_is_answered_once(hasty: tuple[str, int]) -> None:
    """Also when it is answered before all of it has come, and the rest never does."""
    early = UPLOAD.replace(b"/", b"/early", 1)
    for head, rest in (
        (early, b""),
        (early, b"a"),
        (CHUNKED.replace(b"/", b"/early", 1), b"0\r\nx: " + b"a" * 100_000),
    ):
        with socket.create_connection(hasty, timeout=10) as connection:
            connection.sendall(head)
            received = connection.recv(65536)
            connection.sendall(rest)
            assert (received + until_closed(connection)).count(b"HTTP/1.1 ") == 1


def test_the_time_that_an_answer_takes_does_not_count(hasty: tuple[str, int]) -> None:
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    for behind in (b"", b"\r\n", b"GET / HT", UPLOAD):
        with socket.create_connection(hasty, timeout=10) as connection:
            connection.sendall(slow + behind)
            received = until_closed(connection) if behind else connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        assert (b"HTTP/1.1 408" in received) == (len(behind) > 2)


def test_an_answer_that_nobody_reads_is_let_go() -> None:
    """Its connection would stay for ever: it closes only once everything is sent."""
    with serving(Timeouts(read_s=SHORT_S), places=1) as address:
        reader = socket.create_connection(address, timeout=10)
        reader.sendall(GET.replace(b"GET /", b"GET /large"))
        while not ask(address).startswith(b"HTTP/1.1 200"):  # the one place is free again
            time.sleep(SHORT_S / 10)
        assert len(until_closed(reader)) < LARGE
        reader.close()


def test_requests_behind_an_unanswered_one_are_bounded(patient: tuple[str, int]) -> None:
    """One packet may bring thousands, which all cost memory."""
    slow = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    for behind, whole in ((MAX_PIPELINED, True), (MAX_PIPELINED + 1, False), (20_000, False)):
        with socket.create_connection(patient, timeout=10) as connection:
            connection.sendall(slow + GET * (behind - 1) + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            assert until_closed(connection).count(b"HTTP/1.1 200") == (behind + 1 if whole else 0)


@pytest.mark.parametrize("junk", [b"\x00\xff\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"x: " + b"a" * 100_000])
def test_what_follows_is_told_or_closes(patient: tuple[str, int], junk: bytes) -> None:
    """The last words of an answer must not be another one."""
    for path, begun in ((b"/slow", 0), (b"/begun", 1)):
        with socket.create_connection(patient, timeout=10) as connection:
            connection.sendall(GET.replace(b"/", path, 1))
            received = connection.recv(65536) if begun else b""
            connection.sendall(junk)
            received += until_closed(connection)
        assert received.count(b"HTTP/1.1 200") == begun and received.count(b"HTTP/1.1 4") == 1 - begun


def test_an_answer_to_a_connection_that_was_cut_off_is_no_error(
    patient: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(patient, timeout=10) as connection:
        connection.sendall(GET.replace(b"/", b"/slow", 1) + GET * (MAX_PIPELINED + 1))
        until_closed(connection)
    with socket.create_connection(patient, timeout=10) as connection:  # is answered after it would have been
        connection.sendall(GET.replace(b"/", b"/slow", 1))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# --- places -----------------------------------------------------------------------------------------------------------


def ask(address: tuple[str, int]) -> bytes:
    """The answer on a connection of its own."""
    with socket.create_connection(address, timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return until_closed(connection)


def test_one_connection_too_many_is_answered_and_closed() -> None:
    with serving(Timeouts(), places=3) as address, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(3)]
        for connection in held:
            connection.sendall(GET + b"GET / ")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        refused = ask(address)
        assert refused.startswith(b"HTTP/1.1 503") and b"retry-after: 1\r\n" in refused
        assert b'"code":"overloaded"' in refused and refused.count(b"connection: close") == 1
        held[0].sendall(b"HTTP/1.1\r\nHost: x\r\n\r\nGET / ")  # those that are here go on
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200")
        held[1].close()
        while not ask(address).startswith(b"HTTP/1.1 200"):
            time.sleep(0.01)


def test_a_connection_that_asks_for_nothing_gives_way() -> None:
    with serving(Timeouts(), places=2) as address, contextlib.ExitStack() as stack:
        busy, idle = (stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(2))
        busy.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(IDLE_S)
        while not ask(address).startswith(b"HTTP/1.1 200"):
            time.sleep(0.05)
        assert until_closed(idle) == b""
        busy.sendall(b"\r\n")
        assert busy.recv(65536).startswith(b"HTTP/1.1 200")


class Guest:
    def __init__(self) -> None:
        self.gone = False

    def give_way(self) -> None:
        self.gone = True


steps_of_guests = st.tuples(
    st.sampled_from(["come", "come", "ask", "rest", "leave"]), st.integers(0, 5), st.sampled_from([0.0, 0.6, IDLE_S])
)


@settings(deadline=None, max_examples=300)
@given(steps=st.lists(steps_of_guests, max_size=40))
def test_places_are_kept_count_of(steps: list[tuple[str, int, float]]) -> None:
    """Never more than there are, and only the one that has rested longest, and long enough, gives way."""
    places, now = Connections(4), 0.0
    here: dict[Guest, float | None] = {}  # since when it rests
    for step, which, passed in [*[("come", 0, 0.3)] * 4, *steps]:
        now += passed
        guest = list(here)[which] if which < len(here) and step != "come" else Guest()
        if step == "come":
            resting = {g: since for g, since in here.items() if since is not None}
            oldest = min(resting, key=resting.__getitem__, default=None)
            may_come = len(here) < 4 or (oldest is not None and now - resting[oldest] >= IDLE_S)
            assert places.admit(guest, now) == may_come
            if len(here) == 4 and may_come:
                (gone,) = (g for g in here if g.gone)
                assert resting[gone] == resting[oldest]
                del here[gone]
            if may_come:
                places.rests(guest, now)
                here[guest] = now
        elif step == "ask":
            places.asks(guest)
            here.update({guest: None} if guest in here else {})
        elif step == "rest":
            places.rests(guest, now)
            here.update({guest: now} if guest in here else {})
        else:
            places.left(guest)
            here.pop(guest, None)
        assert not any(g.gone for g in here)


def test_refusals_are_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    places = Connections(1)
    assert places.admit(Guest(), 0.0)
    for tenth in range(1000):
        assert not places.admit(Guest(), tenth * TELL_EVERY_S / 400)
    assert [record.message.split()[0] for record in caplog.records] == ["1", "400", "400"]
