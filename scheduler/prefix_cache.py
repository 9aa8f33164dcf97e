"""Names of KV: equal names stand for equal prefixes, so what was computed before is found again.

A full block is named by SHA-256, in a chain of runs of `RUN` blocks: digest(i) = H(digest of the last block of the run
before | token ids, as int32, of its own run up to itself), digest(-1) = H(salt). A name thus stands for the whole prefix
and for who may share it, and for nothing else: it is the same in another process. Chained block hashes are vLLM's
automatic prefix caching; nano-vllm's comparison of the stored tokens is in `BlockPool.find`.
"""

import sys
from collections.abc import Callable
from hashlib import sha256

from .blocks import BlockPool
from .request import Request

NEVER = sys.maxsize  # as `publish_at`: this request's blocks are not shared
RUN = 32  # blocks that one hash goes through, since going on costs less than beginning; less than one is hashed again


def nowhere(_digest: bytes, _tokens: bytes) -> int | None:
    """Nothing is kept behind the device."""
    return None


def match(
    pool: BlockPool,
    request: Request,
    block_size: int,
    elsewhere: Callable[[bytes, bytes], int | None] = nowhere,
) -> list[int]:
    """The longest chain of blocks that are published, or found `elsewhere` by name and tokens, from the beginning of the
    request. At least one token is left to compute."""
    count = (len(request.tokens) - 1) // block_size
    extend(request, count, block_size)
    found = pool.find_chain(request.digests[:count], request.tokens[: count * block_size].tobytes())
    for index in range(len(found), count):
        digest, tokens = name(request, index, block_size)
        block = pool.find(digest, tokens)
        block = elsewhere(digest, tokens) if block is None else block
        if block is None:
            break
        found.append(block)
    return found


def publish(pool: BlockPool, request: Request, block_size: int) -> None:
    """Share the blocks whose KV is planned and whose tokens are known. Plans that read them must come later."""
    full = min(request.computed, len(request.tokens)) // block_size
    for index in range(request.publish_at // block_size - 1, full):
        pool.publish(request.blocks[index], *name(request, index, block_size))
        request.publish_at += block_size


def name(request: Request, index: int, block_size: int) -> tuple[bytes, bytes]:
    """Digest and token bytes of a full block."""
    if index >= len(request.digests):
        extend(request, index + 1, block_size)
    return request.digests[index], request.tokens[index * block_size : (index + 1) * block_size].tobytes()


def extend(request: Request, count: int, block_size: int) -> None:
    """Name the first `count` blocks. Names are kept: each is computed once in a request's life."""
    digests, first = request.digests, len(request.digests)
    if first >= count:
        return
    begin = first - first % RUN
    tokens = request.tokens[begin * block_size : count * block_size].tobytes()
    size = len(tokens) // (count - begin)
    next_at = (first - begin) * size
    for run_at in range(0, len(tokens), RUN * size):
        run = sha256(digests[begin + run_at // size - 1] if begin or run_at else root(request))
        run.update(tokens[run_at:next_at])
        update, digest, append = run.update, run.digest, digests.append  # 6,000 times for a prompt of 100,000 tokens
        end = min(run_at + RUN * size, len(tokens))
        for at in range(next_at, end, size):
            update(tokens[at : at + size])
            append(digest())
        next_at = end


def root(request: Request) -> bytes:
    """Whose prefixes these are: those of all requests of its salt, or its own alone."""
    if request.private:
        return sha256(b"request %d" % request.arrival).digest()
    return sha256(b"salt " + request.salt.encode(errors="surrogatepass")).digest()
