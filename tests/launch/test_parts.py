"""The small parts: run directory, banner, progress, the cause among several ends."""

import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from quire.common.channel import wires
from quire.common.config import EngineConfig, ModelConfig, ParallelConfig, ServerConfig
from quire.common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError
from quire.common.messages import Capacity, Status, Welcome
from quire.common.model_info import ModelInfo
from quire.launch.banner import banner, sample
from quire.launch.checks import is_downloadable
from quire.launch.children import (
    Child,
    Exit,
    address_of,
    cause_of,
    child_environment,
    downloads,
    engine,
    frontends,
    write_config,
)
from quire.launch.claim import claimed
from quire.launch.progress import PlainReport
from quire.launch.run_directory import run_directory

INFO = ModelInfo(
    model="m",
    architecture="LlamaForCausalLM",
    vocab_size=9,
    context_length=64,
    max_model_len=48,
    eos_token_ids=(),
    fingerprint="",
)


def test_a_run_directory_is_private_short_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with run_directory() as path:
        assert path.stat().st_mode & 0o777 == 0o700
        assert wires(address_of(path))
        config = write_config(EngineConfig(server=ServerConfig(api_key=("sesame",))), path)
        assert config.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_a_given_run_directory_is_left_to_its_owner(tmp_path: Path) -> None:
    with run_directory(tmp_path) as path:
        assert path == tmp_path
    assert tmp_path.is_dir()
    with pytest.raises(ConfigError, match="no such directory"), run_directory(tmp_path / "none"):
        pass


def test_a_place_that_cannot_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"/proc/config\.json: .*TMPDIR"):
        write_config(EngineConfig(), Path("/proc"))
    monkeypatch.setattr("quire.launch.run_directory._base", lambda: Path("/proc"))
    with pytest.raises(ConfigError, match=r"/proc: .*TMPDIR"), run_directory():
        pass


def test_two_schedulers_do_not_share_a_folder_and_a_killed_one_leaves_it_to_the_next(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}"
    holder = subprocess.Popen(
        [sys.executable, "-c", _CLAIM, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == "claimed\n"
    with pytest.raises(ConfigError, match=f"another scheduler listens there, process {holder.pid};"), claimed(address):
        pass
    holder.kill()
    holder.wait()
    with claimed(address):
        pass
    with pytest.raises(ConfigError, match="No such file or directory"), claimed(f"ipc://{tmp_path}/none"):
        pass


_CLAIM = """
import sys
from quire.launch.claim import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_port_that_is_taken_is_refused_and_its_holder_named(port: int) -> None:
    with socket.create_server(("127.0.0.1", port + 1)):  # the workers' wire
        said = rf"127\.0\.0\.1:{port + 1}: this port is in use by process {os.getpid()} .*--listen"
        with pytest.raises(ConfigError, match=said), claimed(f"tcp://127.0.0.1:{port}"):
            pass
    with claimed(f"tcp://127.0.0.1:{port}"):
        pass
    with pytest.raises(ConfigError, match="name an address of this host"), claimed("tcp://192.0.2.1:7700"):
        pass


def test_the_banner_says_what_fits_and_how_to_ask() -> None:
    server = ServerConfig(host="0.0.0.0")
    welcome = Welcome(1, EngineConfig(parallel=ParallelConfig(tensor_parallel_size=2), server=server), INFO)
    text = banner("0.1", "http://127.0.0.1:8000", welcome, Capacity(300, 16, 48, 8))
    for part in (
        "LlamaForCausalLM, 2 workers",
        "4,800 tokens",
        "Maximum concurrency for 48 tokens per request: 100.00x",
        "curl http://127.0.0.1:8000/v1",
        "consider --api-key",
    ):
        assert part in text
    filed = EngineConfig(server=ServerConfig(host="0.0.0.0", api_keys_file="keys.yaml"))
    assert "consider" not in banner(
        "0.1", "http://x", msgspec.structs.replace(welcome, config=filed), Capacity(1, 1, 1, 1)
    )
    keyed = msgspec.structs.replace(welcome.config, server=ServerConfig(host="0.0.0.0", api_key=("sesame",)))
    assert "sesame" not in sample("http://x", keyed)
    assert "Authorization: Bearer $API_KEY" in sample("http://x", keyed)


def test_plain_progress_is_a_line_per_phase() -> None:
    stream = io.StringIO()
    report = PlainReport(stream)
    for share in (0.0, 0.2, 0.9):
        report.show(Status("loading", share))
    report.show(Status("warming up", 0.0, "16 tokens"))
    assert stream.getvalue().splitlines() == ["loading", "warming up: 16 tokens"]


def test_the_cause_of_several_ends() -> None:
    child = Child("worker", "worker 1", "m", ())
    fault, killed, config = Exit(child, EXIT_FATAL), Exit(child, -signal.SIGKILL), Exit(child, EXIT_CONFIG)
    assert cause_of([fault, killed, config]) is config
    assert cause_of([Exit(child, 0), fault, killed]) is killed
    assert cause_of([Exit(child, 0), fault]) is fault
    assert cause_of([fault]) is fault
    assert "worker 1 was killed by signal 9 (SIGKILL), likely for lack of memory; a lower --gpu-" in str(killed)
    assert str(Exit(child, -40)) == "worker 1 was killed by signal 40 (real-time)"
    assert str(Exit(child, -signal.SIGKILL, "hung")) == "worker 1 hung"
    assert (killed.engine_code, config.engine_code) == (EXIT_FATAL, EXIT_CONFIG)


def test_the_processes_of_an_engine(tmp_path: Path) -> None:
    config = EngineConfig(
        parallel=ParallelConfig(tensor_parallel_size=2), server=ServerConfig(frontends=2, api_key=("sesame",))
    )
    children = [*frontends(config, tmp_path, 9), *engine(config, tmp_path)]
    assert [c.name for c in children] == ["frontend 0", "frontend 1", "the scheduler", "worker 0", "worker 1"]
    assert not any("sesame" in word for c in children for word in c.arguments)
    assert child_environment({"QUIRE_API_KEY": "sesame", "HOME": "/"}) == {"HOME": "/"}


def test_only_a_repository_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert [
        m for m in ("demo", "org/name", "./a", "/a/b", "~/a", "a/b/c", "here/model", "/a", "a/") if is_downloadable(m)
    ] == ["org/name"]
    assert not downloads(EngineConfig())
    assert downloads(EngineConfig(model=ModelConfig(model="org/name")))[0].arguments[0] == "org/name"
