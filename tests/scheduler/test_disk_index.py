"""The index of blocks on disk: whatever died when, no block is taken for what it does not hold."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.errors import ConfigError
from quire.scheduler import disk_index
from quire.scheduler.disk_index import DiskIndex
from quire.scheduler.tiers import Written

NUM_BLOCKS, BLOCK_SIZE = 4, 2
IDS = ["disk of rank 0", "disk of rank 1"]


def content(block: int, what: int) -> Written:
    return Written(block, bytes([what]) * 32, bytes([what]) * 4 * BLOCK_SIZE)


def reopened(file: Path, ids: list[str] = IDS, num_blocks: int = NUM_BLOCKS, block_size: int = BLOCK_SIZE) -> DiskIndex:
    return DiskIndex(file, ids, num_blocks, block_size)


def leave(index: DiskIndex) -> None:
    """As the end of its process does, however it ends."""
    index._log.close()
    index._lock.close()


changes = st.lists(st.tuples(st.integers(1, NUM_BLOCKS), st.integers(0, 9)), max_size=3)
actions = st.lists(
    st.one_of(st.tuples(st.just("plan"), changes), st.sampled_from(["done", "die", "lost"])), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(actions)
def test_what_is_found_is_what_the_file_holds(tmp_path_factory: pytest.TempPathFactory, actions: list[Any]) -> None:
    """Plans write when they are done; one that is under way has written, or has not: nobody knows."""
    file = tmp_path_factory.mktemp("disk") / "index"
    index = reopened(file)
    holds: dict[int, int | None] = {}  # block -> what it surely holds; None: who knows
    under_way: list[list[Written]] = []
    for action in actions:
        if isinstance(action, tuple):
            plan = [content(block, what) if what else Written(block) for block, what in action[1]]
            index.writing(plan)
            under_way.append(plan)
            holds |= {written.block: None for written in plan}
        elif action == "done" and under_way:
            plan = under_way.pop(0)
            index.done(plan)
            later = {written.block for other in under_way for written in other}
            last = {written.block: written for written in plan}
            holds |= {b: written.digest[0] if written.digest else None for b, written in last.items() if b not in later}
        elif action == "lost":
            index.lost()
            under_way.clear()
        elif action == "die":
            leave(index)
            under_way.clear()
            index = reopened(file)
        found = {block: written.digest[0] for block, written in index.content.items()}
        assert found == {block: what for block, what in holds.items() if what is not None}
    leave(index)


def test_a_torn_or_damaged_record_ends_the_log(tmp_path: Path) -> None:
    file = tmp_path / "index"
    index = reopened(file)
    for block in (1, 2, 3):
        index.writing([content(block, block)])
        index.done([index._latest[block]])
    leave(index)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-3] + b"x" + whole[-2:]):
        file.write_bytes(damaged)
        index = reopened(file)
        assert sorted(index.content) == [1, 2]
        leave(index)


@pytest.mark.parametrize(
    "other", [{"ids": IDS[:1]}, {"ids": IDS[::-1]}, {"num_blocks": NUM_BLOCKS + 1}, {"block_size": BLOCK_SIZE + 1}]
)
def test_an_index_of_other_files_is_of_no_use(tmp_path: Path, other: dict[str, Any]) -> None:
    index = reopened(tmp_path / "index")
    change = content(1, 1)
    index.writing([change])
    index.done([change])
    index.close()
    other_index = reopened(tmp_path / "index", **other)
    assert not other_index.content
    other_index.close()


def test_after_another_start_of_the_machine_only_what_was_closed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot, file = tmp_path / "boot_id", tmp_path / "index"
    monkeypatch.setattr(disk_index, "BOOT_ID", boot)
    boot.write_text("first")
    index = reopened(file)
    change = content(1, 1)
    index.writing([change])
    index.done([change])
    index.close()
    boot.write_text("second")
    index = reopened(file)
    assert index.content == {1: change}
    leave(index)
    boot.write_text("third")
    index = reopened(file)
    assert not index.content
    leave(index)


def test_one_engine_at_a_time(tmp_path: Path) -> None:
    index = reopened(tmp_path / "index")
    with pytest.raises(ConfigError, match="in use by another engine"):
        reopened(tmp_path / "index")
    index.close()
    reopened(tmp_path / "index").close()


def test_the_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    index = reopened(tmp_path / "index")
    sizes = []
    for i in range(100):
        change = content(1 + i % NUM_BLOCKS, 1 + i % 7)
        index.writing([change])
        index.done([change])
        sizes.append((tmp_path / "index").stat().st_size)
    assert max(sizes) == max(sizes[:30])
    found = dict(index.content)
    leave(index)
    again = reopened(tmp_path / "index")
    assert again.content == found and len(found) == NUM_BLOCKS
    again.close()


def test_a_full_disk_costs_the_index_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = reopened(tmp_path / "index")
    index._log.close()
    index._log = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    index.writing([content(1, 1)])
    index.writing([content(2, 1)])
    assert caplog.text.count("No space left on device") == 1
    assert not (tmp_path / "index").exists()
    index.close()
