"""What the tests with real processes share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ..ports import free_ports
from .processes import Server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a script of launch/ with options."""
    started: list[Server] = []

    def begin(script: str, *options: str, streams: str = "") -> Server:
        started.append(Server(tmp_path, f"{len(started)}", script, *options, streams=streams))
        return started[-1]

    yield begin
    for server in started:
        for process in (server.process, *server.below):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def port() -> int:
    """The one after it is free as well."""
    return free_ports(2)
