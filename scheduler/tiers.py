"""Where blocks go that the device has no room for: host memory, and a file behind it.

What the device forgets, the first tier keeps, and what that forgets, the next one: each is a cache of the least recently
used, found by the same names. A preempted request is thus swapped out as its blocks are needed, and in when it runs
again; and a prefix that was seen long ago costs a copy, not a prefill. Nothing here waits: copies ride in the next plan,
and workers replay plans in order, so what is to be copied is in place by then.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .blocks import BlockPool

PROBING = 8  # turnovers, of which one is saved whatever it costs
Copies = list[tuple[int, int]]  # from, to; blocks of all tiers are numbered through


@dataclass(frozen=True, slots=True)
class Written:
    """What a block of a durable tier holds once the step is done that copies it there; nothing without a digest."""

    block: int
    digest: bytes = b""
    tokens: bytes = b""


class Worth:
    """Whether to save a block that nobody is known to come back for. It pays if what was saved came back often enough:
    each time spares computing it, for two copies. Every eighth `turnover` of evictions all is saved, to find out."""

    def __init__(self, turnover: int) -> None:
        self._turnover = max(1, turnover)
        self._seen = 0  # blocks that were evicted
        self._saved = self._restored = 0.0  # of late

    def pays(self, compute_s: float | None, copy_s: float) -> bool:
        """`compute_s` for its tokens, None while that is unknown; `copy_s` each way."""
        self._seen += 1
        if compute_s is None or self._seen // self._turnover % PROBING == 0:
            return True
        return self._restored * (compute_s - copy_s) > self._saved * copy_s

    def saved(self) -> None:
        self._saved += 1
        if self._saved > PROBING * self._turnover:
            self._saved, self._restored = self._saved / 2, self._restored / 2

    def restored(self, count: int) -> None:
        self._restored += count


@dataclass(slots=True)
class Tier:
    """`pool` is numbered from 1, as the device's; to the workers its block b is `before + b`."""

    pool: BlockPool
    before: int  # blocks of the tiers in front
    block_s: float = 0.0  # what copying a block from here to the device takes
    behind: "Tier | None" = None
    log: list[Written] | None = None  # what changed, of a tier that outlives the engine

    def __contains__(self, block: int) -> bool:
        return self.before < block <= self.before + self.pool.num_blocks

    def __iter__(self) -> Iterator["Tier"]:
        """This one and those behind it."""
        tier: Tier | None = self
        while tier is not None:
            yield tier
            tier = tier.behind

    def find(self, digest: bytes, tokens: bytes) -> int | None:
        """The block that holds this, here or further behind."""
        for tier in self:
            if (block := tier.pool.find(digest, tokens)) is not None:
                return tier.before + block
        return None

    def save(self, source: int, digest: bytes, tokens: bytes, copies: Copies) -> None:
        """Keep what the block `source` holds, unless it is here. Adds the copies that do it, and those that save what it
        displaces, in the order in which they are to be made. No effect while every block is held."""
        pool = self.pool
        if (known := pool.find(digest, tokens)) is not None:
            self._used([known])
        elif pool.num_free:
            if self.behind is not None:
                for displaced, its_digest, its_tokens in pool.evict(1):
                    self.behind.save(self.before + displaced, its_digest, its_tokens, copies)
            [block] = pool.take(1)
            copies.append((source, self.before + block))
            pool.publish(block, digest, tokens)
            pool.release([block])
            self._note(Written(block, digest, tokens))

    def hold(self, blocks: Sequence[int]) -> None:
        """Nothing that is saved displaces these, until they are released."""
        for tier in self:
            tier.pool.share(block - tier.before for block in blocks if block in tier)

    def release(self, blocks: Sequence[int]) -> None:
        """They have been used: they stay for longest."""
        for tier in self:
            tier.pool.release([block - tier.before for block in blocks if block in tier])

    def restore_s(self, blocks: Sequence[int]) -> float:
        """Seconds that copying them to the device takes."""
        return sum(tier.block_s for block in blocks for tier in self if block in tier)

    def forget(self, digest: bytes) -> None:
        for tier in self:
            if (block := tier.pool.forget(digest)) is not None:
                tier._note(Written(block))

    def _used(self, blocks: list[int]) -> None:
        self.pool.share(blocks)
        self.pool.release(blocks)

    def _note(self, written: Written) -> None:
        if self.log is not None:
            self.log.append(written)
