"""Hosts made of network namespaces: each has one address of its own, all hang on one switch, and so does this host."""

import contextlib
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HOSTS = {"front": "10.99.7.1", "sched": "10.99.7.2", "work0": "10.99.7.3", "work1": "10.99.7.4"}
HERE = "10.99.7.254"
_PREFIX = "quire-"
_OUR_END = "quire-here"
_LOCK = Path("/tmp/tests-network.lock")


class Hosts:
    """`on` is the prefix of a command that runs on a host, `cut` takes its cable out."""

    def on(self, host: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", f"{_PREFIX}{host}")

    @contextlib.contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """Nothing leaves or reaches it, and nobody is told: packets vanish."""
        _ip("-n", f"{_PREFIX}switch", "link", "set", host, "nomaster")
        try:
            yield
        finally:
            _ip("-n", f"{_PREFIX}switch", "link", "set", host, "master", "bridge")


@contextlib.contextmanager
def network() -> Iterator[Hosts]:
    """The hosts while the block runs, one test at a time. Skips the test where they cannot be made."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _made() as hosts:
            yield hosts


@contextlib.contextmanager
def _made() -> Iterator[Hosts]:
    allowed = (
        shutil.which("ip")
        and not subprocess.run(["ip", "netns", "add", f"{_PREFIX}probe"], capture_output=True, check=False).returncode
    )
    if not allowed:
        pytest.skip("network namespaces need root and iproute2")
    _ip("netns", "del", f"{_PREFIX}probe")
    _remove()
    try:
        switch = ("-n", f"{_PREFIX}switch")
        _ip("netns", "add", f"{_PREFIX}switch")
        _ip(*switch, "link", "add", "bridge", "type", "bridge")
        _ip(*switch, "link", "set", "bridge", "up")
        for host, address in HOSTS.items():
            inside = ("-n", f"{_PREFIX}{host}")
            _ip("netns", "add", f"{_PREFIX}{host}")
            _ip(*inside, *_cable("eth0", host))
            _ip(*switch, "link", "set", host, "master", "bridge", "up")
            _ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        _ip(*_cable(_OUR_END, "here"))
        _ip(*switch, "link", "set", "here", "master", "bridge", "up")
        _ip("addr", "add", f"{HERE}/24", "dev", _OUR_END)
        _ip("link", "set", _OUR_END, "up")
        yield Hosts()
    finally:
        _remove()


def _cable(end: str, port: str) -> tuple[str, ...]:
    return ("link", "add", end, "type", "veth", "peer", "name", port, "netns", f"{_PREFIX}switch")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _remove() -> None:
    for words in (*(("netns", "del", f"{_PREFIX}{host}") for host in (*HOSTS, "switch")), ("link", "del", _OUR_END)):
        subprocess.run(["ip", *words], capture_output=True, check=False)
