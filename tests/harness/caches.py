"""An empty Redis database per test: this worker's own, or the one that TEST_REDIS_URL names, for one test at a time."""

import contextlib
from collections.abc import AsyncIterator

from redis.asyncio import Redis

from tests.harness.brokers import alone_on
from tests.harness.run import Run, given


@contextlib.asynccontextmanager
async def clean(run: Run) -> AsyncIterator[str]:
    """Lend the URL of a database without any key."""
    shared = given("TEST_REDIS_URL", 6379)
    with alone_on(shared) if shared else contextlib.nullcontext():
        url = shared or run.server("redis") + run.worker.removeprefix("gw")
        async with Redis.from_url(url) as redis:
            await redis.flushdb()
        yield url


async def copies_in(redis_url: str) -> int:
    """Return how many responses Redis has copies of."""
    async with Redis.from_url(redis_url) as client:
        return int(await client.dbsize())
