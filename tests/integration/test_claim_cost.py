"""Claims cost the same while another session holds a snapshot, which keeps the entries of every later row."""

import contextlib
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from uuid import UUID, uuid4

import pytest

from app import db
from app.messaging import outbox
from app.saga import steps, store
from tests.harness.orders import start_saga
from tests.harness.plans import buffers, plans_of
from tests.harness.wait import AMPLE_SECONDS

ROWS, TIMES = 20_000, 5
FEW = 10
EVENTS = """
    INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at, next_attempt_at)
    SELECT gen_random_uuid(), 'orders.order.placed.v1', gen_random_uuid()::text, 1, 'default', '{}', now(),
           clock_timestamp() - interval '1 hour'
    FROM generate_series(1, $1)
"""
SAGAS = """
    WITH placed AS (
        INSERT INTO orders (id, tenant, status, currency, total_minor, version, placed_at, updated_at)
        SELECT gen_random_uuid(), tenant, status, currency, total_minor, version, placed_at, updated_at
        FROM orders, generate_series(1, $2) WHERE id = $1
        RETURNING id
    )
    INSERT INTO sagas (id, plan_version, direction, step, attempts, version, next_attempt_at, deadline_at, started_at,
                       updated_at)
    SELECT placed.id, plan_version, direction, step, attempts, sagas.version,
           clock_timestamp() - interval '1 hour', deadline_at, started_at, sagas.updated_at
    FROM placed, sagas WHERE sagas.id = $1
"""


@contextlib.asynccontextmanager
async def snapshot(pool: db.Pool) -> AsyncIterator[None]:
    """Hold a snapshot, as a backup does."""
    async with pool.acquire() as conn, conn.transaction(isolation="repeatable_read"):
        await conn.fetchval("SELECT count(*) FROM orders")
        yield


async def claim_events(conn: db.Connection, since: datetime) -> None:
    await outbox.claim(conn, uuid4(), FEW, 30, since)


async def claim_sagas(conn: db.Connection, since: datetime) -> None:
    await store.claim(conn, "one", steps.PLANS, FEW, 30, since)


@pytest.fixture
async def saga(pool: db.Pool) -> UUID:
    """A saga that is due, and its order, whose event is due."""
    return await start_saga(pool)


@pytest.mark.parametrize("table", ["outbox", "sagas"])
async def test_a_held_snapshot_does_not_make_claims_slower(pool: db.Pool, saga: UUID, table: str) -> None:
    """From the hint on, a claim touches few more pages than in a new table. From the start, it touches all entries."""
    claim = claim_events if table == "outbox" else claim_sagas
    hint = await pool.fetchval(f"SELECT min(next_attempt_at) - interval '2 s' FROM {table}")  # noqa: S608 - ours
    start = hint.replace(year=1970)
    fresh = buffers(await plans_of(pool, partial(claim, since=start)))
    async with snapshot(pool):
        if table == "outbox":
            await pool.execute(EVENTS, ROWS, timeout=AMPLE_SECONDS)
            await pool.execute("UPDATE outbox SET published_at = now() WHERE id <> $1", saga, timeout=AMPLE_SECONDS)
        else:
            await pool.execute(SAGAS, saga, ROWS, timeout=AMPLE_SECONDS)
            await pool.execute("UPDATE sagas SET finished_at = now() WHERE id <> $1", saga, timeout=AMPLE_SECONDS)
        await pool.execute(f"VACUUM ANALYZE {table}", timeout=AMPLE_SECONDS)
        from_the_hint = buffers(await plans_of(pool, partial(claim, since=hint)))
        from_the_start = buffers(await plans_of(pool, partial(claim, since=start)))
    assert from_the_hint <= fresh * TIMES < from_the_start
