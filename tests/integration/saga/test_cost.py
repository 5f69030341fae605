"""The cost of a claim does not grow with the number of waiting sagas, which is large while a partner is down."""

from datetime import timedelta
from uuid import UUID

import pytest

from app import db
from app.saga import steps, store
from tests.harness.orders import start_saga
from tests.harness.plans import buffers, full_scans, indexes, plans_of
from tests.harness.wait import AMPLE_SECONDS

WAITING, BATCH = 20_000, 20
MANY = """
    WITH placed AS (
        INSERT INTO orders (id, tenant, status, currency, total_minor, version, placed_at, updated_at)
        SELECT gen_random_uuid(), tenant, status, currency, total_minor, version, placed_at, updated_at
        FROM orders, generate_series(1, $2) WHERE id = $1
        RETURNING id
    )
    INSERT INTO sagas (id, plan_version, direction, step, attempts, version, next_attempt_at, deadline_at, started_at,
                       updated_at)
    SELECT placed.id, plan_version, direction, step, attempts, sagas.version, sagas.next_attempt_at + $3::interval,
           deadline_at, started_at, sagas.updated_at
    FROM placed, sagas WHERE sagas.id = $1
"""


async def claim(conn: db.Connection) -> None:
    await store.claim(conn, "one", steps.PLANS, BATCH, 30)


async def count_touched_pages(pool: db.Pool) -> int:
    """Return how many pages a claim touches. No table is scanned in full."""
    await pool.execute("VACUUM ANALYZE orders, sagas", timeout=AMPLE_SECONDS)
    plans = await plans_of(pool, claim)
    assert full_scans(plans) == set()
    assert indexes(plans) >= {"sagas_next_attempt_at_idx"}
    return buffers(plans)


async def add(pool: db.Pool, saga: UUID, number: int, wait: timedelta) -> None:
    """Add copies of this saga that wait longer."""
    await pool.execute(MANY, saga, number, wait, timeout=AMPLE_SECONDS)


@pytest.mark.parametrize("due", [0, BATCH // 2, BATCH * 2])
async def test_waiting_sagas_are_not_read(pool: db.Pool, due: int) -> None:
    saga = await start_saga(pool)
    await add(pool, saga, WAITING, timedelta(hours=1))
    await add(pool, saga, due, timedelta())
    assert await count_touched_pages(pool) < 40 + 15 * min(due, BATCH)  # 340 more if it read the waiting sagas
