"""A real frontend process in front of more connections than it has places or files for."""

import contextlib
import resource
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from quire.common.config import ServerConfig
from quire.frontend.connections import IDLE_S, RESERVED_FILES

from .fake_scheduler import frontend_process, http, until, wait_ready
from .raw import connect

ATTEMPTS = 300
MAX_GROWTH_BYTES = 32 << 20


@contextlib.contextmanager
def crowd(url: str, size: int) -> Iterator[list[socket.socket]]:
    """Connections that are open and ask for nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(url)) for _ in range(size)]


def said(connections: list[socket.socket]) -> list[bytes]:
    """What has come on each so far. It stays there."""
    found = []
    for connection in connections:
        connection.setblocking(False)
        try:
            found.append(connection.recv(65536, socket.MSG_PEEK) or b"closed")
        except BlockingIOError:
            found.append(b"open")
        except ConnectionError:
            found.append(b"closed")
    return found


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_more_idle_connections_than_places(make_scheduler, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        make_scheduler(ServerConfig(max_connections=100)) as scheduler,
        frontend_process(scheduler.address) as (started, url),
        httpx.Client(base_url=url, verify=False) as friend,
    ):
        wait_ready(url)
        process = psutil.Process(started.pid)
        friend.post("/v1/completions", json={"prompt": "hello"}).raise_for_status()
        resident, files = process.memory_info().rss, process.num_fds()
        with crowd(url, ATTEMPTS) as connections:
            until(lambda: said(connections[-1:]) != [b"open"])
            answers = said(connections)
            assert answers.count(b"open") <= 100
            assert all(answer == b"open" or answer.startswith(b"HTTP/1.1 503") for answer in answers)
            for _ in range(3):  # who was here is served
                friend.post("/v1/completions", json={"prompt": "hello"}).raise_for_status()
            time.sleep(IDLE_S)
            for _ in range(20):  # and who comes, in the place of one that only sits there
                http.post(f"{url}/v1/completions", json={"prompt": "hello"}).raise_for_status()
            assert process.memory_info().rss - resident < MAX_GROWTH_BYTES
        until(lambda: process.num_fds() <= files)
        told = capfd.readouterr().err
        assert "all 100 places are taken" in told and len(told.splitlines()) < 20


def test_fewer_files_than_connections(make_scheduler, capfd: pytest.CaptureFixture[str]) -> None:
    """The process counts its files before they run out: who comes too late is told so."""
    with make_scheduler() as scheduler, frontend_process(scheduler.address) as (started, url):
        resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (256, 256))
        wait_ready(url)
        process = psutil.Process(started.pid)
        files = process.num_fds()
        with crowd(url, ATTEMPTS) as connections:
            until(lambda: said(connections[-1:]) != [b"open"])
            answers = said(connections)
            assert answers.count(b"open") <= 256 - RESERVED_FILES
            assert all(answer == b"open" or answer.startswith(b"HTTP/1.1 503") for answer in answers)
            assert process.num_fds() < 256
        until(lambda: process.num_fds() <= files)
        http.post(f"{url}/v1/completions", json={"prompt": "hello"}).raise_for_status()
        assert "192 connections at most: this process may have 256 files open" in capfd.readouterr().err


def test_no_file_is_left(make_scheduler, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever took them: who comes is turned away at no cost, and all is well once there are files again."""
    with make_scheduler() as scheduler, frontend_process(scheduler.address) as (started, url):
        wait_ready(url)
        process = psutil.Process(started.pid)
        with httpx.Client(base_url=url, verify=False) as friend:
            friend.get("/health").raise_for_status()
            files = process.num_fds() + 20
            resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (files, 4096))
            with crowd(url, ATTEMPTS) as connections:
                until(lambda: said(connections[-1:]) != [b"open"])
                began, used = time.monotonic(), cpu_s(process)
                friend.post("/v1/completions", json={"prompt": "hello"}).raise_for_status()
                time.sleep(1.0)
                assert cpu_s(process) - used < 0.3 * (time.monotonic() - began)
                assert said(connections).count(b"open") < files < ATTEMPTS
            until(lambda: http.get(f"{url}/health").status_code == 200)
            http.post(f"{url}/v1/completions", json={"prompt": "hello"}).raise_for_status()
        assert len(capfd.readouterr().err.splitlines()) < 20
