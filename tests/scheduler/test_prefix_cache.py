"""A hit is exactly a common prefix of full blocks under one salt, and never the whole sequence."""

from array import array
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from quire.common.sampling import SamplingParams
from quire.scheduler import prefix_cache
from quire.scheduler.blocks import BlockPool
from quire.scheduler.request import Request

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24)


def request(tokens: list[int], salt: str = "") -> Request:
    return Request(0, array("i", tokens), len(tokens), SamplingParams(), salt=salt)


def publish(
    pool: BlockPool, tokens: list[int], block_size: int, salt: str = "", computed: int | None = None
) -> Request:
    written = request(tokens, salt)
    written.blocks = pool.take(-(-len(tokens) // block_size))
    written.computed = len(tokens) if computed is None else computed
    written.publish_at = block_size
    prefix_cache.publish(pool, written, block_size)
    return written


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(TOKENS, TOKENS, st.integers(1, 5), st.integers(0, 24), st.booleans())
def test_match_finds_the_common_full_blocks(
    stored: list[int], wanted: list[int], block_size: int, computed: int, freed: bool
) -> None:
    pool = BlockPool(32)
    written = publish(pool, stored, block_size, computed=min(computed, len(stored)))
    if freed:
        pool.release(written.blocks)
    found = prefix_cache.match(pool, request(wanted), block_size)
    full = min(common(stored, wanted), computed, len(wanted) - 1) // block_size
    assert found == written.blocks[:full]


@given(TOKENS, st.integers(0, 24))
def test_a_name_alone_is_no_hit(tokens: list[int], collided: int) -> None:
    """As if SHA-256 gave one block the name of another: its tokens differ."""
    pool = BlockPool(32)
    written = publish(pool, tokens, 1)
    for block in written.blocks[collided : collided + 1]:
        pool._tokens[block] = bytes(len(pool._tokens[block]))[:-1] + b"\x7f"
    assert prefix_cache.match(pool, request([*tokens, 0]), 1) == written.blocks[:collided]


@given(TOKENS, st.text(max_size=3), st.text(max_size=3))
def test_no_hit_across_salts(tokens: list[int], salt: str, other: str) -> None:
    pool = BlockPool(32)
    publish(pool, tokens, 1, salt)
    found = prefix_cache.match(pool, request(tokens, other), 1)
    assert len(found) == (len(tokens) - 1 if salt == other else 0)


@given(TOKENS, st.integers(1, 5), st.lists(st.integers(0, 24), max_size=6))
def test_publishing_in_pieces_is_publishing_at_once(tokens: list[int], block_size: int, stops: list[int]) -> None:
    pool, whole = BlockPool(32), BlockPool(32)
    publish(whole, tokens, block_size)
    grown = publish(pool, tokens, block_size, computed=0)
    for computed in [*sorted(min(stop, len(tokens)) for stop in stops), len(tokens)]:
        grown.computed = computed
        prefix_cache.publish(pool, grown, block_size)
        assert pool.num_published == len({tuple(tokens[: i + 1]) for i in range(computed)}) // block_size
        assert grown.publish_at == (computed // block_size + 1) * block_size
    assert pool.num_published == whole.num_published


@given(
    st.integers(0, 3 * prefix_cache.RUN), st.integers(1, 3), st.lists(st.integers(0, 3 * prefix_cache.RUN), max_size=4)
)
def test_a_name_is_a_function_of_salt_and_prefix_however_it_was_come_to(
    num_blocks: int, block_size: int, stops: list[int]
) -> None:
    """Disks and journals keep names, so it is this function and no other."""
    asked = request(list(range(num_blocks * block_size)), "salt")
    for count in sorted(min(stop, num_blocks) for stop in stops):
        prefix_cache.extend(asked, count, block_size)
    prefix_cache.extend(asked, num_blocks, block_size)
    before, expected = sha256(b"salt salt").digest(), []
    for index in range(num_blocks):
        begin = index - index % prefix_cache.RUN
        of_run = asked.tokens[begin * block_size : (index + 1) * block_size].tobytes()
        expected.append(sha256((expected[begin - 1] if begin else before) + of_run).digest())
    assert asked.digests == expected and len(set(expected)) == num_blocks


def test_equal_prefixes_computed_twice_are_published_once() -> None:
    pool = BlockPool(8)
    first, second = publish(pool, [1, 2, 3, 4], 2), publish(pool, [1, 2, 3, 4], 2)
    assert prefix_cache.match(pool, request([1, 2, 3, 4, 5]), 2) == first.blocks
    pool.check([first.blocks, second.blocks])


def test_equal_tokens_behind_different_prefixes_are_different() -> None:
    pool = BlockPool(8)
    publish(pool, [1, 1, 7, 7], 2)
    assert prefix_cache.match(pool, request([2, 2, 7, 7, 0]), 2) == []
    assert prefix_cache.match(pool, request([7, 7, 0]), 2) == []


def test_never_is_never() -> None:
    pool = BlockPool(8)
    quiet = request([1] * 8)
    quiet.blocks, quiet.computed, quiet.publish_at = pool.take(4), 8, prefix_cache.NEVER
    prefix_cache.publish(pool, quiet, 2)
    assert pool.num_published == 0
