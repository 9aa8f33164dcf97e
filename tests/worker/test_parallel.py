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
from quire.worker.parallel import Group, PeerLost

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [subprocess.Popen([sys.executable, "-c", CODE, f"tcp://127.0.0.1:{port}", str(rank)]) for rank in (2, 1, 0)]
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
