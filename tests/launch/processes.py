"""Scripts of launch/ as processes, for tests."""

import contextlib
import os
import sys
import time
from pathlib import Path

import httpx
import psutil

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SMALL = ("--num-gpu-blocks-override=64", "--max-model-len=256", "--threads=1")


class Server:
    """A process of ours and all below it, its output in files, or where `streams` (a shell's redirections) says."""

    def __init__(self, folder: Path, name: str, script: str, *options: str, streams: str = "") -> None:
        self.began = time.monotonic()
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = psutil.Popen(
                ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, str(LAUNCH / script), *options],
                stdout=out,
                stderr=err,
                env=os.environ | {"TMPDIR": str(folder), "XDG_RUNTIME_DIR": ""},
            )
        self.below: list[psutil.Process] = []

    def answers(self, url: str, status: int, within_s: float) -> None:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url, timeout=1).status_code == status:
                    return
            assert time.monotonic() - self.began < within_s, self.err.read_text()
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.02)

    def ready(self, port: int) -> "Server":
        self.answers(f"http://127.0.0.1:{port}/ready", 200, 60)
        self.below = self.process.children()
        return self

    def part(self, name: str) -> psutil.Process:
        return next(p for p in self.below if f"quire.launch.{name}" in p.cmdline())

    def complete_again(self, without: psutil.Process) -> None:
        """Wait until there are as many parts as before, and `without` is none of them."""
        count, deadline = len(self.below), time.monotonic() + 20.0
        while without in self.below or len(self.below) != count:
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)
            self.below = self.process.children()

    def said(self, text: str, within_s: float = 20.0) -> None:
        """Wait until stderr has it."""
        deadline = time.monotonic() + within_s
        while text not in self.err.read_text():
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        return int(self.process.wait(20))

    def assert_nothing_is_left(self) -> None:
        assert not psutil.wait_procs(self.below, timeout=5)[1]


def complete(port: int, tokens: int) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30)
