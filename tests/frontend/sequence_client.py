"""One client of a fake scheduler, on the test's own event loop, and what its sequences should hold."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from quire.common.curve import PeerKeys
from quire.common.sampling import SamplingParams
from quire.frontend.engine_client import EngineClient
from quire.frontend.streams import TokenStream

from .fake_scheduler import FakeScheduler


@asynccontextmanager
async def connected(scheduler: FakeScheduler, keys: PeerKeys | None = None) -> AsyncIterator[EngineClient]:
    async with asyncio.timeout(30), EngineClient(scheduler.address, keys) as client:
        await client.wait_ready()
        yield client


def submit(client: EngineClient, seed: int = 0, max_tokens: int = 40) -> TokenStream:
    params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)
    return client.submit([5, 6, 7], params.resolve(eos_token_ids=(), vocab_size=99, room=500))


def expected(seed: int = 0, max_tokens: int = 40) -> list[int]:
    return [(5, 6, 7)[(seed + i) % 3] for i in range(max_tokens)]


async def ids(stream: TokenStream) -> list[int]:
    return [id async for delta in stream for id in delta.tokens]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)
