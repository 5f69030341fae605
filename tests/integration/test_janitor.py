"""The janitor: expired keys go, a batch at a time, and nothing else does."""

import asyncpg

from app.operations.janitor import BATCH, Janitor
from app.orders.keys import Key
from tests.harness.orders import TENANT, place

KEYS = """
    INSERT INTO idempotency_keys
    SELECT 'default', 'made-' || n, '', 1, 201, '/orders/1', '', clock_timestamp() - interval '2 days',
           clock_timestamp() - make_interval(secs => n)
    FROM generate_series(1, $1) AS n
"""


async def keys(pool: asyncpg.Pool) -> list[str]:
    return [row["key"] for row in await pool.fetch("SELECT key FROM idempotency_keys ORDER BY key")]


async def test_expired_keys_are_removed_and_living_ones_and_orders_are_kept(pool: asyncpg.Pool) -> None:
    for name in ("living", "expired"):
        await place(pool, Key(TENANT, name, b"", 1))
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp() WHERE key = 'expired'")
    assert await Janitor(pool).run_once() == 0
    assert await keys(pool) == ["living"]
    assert await pool.fetchval("SELECT count(*) FROM orders") == 2


async def test_a_pass_removes_one_batch_and_says_that_there_is_more(pool: asyncpg.Pool) -> None:
    await pool.execute(KEYS, BATCH + 1)
    janitor = Janitor(pool)
    assert await janitor.run_once() == BATCH
    assert await keys(pool) == ["made-1"]  # the one that expired last
    assert await janitor.run_once() == 0
    assert await keys(pool) == []


async def test_a_key_that_somebody_takes_over_at_this_moment_is_left_alone(pool: asyncpg.Pool) -> None:
    await pool.execute(KEYS, 3)
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("SELECT FROM idempotency_keys WHERE key = 'made-2' FOR UPDATE")
        await Janitor(pool).run_once()
        assert await keys(pool) == ["made-2"]


async def test_with_nothing_to_do_it_does_nothing(pool: asyncpg.Pool) -> None:
    assert await Janitor(pool).run_once() == 0
