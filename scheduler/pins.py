"""Prefixes that stay on the device for a while, used or not. Pure: times are arguments.

What a tenant has pinned is a tree of blocks: prefixes that begin alike share their blocks, and each pin is a path from
its last block to a root. So a block counts once for a tenant however many of its prefixes hold it, and what is kept here
grows with the blocks that may be pinned and with nothing else.

Pins have at most `most` blocks together. A tenant's quota is its part of them by weight, among those that have pins now;
what others leave of theirs may be used until they want it. Who wants more gives up its own pins, those first that were
asked for longest ago, the end of each prefix before its beginning.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from . import prefix_cache
from .blocks import BlockPool
from .request import Request

NO_BLOCK = 0  # in front of a root
LATEST_S = 1.0  # that a pin may end after its time, so that thousands of them are not looked at more often


@dataclass(slots=True, eq=False)
class Pin:
    """The prefix that ends with the block `end`. `until` is infinite as long as nobody has said what time it is."""

    id: int
    tenant: str
    end: int
    num_blocks: int
    until: float = inf


@dataclass(slots=True)
class _Tree:
    """Of one tenant; its pins by the time at which they were last asked for. Blocks are kept as plain numbers."""

    weight: float = 1.0
    pins: dict[int, Pin] = field(default_factory=dict)  # by id
    ends: dict[int, int] = field(default_factory=dict)  # block -> id of the pin that ends there
    parents: dict[int, int] = field(default_factory=dict)
    needs: dict[int, int] = field(default_factory=dict)  # block -> blocks behind it, and the pin that ends there


class Pins:
    """Which published blocks of `pool` are pinned, and for whom."""

    def __init__(self, pool: BlockPool, most: int) -> None:
        self.most = most  # blocks
        self.num_blocks = 0  # of all tenants, one that two have counting twice
        self.given_up: Counter[str] = Counter()  # blocks, by reason
        self._pool = pool
        self._pins: dict[int, Pin] = {}  # by id, those asked for longest ago first
        self._trees: dict[str, _Tree] = {}
        self._asked: dict[int, float] = {}  # id -> seconds, of those that were asked for since the time was last told
        self._next = inf  # no pin ends before this
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        """Those first that were asked for last."""
        return reversed(self._pins.values())

    # --- asking -------------------------------------------------------------------------------------------------------

    def renew(self, tenant: str, end: int, ttl_s: float) -> bool:
        """Ask again for the prefix that ends with this block. False if the tenant has no pin of just this one."""
        tree = self._trees.get(tenant)
        if tree is None or (id := tree.ends.get(end)) is None:
            return False
        self._pins[id], tree.pins[id] = self._pins.pop(id), tree.pins.pop(id)
        self._asked[id] = max(ttl_s, self._asked.get(id, 0.0))
        return True

    def ask(self, request: Request, block_size: int) -> None:
        """Pin what the request asks for, as soon as all of that is published; no effect when that is done."""
        count = min(request.pin_tokens // block_size, self.most)
        if not request.pin_s or (count and count >= request.publish_at // block_size):
            return
        ttl_s, request.pin_s = request.pin_s, 0.0
        if count and not (
            (end := self._pool.find(*prefix_cache.name(request, count - 1, block_size)))
            and self.renew(request.tenant, end, ttl_s)
        ):
            tokens = request.tokens[: count * block_size].tobytes()
            blocks = self._pool.find_chain(request.digests[:count], tokens)
            self.hold(request.tenant, request.weight, blocks, ttl_s)

    def hold(self, tenant: str, weight: float, blocks: Sequence[int], ttl_s: float) -> None:
        """Ask for a prefix, `blocks` being what `BlockPool.find_chain` has of it; for what may be pinned of it at all."""
        blocks = blocks[: self.most]
        if not blocks or self.renew(tenant, blocks[-1], ttl_s):
            return
        tree = self._trees.setdefault(tenant, _Tree())
        tree.weight = weight
        known = len(blocks)
        while known and blocks[known - 1] not in tree.needs:
            known -= 1
        new = blocks[known:]
        if known:
            tree.needs[blocks[known - 1]] += 1
        tree.needs.update(dict.fromkeys(new, 1))
        tree.parents.update(zip(new, [blocks[known - 1] if known else NO_BLOCK, *new], strict=False))
        for block in new:
            self._pool.pin(block)
        self.num_blocks += len(new)
        self._last_id += 1
        pin = Pin(self._last_id, tenant, blocks[-1], len(blocks))
        self._pins[pin.id] = tree.pins[pin.id] = pin
        tree.ends[pin.end] = pin.id
        self._asked[pin.id] = ttl_s
        self._keep_to_quotas()

    def _keep_to_quotas(self) -> None:
        while self.num_blocks > self.most:
            per_weight = self.most / sum(tree.weight for tree in self._trees.values())
            tree = max(self._trees.values(), key=lambda tree: len(tree.needs) / tree.weight)
            while self.num_blocks > self.most and len(tree.needs) > per_weight * tree.weight:
                self._shorten(next(iter(tree.pins.values())), "quota")

    # --- time ---------------------------------------------------------------------------------------------------------

    def told(self, now: float) -> None:
        """What was asked for since the last time counts from now on, and ends no earlier than it would have."""
        for id, ttl_s in self._asked.items():
            pin, until = self._pins[id], now + ttl_s
            pin.until = until if pin.until == inf else max(pin.until, until)
            self._next = min(self._next, pin.until)
        self._asked.clear()

    def next(self) -> float:
        """When `due` is to be asked at the latest."""
        return self._next

    def due(self, now: float) -> list[int]:
        """The ids of those whose time is over, `LATEST_S` late at most."""
        if now < self._next:
            return []
        earliest = min((pin.until for pin in self._pins.values() if pin.until > now), default=inf)
        self._next = max(earliest, now + LATEST_S)
        return [pin.id for pin in self._pins.values() if pin.until <= now]

    # --- giving up ----------------------------------------------------------------------------------------------------

    def drop(self, ids: Iterable[int], why: str) -> None:
        """Unknown ids are ignored."""
        for id in ids:
            if (pin := self._pins.get(id)) is not None:
                tree, block = self._trees[pin.tenant], pin.end
                del tree.ends[block]
                while block != NO_BLOCK and tree.needs[block] == 1:
                    block = self._give_up(tree, block, why)
                if block != NO_BLOCK:
                    tree.needs[block] -= 1
                self._remove(pin)

    def free(self, count: int) -> None:
        """Have `count` free blocks, at the cost of what nobody computes with. There must be so many of both."""
        pool = self._pool
        while pool.num_free < count:
            idle = next((pin for pin in self._pins.values() if pool.is_idle(pin.end)), None)
            # Behind a window a request has given back the beginning of a prefix, and holds its end.
            self._shorten(idle or next(iter(self._pins.values())), "pressure")

    def forget(self, blocks: set[int]) -> None:
        """What these hold is wrong."""
        for pin in [pin for pin in self._pins.values() if not blocks.isdisjoint(self._path(pin))]:
            self.drop([pin.id], "forgotten")

    def lose(self, pool: BlockPool) -> None:
        """All blocks are lost; there are others now."""
        self.given_up["lost"] += self.num_blocks
        self._pins.clear()
        self._trees.clear()
        self._asked.clear()
        self._pool, self.num_blocks, self._next = pool, 0, inf

    def check(self) -> None:
        """Raises AssertionError when the trees are none, or the pool has another idea of them."""
        pinned: Counter[int] = Counter()
        for tree in self._trees.values():
            needs = Counter(parent for parent in tree.parents.values() if parent != NO_BLOCK) + Counter(
                tree.ends.keys()
            )
            assert needs == tree.needs and tree.parents.keys() == tree.needs.keys(), "a pin's blocks are no path"
            assert {id: pin.end for id, pin in tree.pins.items()} == {id: end for end, id in tree.ends.items()}
            pinned.update(tree.needs.keys())
        assert dict(pinned) == self._pool.pinned, "the pool has other blocks pinned"
        assert self.num_blocks == pinned.total() <= max(self.most, 0), "more is pinned than may be"
        assert self._pins == {id: pin for tree in self._trees.values() for id, pin in tree.pins.items()}
        assert self._asked.keys() <= self._pins.keys()

    def _path(self, pin: Pin) -> Iterator[int]:
        block, parents = pin.end, self._trees[pin.tenant].parents
        while block != NO_BLOCK:
            yield block
            block = parents[block]

    def _shorten(self, pin: Pin, why: str) -> None:
        """By its last block; where others need that one, too, there is no more to it."""
        tree, block = self._trees[pin.tenant], pin.end
        del tree.ends[block]
        if tree.needs[block] > 1:
            tree.needs[block] -= 1
            self._remove(pin)
            return
        pin.end = self._give_up(tree, block, why)
        pin.num_blocks -= 1
        if pin.end == NO_BLOCK:
            self._remove(pin)
        elif pin.end in tree.ends:
            tree.needs[pin.end] -= 1
            self._remove(pin)
        else:
            tree.ends[pin.end] = pin.id

    def _give_up(self, tree: _Tree, block: int, why: str) -> int:
        """Returns the one before it."""
        del tree.needs[block]
        self._pool.unpin(block)
        self.num_blocks -= 1
        self.given_up[why] += 1
        return tree.parents.pop(block)

    def _remove(self, pin: Pin) -> None:
        tree = self._trees[pin.tenant]
        del self._pins[pin.id], tree.pins[pin.id]
        self._asked.pop(pin.id, None)
        if not tree.pins:
            del self._trees[pin.tenant]
