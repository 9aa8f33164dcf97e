"""A server under test: the real command in its own process, asked over real HTTP."""

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import httpx
import psutil

from ..ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_S = 90  # far above what a start takes; only a hang reaches it


def script(name: str, *args: object) -> list[str]:
    """The command line of one of the scripts in launch/, as a user would type it."""
    return [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, args)]


class Server:
    """`launch/serve.py` with the given flags. A context manager: leaves when no process of it is left.

    `command` and `environment` go in the place of the script and of what is inherited. What is printed goes to a file,
    or to `output`: a file takes any amount unread, a full pipe would hold the server.
    """

    def __init__(
        self,
        *flags: object,
        port: int | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        output: IO[str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.flags = flags
        self._printed = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (closed in __exit__)
        self.process = subprocess.Popen(
            [*(command or script("serve")), "--port", str(self.port), *map(str, flags)],
            stdout=output or self._printed,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.process.kill()  # what did not stop is a failure already
            self.http.close()
            self._printed.close()

    def wait_ready(self) -> "Server":
        """Raises AssertionError with what the server printed when it ends instead."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"exit code {self.process.returncode}:\n{self.read_output()}")
            with contextlib.suppress(httpx.HTTPError):
                if self.http.get("/ready").status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError("not ready in time")

    def tree(self) -> list[psutil.Process]:
        """The supervisor and its children."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> int:
        """SIGTERM, then wait; returns the exit code. Nothing of the server may be left."""
        if self.process.poll() is None:
            tree = self.tree()
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
            _, alive = psutil.wait_procs(tree, timeout=10)
            assert not alive, f"left behind: {alive}"
        return self.process.returncode

    def read_output(self, timeout: float = 60) -> str:
        """All that was printed, once the process has ended."""
        self.process.wait(timeout)
        return self.log()

    def log(self) -> str:
        """What was printed so far."""
        return Path(self._printed.name).read_text(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric in /metrics; raises AssertionError when it is not there."""
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{k}="{v}"' in (found.group(1) or "") for k, v in labels.items()):
                return float(found.group(2))
        raise AssertionError(f"no metric {name}")

    def complete(self, prompt: str | list[int], **fields: object) -> str:
        """The text of one greedy completion."""
        body = {"model": "demo", "prompt": prompt, "temperature": 0, **fields}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text


def run_to_end(*flags: object, timeout: float = 60) -> tuple[int, str]:
    """Exit code and output of a server that should not start."""
    done = subprocess.run(
        script("serve", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Poll `condition()` until it is true; raises AssertionError when it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)
