"""The scripts as users start them: mistakes are told in one line, soon, by the right exit code."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.common.errors import EXIT_CONFIG, ConfigError
from quire.launch.listen import inherited, listen

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("serve.py", "frontend.py", "scheduler.py", "worker.py")


QUIRE = str(Path(sys.executable).with_name("quire"))  # the command of this environment, be it active or not


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCH / words[0]), *words[1:]] if words[0] in SCRIPTS else [*words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env=os.environ | environment
    )


def assert_told(result: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exit code 1, one line, no traceback."""
    assert result.returncode == EXIT_CONFIG
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(part in result.stderr for part in said), result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_executable_and_explains_itself(script: str) -> None:
    assert (LAUNCH / script).stat().st_mode & stat.S_IXUSR
    assert (LAUNCH / script).read_text().startswith("#!/usr/bin/env python3\n")
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {script}")
    assert script in result.stdout.partition("\n")[2]  # an example


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_told_by_every_script(script: str) -> None:
    assert_told(run(script, "--lifelin", "3"), "there is no option --lifelin", f"see {script} --help")


def test_a_port_in_use_is_refused_soon_and_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        began = time.monotonic()
        result = run("serve.py", "--port", str(port))
        assert time.monotonic() - began < 2.0
    assert_told(result, f"port {port} is in use by process {os.getpid()} (", "--port")


@pytest.mark.parametrize(
    ("host", "said"), [("nowhere.invalid", "--host nowhere.invalid"), ("192.0.2.1", "no such address")]
)
def test_an_address_that_cannot_be_is_refused(host: str, said: str) -> None:
    assert_told(run("serve.py", "--port", "0", "--host", host), said, "127.0.0.1")


def test_a_model_that_is_not_there_is_refused_soon() -> None:
    began = time.monotonic()
    result = run("serve.py", "/no/such/model", "--port", "0")
    assert time.monotonic() - began < 2.0
    assert_told(result, "/no/such/model", "no such directory")


def test_a_model_that_leads_in_a_circle_is_refused(tmp_path: Path) -> None:
    circle = tmp_path / "model"
    circle.symlink_to(circle)
    assert_told(run("serve.py", str(circle), "--port", "0"), str(circle), "no such directory")
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    assert_told(run("serve.py", str(tmp_path), "--port", "0"), str(tmp_path), "config.json")


def test_a_file_of_keys_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert_told(run("serve.py", "--port", "0", "--api-keys-file", str(tmp_path / "none")), "--api-keys-file", "none")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert_told(run("serve.py", str(tmp_path), "--port", "0"), str(tmp_path), "config.json")


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["Nonesuch"], "vocab_size": 9, "max_position_embeddings": 64})
    )
    assert_told(run("serve.py", str(tmp_path), "--port", "0"), "Nonesuch", "LlamaForCausalLM", "Qwen3ForCausalLM")


def test_a_context_beyond_the_models_is_refused_with_the_number_that_works(checkpoint: Callable[[str], Path]) -> None:
    result = run("serve.py", str(checkpoint("llama")), "--port", "0", "--max-model-len", "513")
    assert_told(result, "513", "512")


def test_a_model_without_weights_is_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint("llama") / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").touch()
    assert_told(
        run("serve.py", str(tmp_path), "--port", "0"), "safetensors", "pytorch_model.bin", "--load-format dummy"
    )


@pytest.mark.parametrize("name", ["worker", "frontend"])
def test_a_part_that_still_imports_ends_with_0_when_it_is_asked_to(name: str, tmp_path: Path) -> None:
    port = ("--port=0",) if name == "frontend" else ()
    command = [sys.executable, str(LAUNCH / f"{name}.py"), f"--scheduler=ipc://{tmp_path}/nobody", *port]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as part:
        while not handles(part.pid, signal.SIGTERM):
            assert part.poll() is None
            time.sleep(0.001)
        part.terminate()
        assert (part.wait(30), part.stderr.read() if part.stderr else "") == (0, "")


def handles(pid: int, signum: signal.Signals) -> bool:
    """Whether the process has said what it does at this signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), 16)
    return bool(caught >> (signum - 1) & 1)


def test_two_models_are_refused() -> None:
    assert_told(run("serve.py", "a", "--model", "b"), "two models", "a", "b")
    assert_told(run("serve.py", "a", "b"), "'b'", "one MODEL only")


def test_rank_comes_from_torchrun() -> None:
    assert_told(run("worker.py", RANK="x"), "RANK", "'x'")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["worker.py", "--rank", "-1"], ["--rank"]),
        (["worker.py", "--device", "gpu"], ["--device", "'gpu'", "cpu"]),
        (["worker.py", "--log-level", "loud"], ["--log-level", "'loud'", "info"]),
        (["frontend.py", "--port", "65536"], ["--port", "at most 65535", "65536"]),
        (["frontend.py", "--port", "http"], ["--port", "'http'"]),
        (["frontend.py", "--fd", "99"], ["--fd 99"]),
        (["frontend.py", "--fd", "-1"], ["--fd -1"]),
        (["frontend.py", "--port", "0", "--scheduler", "tcp://127.0.0.1:70000"], ["70000", "65535"]),
        (["scheduler.py", "--listen", "tcp://127.0.0.1:65535"], ["65535", "65534"]),
        (["serve.py", "--port", "0", "--tokenizer", "/nowhere"], ["--tokenizer /nowhere", "tokenizer.json"]),
        (["serve.py", "--port", "0", "--chat-template", "/nowhere"], ["--chat-template /nowhere", "no such file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_values_are_told_by_the_scripts(words: list[str], said: list[str]) -> None:
    result = run(*words)
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if " INFO " not in line]
    assert result.returncode == EXIT_CONFIG
    assert len(lines) == 1
    assert all(part in lines[0] for part in said), lines


def test_a_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket() as sock, pytest.raises(ConfigError, match="does not listen"):
        inherited(os.dup(sock.fileno()))


def test_a_port_that_is_shared_is_held_by_the_parent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        sleep = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        child = subprocess.Popen(sleep, stdin=subprocess.PIPE, pass_fds=[holder.fileno()])
        try:
            with pytest.raises(ConfigError, match=f"by process {os.getpid()} "):
                listen("127.0.0.1", holder.getsockname()[1])
        finally:
            child.communicate()


def test_a_model_that_cannot_be_downloaded_is_told_with_the_way_out() -> None:
    result = run(sys.executable, "-m", "quire.launch.model_files", "nobody/nothing", HF_HUB_OFFLINE="1")
    assert result.returncode == EXIT_CONFIG
    assert "nobody/nothing" in result.stderr
    assert "name its directory" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_knows_its_commands() -> None:
    assert "quire chat" in run(QUIRE, "--help").stdout
    assert_told(run(QUIRE, "chta"), "Did you mean chat?")
    assert_told(run(QUIRE, "serve", "--prot", "1"), "Did you mean --port?", "quire serve --help")
    assert_told(
        run(QUIRE, "chat", "-q", "hi", "--url", "http://127.0.0.1:9"),
        "no server at http://127.0.0.1:9",
        "quire serve",
    )
    assert_told(run(QUIRE, "complete", "hi", "--url", "nonsense://"), "--url")


def test_launch_has_neither_torch_nor_transformers_in_it() -> None:
    modules = [f"quire.launch.{file.stem}" for file in LAUNCH.glob("*.py") if file.stem != "__init__"]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint({{'torch', 'transformers'}} & set(sys.modules))"
    assert run(sys.executable, "-c", code).stdout.strip() == "set()"
