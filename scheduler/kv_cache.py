"""The KV of requests: block tables over the device's blocks, what they share, and what is found again.

The scheduler decides who gets blocks; here is what that means for the blocks. A request's `blocks`, `digests` and
`publish_at`, and `computed` where it is admitted or leaves, are written here and nowhere else.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..common.messages import pack
from . import prefix_cache
from .blocks import NULL_BLOCK, BlockPool, blocks_for
from .pins import Pins
from .request import Request
from .tiers import Copies, Tier, Worth, Written

WORTH_WAITING = 64  # tokens that somebody else computes now; for fewer a step's wait is the greater loss


def _unknown(_start: int, _count: int) -> float | None:
    """What a prefill takes, before anything was measured."""
    return None


@dataclass(frozen=True, slots=True)
class Hit:
    """What there is to begin a request with."""

    blocks: list[int]  # of the device or of tiers behind it
    coming: bool = False  # more of it is being computed for another request


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was found last time. As long as all of it holds, nothing is found again."""

    request: Request
    num_released: int
    digest: bytes  # where the chain ended; b"" at its end


class KvCache:
    """`num_blocks` blocks of `block_size` tokens on the device and, behind them, `num_host_blocks` in host memory and
    `num_disk_blocks` in a file. With `caching`, equal prefixes share blocks, and a share of `max_pinned` of the device's
    may be pinned. A model sees `window` tokens, or all if 0."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        caching: bool,
        num_host_blocks: int = 0,
        num_disk_blocks: int = 0,
        window: int = 0,
        max_pinned: float = 0.0,
    ) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self.num_host_blocks = num_host_blocks
        self.window = window
        self.pool = BlockPool(num_blocks)
        self.pins = Pins(self.pool, int(max_pinned * num_blocks) if caching else 0)
        self.disk = Tier(BlockPool(num_disk_blocks), num_blocks + num_host_blocks, log=[]) if num_disk_blocks else None
        self.host = Tier(BlockPool(num_host_blocks), num_blocks, behind=self.disk) if num_host_blocks else None
        self.saved = self.host or self.disk
        self.worth_waiting = WORTH_WAITING
        self.prefill_s: Callable[[int, int], float | None] = _unknown
        self.moved: Counter[str] = Counter()  # blocks: "saved", "restored", and "recomputed" though they were saved
        self._copies: Copies = []  # of the plan in the making
        self._forked = False  # some are made before it
        self._coming: dict[bytes, Request] = {}  # full blocks that are to be computed, and for whom
        self._coming_back: set[bytes] = set()  # blocks of preempted requests
        self._worth = Worth(num_host_blocks + num_disk_blocks)
        self._refused: Refusal | None = None

    @property
    def num_free(self) -> int:
        """Blocks that those who run can have. What is pinned and in no use is not worth preempting anybody."""
        return self.pool.num_free + self.pool.num_idle

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return blocks_for(num_tokens, self.block_size)

    def restoring_takes(self, host_block_s: float, disk_block_s: float) -> None:
        """Seconds that copying a block to the device takes."""
        for tier in self.saved or ():
            tier.block_s = disk_block_s if tier is self.disk else host_block_s

    # --- requests come and go -----------------------------------------------------------------------------------------

    def find(self, request: Request, reserve: int) -> Hit | None:
        """The cached blocks to begin a waiting request with; None when there is no room for it now.

        All its known tokens must fit, though they may be computed in chunks: a request that is let in by its first
        chunk alone would be preempted halfway. `reserve` blocks stay free. Pins are given up where nobody runs who could
        make room.
        """
        if not self.num_free or self._still_refused(request):
            return None  # it needs one block at least, for the token that no cache gives
        found = self._match(request)
        on_device = [block for block in found if block <= self.num_blocks] if self.saved else found
        needed = self.blocks_for(len(request.tokens)) - len(on_device) + reserve
        if self.num_free == self.num_blocks:
            self._unpin_for(needed, on_device)
        if needed > self.pool.num_free - len(on_device) and needed > self._room_beside(on_device):  # the first is quick
            end = request.digests[len(found)] if len(found) < len(request.digests) else b""
            self._refused = Refusal(request, self.pool.num_released, end)
            return None
        return Hit(found, self._worth_waiting(request, len(found)))

    def find_at_any_cost(self, request: Request, reserve: int) -> Hit | None:
        """As `find`, for a request that others are about to be preempted for: pins are given up first."""
        if (hit := self.find(request, reserve)) is not None or not self.pool.num_idle:
            return hit
        on_device = [block for block in self._match(request) if block <= self.num_blocks]
        self._unpin_for(self.blocks_for(len(request.tokens)) - len(on_device) + reserve, on_device)
        return self.find(request, reserve)

    def awaits(self, request: Request) -> bool:
        """Whether it is better for the request to wait for what is being computed for another one."""
        return bool(self._coming) and self._worth_waiting(request, len(self._match(request)))

    def admit(self, request: Request, hit: Hit) -> None:
        """Blocks for all that is known of a request, beginning with those that `find` returned."""
        saved = [block for block in hit.blocks if block > self.num_blocks]
        self._hold(hit.blocks, saved)
        fresh = iter(self._take(self.blocks_for(len(request.tokens)) - len(hit.blocks) + len(saved)))
        request.blocks = [
            block if block <= self.num_blocks else self._restore(block, next(fresh)) for block in hit.blocks
        ]
        for index, block in enumerate(request.blocks if saved else ()):
            self.pool.publish(block, *prefix_cache.name(request, index, self.block_size))
        request.blocks += fresh
        if self.saved is not None:
            self.saved.release(saved)
        request.computed = len(hit.blocks) * self.block_size
        request.publish_at = request.computed + self.block_size if self._naming else prefix_cache.NEVER
        if saved:
            names = zip(hit.blocks, request.digests, strict=False)
            self._worth.restored(
                sum(block > self.num_blocks and name not in self._coming_back for block, name in names)
            )
        if self._coming_back:
            self._coming_back.difference_update(request.digests)
        self._expect(request)
        self.pins.ask(request, self.block_size)

    def grow(self, request: Request, count: int) -> list[int]:
        """`count` more blocks, which must be free."""
        blocks = self._take(count)
        request.blocks += blocks
        return blocks

    def publish(self, request: Request) -> None:
        """Share what is planned. Nothing in a plan may read what it writes: to be called behind the plan."""
        first = request.publish_at // self.block_size - 1
        prefix_cache.publish(self.pool, request, self.block_size)
        if self._coming and request.publish_at != prefix_cache.NEVER:
            self._expected(request, request.digests[first : request.publish_at // self.block_size - 1])
        if request.pin_s:
            self.pins.ask(request, self.block_size)

    def rename(self, request: Request, parent: Request) -> None:
        """A request that holds nothing has got another one's tokens."""
        self._refused = None
        request.digests, request.private = parent.digests[:], parent.private

    def fork(self, request: Request, parent: Request) -> bool:
        """Let a request that holds nothing go on where the one is whose tokens it has: full blocks are shared, and the
        next plan copies the last one if it is not full (copy on write). False if there is nothing to go on with, or no
        block for the copy."""
        full, rest = divmod(parent.computed, self.block_size)
        if not parent.blocks or (rest and not self.num_free):
            return False
        request.blocks = parent.blocks[:full]
        self.pool.share(request.blocks[parent.retired :])
        if rest:
            request.blocks += self._take(1)
            self._copies.append((parent.blocks[full], request.blocks[-1]))
            self._forked = True
        request.computed, request.retired, request.publish_at = parent.computed, parent.retired, parent.publish_at
        return True

    def leave(self, request: Request) -> None:
        """Give the request's blocks back. What they hold is found again until they are needed."""
        self.publish(request)
        if self._coming:
            self._expected(request, request.digests)
        self.pool.release(request.blocks[request.retired :])
        request.blocks, request.computed, request.retired = [], 0, 0

    def planned(self, requests: Iterable[Request], ripe: Iterable[Request]) -> None:
        """A plan of these is made. Only now is shared what it fills, and given back what is not seen behind it: nothing in
        it may read what it writes."""
        for request in ripe:
            self.publish(request)
        if self.window:
            for request in requests:
                self.retire(request)

    def retire(self, request: Request) -> None:
        """Give back the blocks that no query sees any more. Its table keeps their places. To be called behind the plan,
        and behind `publish`: what the plan reads may go to the next one, and what is shared is named first."""
        first = request.retired
        end = (request.computed + 1 - self.window) // self.block_size
        if self._naming:
            end = min(end, request.publish_at // self.block_size - 1)
        if end > first:
            self.pool.release(request.blocks[first:end])
            request.blocks[first:end] = [NULL_BLOCK] * (end - first)
            request.retired = end

    def comes_back(self, request: Request) -> None:
        """It has left, and will want what was computed for it."""
        if self.saved is not None:
            self._coming_back.update(request.digests)

    def end(self, request: Request) -> None:
        """It does not come back."""
        if self._coming_back:
            self._coming_back.difference_update(request.digests)
        if request.private:
            self._forget(request.digests)

    def forget(self, request: Request) -> None:
        """What was computed for it is wrong: let nobody find it. Whoever shares it now has computed with it already."""
        self._forget(request.digests)
        request.publish_at, request.pin_s = prefix_cache.NEVER, 0.0

    def gain(self, leaving: Iterable[Request], staying: Iterable[Request]) -> int:
        """Blocks that come free when `leaving` leave and `staying` do not."""
        kept = {block for request in staying for block in request.blocks}
        return len({block for request in leaving for block in request.blocks} - kept - {NULL_BLOCK})

    # --- plans and workers --------------------------------------------------------------------------------------------

    def take_copies(self) -> bytes:
        """The copies that the next plan makes, as its column."""
        copies, self._copies, self._forked = self._copies, [], False
        return pack(block for pair in copies for block in pair)

    def take_written(self) -> list[Written]:
        """What changes on disk by that plan."""
        if self.disk is None or not self.disk.log:
            return []
        written, self.disk.log = self.disk.log, []
        return written

    def recall(self, content: Iterable[Written]) -> None:
        """What the disk holds, and nothing else."""
        assert self.disk is not None, "nothing is kept on disk"
        pool = self.disk.pool = BlockPool(self.disk.pool.num_blocks)
        for written in content:
            pool.share([written.block])
            pool.publish(written.block, written.digest, written.tokens)
            pool.release([written.block])

    def lose(self, unsure: Iterable[Written] = ()) -> None:
        """The workers are gone, with all that was in their memory; on disk, what was `unsure` may not have been written.
        Requests must not hold blocks any more."""
        self.pool = BlockPool(self.num_blocks)
        self.pins.lose(self.pool)
        if self.host is not None:
            self.host.pool = BlockPool(self.num_host_blocks)
        if self.disk is not None:
            for written in (*unsure, *(self.disk.log or ())):
                self.disk.pool.forget(written.digest)
            self.disk.log = []
        self._copies.clear()
        self._forked = False
        self._coming.clear()
        self._coming_back.clear()
        self._refused = None

    def check(self, requests: Iterable[Request], blocks: range | None = None) -> None:
        """Raises AssertionError when books and holdings differ, `requests` being all that hold blocks."""
        assert self._forked or not self._copies, "a copy that no plan makes"
        self.pool.check((request.blocks[request.retired :] for request in requests), blocks)
        self.pins.check()
        for tier in self.saved or ():
            tier.pool.check((), blocks and range(blocks.start, min(blocks.stop, tier.pool.num_blocks + 1)))

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _naming(self) -> bool:
        return self.caching or self.saved is not None

    def _still_refused(self, request: Request) -> bool:
        """A blocked request is asked for at each step: its chain is not walked again before something has changed."""
        refused = self._refused
        return (
            refused is not None
            and refused.request is request
            and refused.num_released == self.pool.num_released
            and not self.pool.knows(refused.digest)
        )

    def _match(self, request: Request) -> list[int]:
        """The chain that is found, as far as it is cheaper to copy than to compute."""
        if not self._naming:
            return []
        request.private = not self.caching
        found = prefix_cache.match(self.pool, request, self.block_size, self._elsewhere)
        first = next((i for i, block in enumerate(found if self.saved else ()) if block > self.num_blocks), None)
        if first is None or self.saved is None:
            return found
        start = first * self.block_size
        compute_s = self.prefill_s(start, len(found) * self.block_size - start)
        if compute_s is not None and compute_s < self.saved.restore_s(found):
            self.moved["recomputed"] += len(found) - first
            return found[:first]
        return found

    def _elsewhere(self, digest: bytes, tokens: bytes) -> int | None:
        return self.saved.find(digest, tokens) if self.saved is not None else None

    def _worth_waiting(self, request: Request, num_found: int) -> bool:
        """Whether another request's prefill is about to give this one more than it would get by a step of its own."""
        if not self._coming:
            return False
        wanted = (len(request.tokens) - 1) // self.block_size
        count = 0
        for index in range(num_found, min(wanted, num_found + self.blocks_for(self.worth_waiting))):
            other = self._coming.get(prefix_cache.name(request, index, self.block_size)[0])
            if other is None or other.priority > request.priority or other.suspect:
                return False
            count += 1
        return count * self.block_size >= self.worth_waiting

    def _expect(self, request: Request) -> None:
        """Others may wait for what is computed for it now."""
        if self.caching and len(request.tokens) - request.computed >= self.worth_waiting:
            for index in range(request.computed // self.block_size, len(request.tokens) // self.block_size):
                self._coming.setdefault(prefix_cache.name(request, index, self.block_size)[0], request)

    def _expected(self, request: Request, digests: Sequence[bytes]) -> None:
        """It is here, or will not come."""
        for digest in digests:
            if self._coming.get(digest) is request:
                del self._coming[digest]

    def _hold(self, blocks: list[int], saved: list[int]) -> None:
        self.pool.share(block for block in blocks if block <= self.num_blocks)
        if self.saved is not None:
            self.saved.hold(saved)

    def _room_beside(self, found: list[int]) -> int:
        """Free blocks, if those that were found are taken up as well."""
        return self.pool.num_free - self.pool.count_free(found)

    def _unpin_for(self, needed: int, found: list[int]) -> None:
        """Give up pins until there is so much room beside the blocks that were found, or there are no more."""
        while (lacking := needed - self._room_beside(found)) > 0 and self.pool.num_idle:
            self.pins.free(self.pool.num_free + min(lacking, self.pool.num_idle))

    def _take(self, count: int) -> list[int]:
        """Blocks to write to; what they held is saved."""
        if self.pool.num_free < count:
            self.pins.free(count)
        if self.saved is not None:
            before = len(self._copies)
            compute_s = self.prefill_s(0, self.block_size)
            for block, digest, tokens in self.pool.evict(count):
                if digest not in self._coming_back:
                    if not self._worth.pays(compute_s, self.saved.block_s):
                        continue
                    self._worth.saved()
                self.saved.save(block, digest, tokens, self._copies)
            self.moved["saved"] += len(self._copies) - before
        return self.pool.take(count)

    def _restore(self, saved: int, block: int) -> int:
        self._copies.append((saved, block))
        self.moved["restored"] += 1
        return block

    def _forget(self, digests: Iterable[bytes]) -> None:
        forgotten: set[int] = set()
        for digest in digests:
            if (block := self.pool.forget(digest)) is not None:
                forgotten.add(block)
            if self.saved is not None:
                self.saved.forget(digest)
        if not forgotten.isdisjoint(self.pool.pinned):
            self.pins.forget(forgotten)
