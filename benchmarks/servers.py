"""OpenAI-compatible servers: those that run already, and those that are started here and take turns."""

import contextlib
import json
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from quire.benchmarks.engines import ended
from quire.benchmarks.load import Target

START_S = 600.0  # some compile for minutes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def at(url: str, model: str | None = None) -> Target:
    """The server at `url`, asked for its first model when none is named."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    if model is None:
        with urllib.request.urlopen(f"http://{host}:{port}/v1/models", timeout=10) as answer:
            model = json.load(answer)["data"][0]["id"]
    return Target(host, port, model)


@contextlib.contextmanager
def started(name: str, command: str, log: Path) -> Iterator[tuple[Target, int]]:
    """`command` with a free port for {port}: where it serves, once it does, and its process. Raises SystemExit when it
    ends instead."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            shlex.split(command.replace("{port}", str(port))),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _serving(name, process, port, log), process.pid
    finally:
        with ended(process):
            process.send_signal(signal.SIGTERM)


def _serving(name: str, process: "subprocess.Popen[bytes]", port: int, log: Path) -> Target:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{name} ended with exit code {process.returncode}:\n{tail}")
        with contextlib.suppress(OSError, urllib.error.URLError, LookupError):
            target = at(f"127.0.0.1:{port}")
            _one_token(target)
            return target
        time.sleep(0.1)
    raise SystemExit(f"{name} does not serve after {START_S:.0f} s")


def _one_token(target: Target) -> None:
    """Raises OSError as long as it does not answer."""
    body = json.dumps({"model": target.model, "prompt": [11, 12, 13], "max_tokens": 1}).encode()
    url = f"http://{target.host}:{target.port}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
