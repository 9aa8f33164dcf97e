"""Servers that the end-to-end tests share."""

from collections.abc import Iterator

import pytest

from .server import Server


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    """The built-in model, as `quire serve` starts it."""
    with Server() as server:
        yield server.wait_ready()
