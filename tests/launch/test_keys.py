"""Keys for links between hosts: made by a command, asked for where others listen, and sufficient to serve."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.common.curve import make
from quire.common.errors import EXIT_CONFIG, ConfigError
from quire.launch.cli import main as quire
from quire.launch.component import is_local, peer_keys, scheduler_keys

from ..ports import free_ports
from .processes import LAUNCH, SMALL, Server, complete

ELSEWHERE = "tcp://192.0.2.1:7700"


def test_quire_keys_makes_both_files_once_and_says_where_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "keys"
    assert quire(["keys", str(folder)]) == 0
    said = capsys.readouterr().out
    for name in ("scheduler.keys", "peer.keys"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
        assert f"--curve-keys {folder / name}" in said
    assert "torch.distributed" in said
    before = (folder / "peer.keys").read_bytes()
    assert quire(["keys", str(folder)]) == EXIT_CONFIG
    assert "never overwritten" in capsys.readouterr().err
    assert (folder / "peer.keys").read_bytes() == before
    assert quire(["keys"]) == EXIT_CONFIG


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("ipc:///run/quire", True),
        ("tcp://127.0.0.1:7700", True),
        ("tcp://127.8.9.10:7700", True),
        ("tcp://[::1]:7700", True),
        ("tcp://localhost:7700", True),
        ("tcp://10.0.0.1:7700", False),
        ("tcp://[fe80::1]:7700", False),
        ("tcp://localhost.example.org:7700", False),
        ("tcp://127.0.0.1.example.org:7700", False),
        ("tcp://0.0.0.0:7700", False),
        ("tcp://eth0:7700", False),
        ("nonsense", False),
    ],
)
def test_which_addresses_stay_on_this_host(address: str, local: bool) -> None:
    assert is_local(address) is local


def flags(address: str, file: Path | None = None, *, insecure: bool = False) -> argparse.Namespace:
    return argparse.Namespace(listen=address, scheduler=address, curve_keys=file, insecure=insecure)


def test_keys_are_asked_for_where_other_hosts_listen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler, peer = make(tmp_path)
    for keys in (scheduler_keys, peer_keys):
        with pytest.raises(ConfigError, match=r"quire keys DIR.*--insecure"):
            keys(flags(ELSEWHERE))
        assert keys(flags("tcp://127.0.0.1:7700")) is None
        assert not capsys.readouterr().err
        assert keys(flags(ELSEWHERE, insecure=True)) is None
        assert "warning: --insecure" in capsys.readouterr().err
        with pytest.raises(ConfigError, match="exclude each other"):
            keys(flags(ELSEWHERE, peer, insecure=True))
    for address in (ELSEWHERE, "tcp://127.0.0.1:7700"):
        known, own = scheduler_keys(flags(address, scheduler)), peer_keys(flags(address, peer))
        assert known is not None and own is not None
        assert (known.peer_public, own.scheduler_public) == (own.public, known.public)
    with pytest.raises(ConfigError, match=r"calls peer\.keys"):
        peer_keys(flags(ELSEWHERE, scheduler))


@pytest.mark.parametrize("script", ["scheduler.py", "worker.py", "frontend.py"])
def test_every_script_refuses_an_open_address(script: str) -> None:
    flag = "--listen" if script == "scheduler.py" else "--scheduler"
    port = ("--port=0",) if script == "frontend.py" else ()
    result = subprocess.run(
        [sys.executable, str(LAUNCH / script), f"{flag}={ELSEWHERE}", *port],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == EXIT_CONFIG
    assert "quire keys DIR" in result.stderr and "--insecure" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_who_holds_keys_serves_and_nobody_else_is_heard(
    start: Callable[..., Server], port: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rank 0 is first asked for by workers that must not get it: without keys, and with another engine's."""
    address = f"tcp://127.0.0.1:{free_ports(2)}"
    scheduler, peer = make(tmp_path / "ours")
    _, other = make(tmp_path / "theirs")
    hub = start("scheduler.py", f"--model={checkpoint('llama')}", *SMALL, f"--listen={address}", f"--curve-keys={scheduler}",
                "--log-level=debug")  # fmt: skip
    hub.said("listening on")
    worker = ("worker.py", f"--scheduler={address}", "--rank=0")
    strangers = [start(*worker), start(*worker, f"--curve-keys={other}")]
    ours = start(*worker, f"--curve-keys={peer}")
    front = start("frontend.py", f"--scheduler={address}", f"--port={port}", f"--curve-keys={peer}").ready(port)
    assert complete(port, 8).status_code == 200
    assert hub.err.read_text().count("welcomed") == 2
    assert "dropped" not in hub.err.read_text()
    assert str(ours.process.pid) in hub.err.read_text()
    for part in (*strangers, front, ours, hub):
        assert part.process.poll() is None
        part.process.send_signal(signal.SIGTERM)
    assert [part.end() for part in (*strangers, front, ours, hub)] == [0] * 5
