"""The KV of requests: block tables over the pool of blocks, what they share, and what is found again.

The scheduler decides who gets blocks; here is what that means for the blocks. A request's `blocks`, `digests`,
`computed` at its admission and `publish_at` are written here and nowhere else.
"""

from collections.abc import Iterable

from . import prefix_cache
from .blocks import BlockPool, blocks_for
from .request import Request


class KvCache:
    """`num_blocks` blocks of `block_size` tokens; with `caching`, equal prefixes share them."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self.pool = BlockPool(num_blocks)

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return blocks_for(num_tokens, self.block_size)

    def find(self, request: Request, reserve: int) -> list[int] | None:
        """The cached blocks to begin a waiting request with; None when there is no room for it now.

        All its known tokens must fit, though they may be computed in chunks: a request that is let in by its first
        chunk alone would be preempted halfway. `reserve` blocks stay free.
        """
        if not self.pool.num_free:  # it needs one at least, for the token that no cache gives
            return None
        shared = prefix_cache.match(self.pool, request, self.block_size) if self.caching else []
        needed = self.blocks_for(len(request.tokens)) - len(shared) + reserve
        return shared if needed <= self.pool.num_free - sum(map(self.pool.is_free, shared)) else None

    def admit(self, request: Request, shared: list[int]) -> None:
        """Blocks for all that is known of a request, beginning with those that `find` returned."""
        self.pool.share(shared)
        request.blocks = shared + self.pool.take(self.blocks_for(len(request.tokens)) - len(shared))
        request.computed = len(shared) * self.block_size
        request.publish_at = request.computed + self.block_size if self.caching else prefix_cache.NEVER

    def grow(self, request: Request, count: int) -> list[int]:
        """`count` more blocks, which must be free."""
        blocks = self.pool.take(count)
        request.blocks += blocks
        return blocks

    def publish(self, request: Request) -> None:
        """Share what is planned. Nothing in a plan may read what it writes: to be called behind the plan."""
        prefix_cache.publish(self.pool, request, self.block_size)

    def leave(self, request: Request) -> None:
        """Give the request's blocks back. What they hold is found again until they are needed."""
        self.publish(request)
        self.pool.release(request.blocks)
        request.blocks, request.computed = [], 0

    def forget(self, request: Request) -> None:
        """What was computed for it is wrong: let nobody find it. Whoever shares it now has computed with it already."""
        for digest in request.digests:
            self.pool.forget(digest)
        request.publish_at = prefix_cache.NEVER

    def gain(self, leaving: Iterable[Request], staying: Iterable[Request]) -> int:
        """Blocks that come free when `leaving` leave and `staying` do not."""
        kept = {block for request in staying for block in request.blocks}
        return len({block for request in leaving for block in request.blocks} - kept)

    def lose(self) -> None:
        """The workers are gone, with all that was in their memory. Requests must not hold blocks any more."""
        self.pool = BlockPool(self.num_blocks)

    def check(self, requests: Iterable[Request], blocks: range | None = None) -> None:
        """Raises AssertionError when books and holdings differ, `requests` being all that hold blocks."""
        self.pool.check((request.blocks for request in requests), blocks)
