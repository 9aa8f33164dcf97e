"""The block pool against a model of it that is a list."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.scheduler.blocks import NULL_BLOCK, BlockPool, blocks_for

NUM_BLOCKS = 7


class PoolMachine(RuleBasedStateMachine):
    """Tables take, share, publish and release blocks in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.published: dict[bytes, int] = {}  # digest -> block, what `find` must know
        self.next = 0

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(AssertionError):
                self.pool.take(count)
            return
        blocks = self.pool.take(count)
        assert len(set(blocks)) == count and NULL_BLOCK not in blocks
        assert not any(block in table for block in blocks for table in self.tables)
        self.published = {digest: block for digest, block in self.published.items() if block not in blocks}
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        digest = bytes([self.next % 5])
        self.next += 1
        if digest not in self.published and block not in self.published.values():
            self.published[digest] = block
        self.pool.publish(block, digest, b"tokens" + digest)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.published)))
        block = self.pool.find(digest, b"tokens" + digest)
        assert block == self.published[digest]
        self.pool.share([block])
        self.tables.append([block])

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.published)))
        self.pool.retract(self.published.pop(digest))

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check(self.tables)
        held = {block for table in self.tables for block in table}
        assert self.pool.num_free == NUM_BLOCKS - len(held)
        assert self.pool.num_published == len(self.published)
        for digest in map(bytes, ([i] for i in range(5))):
            assert self.pool.find(digest, b"tokens" + digest) == self.published.get(digest)
            assert self.pool.find(digest, b"others") is None


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_free_blocks_go_out_empty_ones_first_then_the_oldest_and_roots_last() -> None:
    pool = BlockPool(6)
    old, young, empty = pool.take(2), pool.take(2), pool.take(2)
    for block in old + young:
        pool.publish(block, bytes([block]), b"")
    pool.release(old)
    pool.release(young)
    pool.release(empty)
    assert pool.take(6) == [*empty, *reversed(old), *reversed(young)]


def test_a_second_release_is_noticed() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="too often"):
        pool.release(blocks)


@pytest.mark.parametrize("table", [[1], [1, 2, 3], [1, 1]])
def test_check_notices_a_table_that_does_not_fit_the_counts(table: list[int]) -> None:
    pool = BlockPool(4)
    pool.take(2)
    pool.check([[1, 2]])
    with pytest.raises(AssertionError):
        pool.check([table])


@given(st.integers(0, 10**6), st.integers(1, 256))
def test_blocks_for_is_the_least_that_holds_them(num_tokens: int, block_size: int) -> None:
    count = blocks_for(num_tokens, block_size)
    assert count * block_size >= num_tokens > (count - 1) * block_size
