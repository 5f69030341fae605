"""An empty Redis database per test: this worker's own, or the given one, used by one test at a time."""

import contextlib
import os
from collections.abc import AsyncIterator

from redis.asyncio import Redis

from tests.harness.brokers import alone_on
from tests.harness.run import Run


@contextlib.asynccontextmanager
async def clean(run: Run) -> AsyncIterator[str]:
    """Lend the URL of a database without any key."""
    given = os.environ.get("TEST_REDIS_URL")
    with alone_on(given) if given else contextlib.nullcontext():
        url = given or run.server("redis") + run.worker.removeprefix("gw")
        async with Redis.from_url(url) as redis:
            await redis.flushdb()
        yield url
