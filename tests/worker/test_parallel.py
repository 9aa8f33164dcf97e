"""The exchanges of a group over TCP (tests/worker/test_architectures.py meets through a file), and shares."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.common.errors import ConfigError
from quire.worker import meeting, parallel
from quire.worker.meeting import Folder
from quire.worker.parallel import Group, PeerLost

from ..ports import free_port

CODE = """
import sys, time, torch
from quire.worker.parallel import Group, PeerLost
rank, size, total = int(sys.argv[2]), 3, 7
group = Group(rank, size)
group.join(sys.argv[1])
mine = group.share(total).mine
columns = torch.arange(mine.start, mine.stop).float().expand(2, -1)
assert group.gather_columns(columns, total).tolist() == [list(range(total))] * 2
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    assert group.all_reduce(torch.full((3, 5), rank + 1.0, dtype=dtype)).tolist() == [[6.0] * 5] * 3
assert group.broadcast(torch.tensor([rank + 40, rank])).tolist() == [40, 0]
if rank == 0:
    time.sleep(0.5)  # with the store of the first meeting, where the others look for it meanwhile
if rank == 2:
    try:
        group.all_reduce(torch.ones(2))
        raise AssertionError("nobody else took part")
    except PeerLost:
        pass
group.join(sys.argv[1], epoch=1)
assert group.all_reduce(torch.ones(2)).tolist() == [3.0, 3.0]
group.close()
"""


def test_exchanges_over_tcp() -> None:
    """And a rank that leaves wakes those that wait for it; all meet again at the same address."""
    address = f"tcp://127.0.0.1:{free_port()}"
    ranks = [subprocess.Popen([sys.executable, "-c", CODE, address, str(rank)]) for rank in (2, 1, 0)]
    try:
        assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ranks \[0, 2\]"):
        Group(1, 3).join(f"file://{tmp_path}/meet", patience_s=0.1)


def test_a_wait_for_ranks_can_be_ended(tmp_path: Path) -> None:
    def called_away() -> None:
        raise PeerLost("elsewhere")

    with pytest.raises(PeerLost, match="elsewhere"):
        Group(1, 3).join(f"file://{tmp_path}/meet", meanwhile=called_away)


def test_a_rank_that_came_and_died_is_not_waited_for_in_vain(tmp_path: Path) -> None:
    """It never says where it listens, so nobody can connect: whoever calls this rank away is heard meanwhile."""

    class Elsewhere(Exception):
        pass

    calls = 0

    def called_away() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Elsewhere

    died = Folder(tmp_path / "meet", epoch=3, size=2)
    died.set("here/1", b"1")
    group = Group(0, 2)
    with pytest.raises(Elsewhere):
        group.join(f"file://{tmp_path}/meet", epoch=3, meanwhile=called_away)
    assert len(list((tmp_path / "meet").iterdir())) > 1
    group.close()
    died.leave()
    assert not (tmp_path / "meet").exists()


def test_what_killed_ranks_left_of_earlier_groups_is_swept(tmp_path: Path) -> None:
    def folder(epoch: int) -> Folder:
        return Folder(tmp_path / f"rendezvous-{epoch}", epoch, size=2)

    for epoch in (3, 12, 20):
        folder(epoch).set("here/1", b"1")
    folder(12).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rendezvous-12", "rendezvous-20"]
    Folder(tmp_path / "rendezvous-20", epoch=21, size=2).sweep()  # a name that is not ours tells nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rendezvous-12", "rendezvous-20"]


def test_a_rank_that_came_and_says_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ADDRESSES_S", 0.1)
    Folder(tmp_path / "meet", epoch=3, size=2).set("here/1", b"1")
    with pytest.raises(PeerLost, match="met the others and lost them again"):
        Group(0, 2).join(f"file://{tmp_path}/meet", epoch=3)


def test_a_rendezvous_on_another_host_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--master-addr"):
        Group(0, 2).join(f"file://{tmp_path}/of/another/host")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LISTENING_S", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="rank 0 cannot listen"):
            Group(0, 2).join(f"tcp://127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("rendezvous", ["", "file://", "tcp://host", "http://host:1", "/path"])
def test_malformed_rendezvous(rendezvous: str) -> None:
    with pytest.raises(ConfigError, match="rendezvous"):
        Group(0, 2).join(rendezvous)


@given(st.integers(1, 200), st.integers(1, 64))
def test_shares_cover_everything_once_and_differ_by_at_most_one(total: int, size: int) -> None:
    shares = [Group(rank, size).share(total).mine for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_group_of_one_exchanges_nothing() -> None:
    group, x = Group(), torch.ones(2, 3)
    group.join("")
    assert group.all_reduce(x) is group.gather_columns(x, 3) is group.broadcast(x) is x
