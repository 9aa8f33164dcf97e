"""Ports that a test must know before anybody listens on them."""

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator

_FIRST = 10_000
_LAST = 30_000  # from 32,768 on, the kernel gives them to outgoing connections
_SHARES = 8  # of test processes that run side by side
_STEP = 4


def _starts() -> Iterator[int]:
    """All of this process's share: none is given twice in a while, and none that another process gives."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
    size = (_LAST - _FIRST) // _SHARES
    numbers = list(range(_FIRST + process * size, _FIRST + (process + 1) * size, _STEP))
    first = random.SystemRandom().randrange(len(numbers))
    return itertools.cycle(numbers[first:] + numbers[:first])


_STARTS = _starts()


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    assert count <= _STEP
    for first in _STARTS:
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for number in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", number)))
            return first
    raise AssertionError("unreachable")


def free_port() -> int:
    return free_ports(1)
