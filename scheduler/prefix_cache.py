"""Finds KV that was computed before for the same beginning of a sequence.

A full block is named by a SHA-256 chain: digest(i) = H(digest(i - 1) | its token ids as int32), digest(-1) = H(salt).
A name thus stands for the whole prefix and for who may share it. Chained block hashes are vLLM's automatic prefix
caching; nano-vllm's comparison of the stored tokens is in `BlockPool.find`.
"""

import sys
from hashlib import sha256

from .blocks import BlockPool
from .request import Request

NEVER = sys.maxsize  # as `publish_at`: this request's blocks are not shared


def match(pool: BlockPool, request: Request, block_size: int) -> list[int]:
    """The longest chain of published blocks that begins the request. At least one token is left to compute."""
    found: list[int] = []
    for index in range((len(request.tokens) - 1) // block_size):
        digest, tokens = _name(request, index, block_size)
        block = pool.find(digest, tokens)
        if block is None:
            break
        found.append(block)
    return found


def publish(pool: BlockPool, request: Request, block_size: int) -> None:
    """Share the blocks whose KV is planned and whose tokens are known. Plans that read them must come later."""
    full = min(request.computed, len(request.tokens)) // block_size
    for index in range(request.publish_at // block_size - 1, full):
        pool.publish(request.blocks[index], *_name(request, index, block_size))
        request.publish_at += block_size


def _name(request: Request, index: int, block_size: int) -> tuple[bytes, bytes]:
    """Digest and token bytes of a full block; digests are kept, each is computed once in a request's life."""
    digests, tokens = request.digests, request.tokens
    for i in range(len(digests), index + 1):
        parent = digests[-1] if digests else sha256(request.salt.encode(errors="surrogatepass")).digest()
        digests.append(sha256(parent + tokens[i * block_size : (i + 1) * block_size].tobytes()).digest())
    return digests[index], tokens[index * block_size : (index + 1) * block_size].tobytes()
