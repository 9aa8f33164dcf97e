"""Blocks in host memory and on disk: the real engine answers as if the device had room for all."""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from .server import Server, wait_until
from .test_load import ask_all, body

CLIENTS = 28
FEW = ("--num-gpu-blocks-override", 24, "--max-model-len", 256, "--max-num-seqs", 12)


@pytest.fixture(scope="module")
def undisturbed(demo: Server) -> list[str]:
    return asyncio.run(ask_all(demo.url, CLIENTS))


def moved(server: Server, how: str) -> float:
    return server.metric("quire:kv_blocks_moved_total", how=how)


def cached(server: Server, i: int) -> int:
    """Tokens of a prompt that were there; no two prompts begin alike."""
    answer = server.http.post("/v1/completions", json=body(i) | {"max_tokens": 1})
    tokens: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.parametrize("flags", [(), ("--tp", 2), ("--no-enable-prefix-caching",)], ids=["", "tp 2", "no sharing"])
def test_swapping_changes_no_answer(undisturbed: list[str], flags: tuple[object, ...]) -> None:
    with Server(*FEW, "--swap-space", 0.05, *flags) as server:
        server.wait_ready()
        assert asyncio.run(ask_all(server.url, CLIENTS)) == undisturbed
        assert moved(server, "saved") > 0 and moved(server, "restored") > 0
        assert server.metric("vllm:num_preemptions_total") > 0


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_what_is_on_disk_survives(undisturbed: list[str], tmp_path: Path, how: str) -> None:
    """The end of the engine, and the death of each of its parts."""
    flags = (*FEW, "--swap-space", 0.002, "--kv-disk", tmp_path / "kv", "--kv-disk-space", 0.1)
    with Server(*flags) as server:
        server.wait_ready()
        assert asyncio.run(ask_all(server.url, CLIENTS)) == undisturbed
        if how == "killed":
            for role in ("scheduler", "worker"):
                victim = next(
                    p for p in psutil.Process(server.process.pid).children() if f"quire.launch.{role}" in p.cmdline()
                )
                os.kill(victim.pid, signal.SIGKILL)
                assert asyncio.run(ask_all(server.url, 14)) == undisturbed[:14]
            wait_until(lambda: server.http.get("/ready").status_code == 200)
            assert moved(server, "restored") > 0
    with Server(*flags) as server:
        server.wait_ready()
        assert sum(cached(server, i) for i in range(CLIENTS)) > 0
        assert moved(server, "restored") > 0
        assert asyncio.run(ask_all(server.url, CLIENTS)) == undisturbed
