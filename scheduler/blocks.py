"""The KV blocks: who holds them, which are free, and which hold content that somebody may want again."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import cast

NULL_BLOCK = 0  # padding is written there; never handed out


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`."""
    return -(-num_tokens // block_size)


class BlockPool:
    """Blocks 1 to `num_blocks`, reference-counted. Every operation is O(1) for a block.

    A block that nobody holds is free, and keeps its published content until it is handed out again. Free blocks
    without content go first, then those unused for longest. One that is pinned is not free, held or not.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._digests = [b""] * (num_blocks + 1)  # of the prefixes that blocks are published for
        self._tokens = [b""] * (num_blocks + 1)  # and their own
        self._by_digest: dict[bytes, int] = {}
        self.pinned: dict[int, int] = {}  # block -> how often; published ones
        self.num_idle = 0  # pinned blocks that nobody holds
        self.num_released = 0  # times that a block came free

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_published(self) -> int:
        return len(self._by_digest)

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of them nobody holds, and nothing keeps."""
        return sum(map(self._free.__contains__, blocks))

    def is_idle(self, block: int) -> bool:
        """Whether nothing but a pin keeps it."""
        return block in self.pinned and self._refs[block] == 0

    def take(self, count: int) -> list[int]:
        """`count` blocks to write to, held once; their old content is forgotten. There must be that many free ones."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self.retract(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def evict(self, count: int) -> list[tuple[int, bytes, bytes]]:
        """Forget what the `count` blocks hold that `take` hands out next. Returns it: (block, digest, tokens) of each
        that held something."""
        evicted = []
        for block in islice(self._free, count):
            if digest := self._digests[block]:
                evicted.append((block, digest, self._tokens[block]))
                self.retract(block)
        return evicted

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block that `find` returned."""
        for block in blocks:
            if self._refs[block] == 0:
                if block in self.pinned:
                    self.num_idle -= 1
                else:
                    del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less. Tail first: a chain is of no use without its root, so the root is to live longest."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} was released too often"
            if self._refs[block] == 0:
                self.num_released += 1
                if block in self.pinned:
                    self.num_idle += 1
                else:
                    self._set_free(block)

    def pin(self, block: int) -> None:
        """Keep a published block from being handed out, though nobody holds it, until it is unpinned as often."""
        if block not in self.pinned and self._refs[block] == 0:
            del self._free[block]
            self.num_idle += 1
        self.pinned[block] = self.pinned.get(block, 0) + 1

    def unpin(self, block: int) -> None:
        self.pinned[block] -= 1
        if not self.pinned[block]:
            del self.pinned[block]
            if self._refs[block] == 0:
                self.num_idle -= 1
                self.num_released += 1
                self._set_free(block)

    def publish(self, block: int, digest: bytes, tokens: bytes) -> None:
        """Let `find` return a held block. No effect when a block of equal content, or this one, is published."""
        if digest not in self._by_digest and not self._digests[block]:
            self._by_digest[digest] = block
            self._digests[block], self._tokens[block] = digest, tokens

    def retract(self, block: int) -> None:
        """Undo `publish`, if there was one."""
        if digest := self._digests[block]:
            del self._by_digest[digest]
            self._digests[block] = self._tokens[block] = b""

    def forget(self, digest: bytes) -> int | None:
        """Let `find` return no block for this prefix any more; which one it was."""
        if (block := self._by_digest.get(digest)) is not None:
            self.retract(block)
        return block

    def find(self, digest: bytes, tokens: bytes) -> int | None:
        """The published block of this prefix. Its tokens are compared too, so a collision is a miss."""
        block = self._by_digest.get(digest)
        return block if block is not None and self._tokens[block] == tokens else None

    def find_chain(self, digests: Sequence[bytes], tokens: bytes) -> list[int]:
        """The published blocks of a prefix, up to the first that `find` would miss; `tokens` are those of all of them."""
        found = list(map(self._by_digest.get, digests))
        blocks = cast(list[int], found[: found.index(None)] if None in found else found)
        held = b"".join([self._tokens[block] for block in blocks])
        while blocks and held != tokens[: len(held)]:
            held = held[: -len(self._tokens[blocks.pop()])]
        return blocks

    def knows(self, digest: bytes) -> bool:
        """Whether a block is published for this prefix."""
        return digest in self._by_digest

    def check(self, tables: Iterable[Sequence[int]], blocks: range | None = None) -> None:
        """Raises AssertionError unless free and held blocks are all there are, `tables` being all block tables.

        Each of `blocks` is looked at by itself, all of them by default: a quarter of a second for a million.
        """
        holders = Counter(block for table in tables for block in table)
        assert NULL_BLOCK not in holders and NULL_BLOCK not in self._free, "the null block was handed out"
        assert len(self._free) + self.num_idle + len(holders) == self.num_blocks, "a block is neither free nor held"
        assert self.num_idle == sum(block not in holders for block in self.pinned), "idle blocks are miscounted"
        assert all(self._digests[block] for block in self.pinned), "a block is pinned that nobody can find"
        assert len(self._digests) - self._digests.count(b"") == len(self._by_digest), "index out of step"
        for block in range(1, self.num_blocks + 1) if blocks is None else blocks:
            refs = self._refs[block]
            assert refs == holders[block], f"block {block} counts {refs} holders and has {holders[block]}"
            free = refs == 0 and block not in self.pinned
            assert (block in self._free) == free, f"block {block} with {refs} holders is in the wrong place"
            if digest := self._digests[block]:
                assert self._by_digest.get(digest) == block, f"block {block} is not found by its content"

    def _set_free(self, block: int) -> None:
        self._free[block] = None
        if not self._digests[block]:
            self._free.move_to_end(block, last=False)
