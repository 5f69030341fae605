"""Faults of Redis."""

import random

import redis.asyncio

from chaos.runner.faults.acts import Row, freezing, killing
from chaos.runner.system import System


async def _flush_redis(system: System, _: random.Random, __: float) -> None:
    async with redis.asyncio.Redis.from_url(system.redis.url) as client:
        await client.flushall()


FAULTS: dict[str, Row] = {
    "redis: kill -9": Row("redis", (0.2, 3.0), killing(lambda system: system.redis)),
    "redis: freeze": Row("redis", (0.5, 4.0), freezing(lambda system: system.redis)),
    "redis: flush": Row("redis", (0.0, 0.0), _flush_redis),
}
