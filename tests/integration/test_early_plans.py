"""Plans of statements that were prepared while the tables were empty are made anew as the tables grow."""

from uuid import UUID, uuid4

import pytest

from app import db, db_session
from app.messaging import outbox
from app.messaging.outbox import PublishRecord
from app.orders import store as order_store
from app.saga import steps, store
from app.saga.store import SagaWrite
from tests.harness.orders import start_saga
from tests.harness.wait import AMPLE_SECONDS, wait_until

TIMES, GROWTH = 10, 5_000  # Postgres may keep a plan from the sixth run on
TABLES = ("orders", "outbox", "sagas")
# Not `lived_through`: it creates a temporary schema, and that makes Postgres plan every statement anew.
ADD = """
    WITH placed AS (
        INSERT INTO orders (id, tenant, status, currency, total_minor, version, placed_at, updated_at)
        SELECT gen_random_uuid(), tenant, status, currency, total_minor, version, placed_at, updated_at
        FROM orders, generate_series(1, $1)
        RETURNING id, placed_at
    ), event AS (
        INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at, published_at)
        SELECT id, 'orders.order.placed.v1', id, 1, 'default', '{}', placed_at, placed_at FROM placed
    )
    INSERT INTO sagas (id, plan_version, direction, attempts, version, next_attempt_at, deadline_at, started_at,
                       updated_at, finished_at)
    SELECT id, 1, 'forward', 0, 9, placed_at, placed_at, placed_at, placed_at, placed_at FROM placed
"""
ROWS_READ = "SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables"


async def work(pool: db.Pool, order_id: UUID) -> int:
    """Run statements of relay and sagas that find rows by their ids. Return how many rows the transaction read."""
    token = uuid4()
    async with db.transaction(pool) as conn:
        before = await conn.fetchval(ROWS_READ)
        claimed = await outbox.claim(conn, token, 1, 30)
        assert await outbox.record_results(conn, token, [PublishRecord(row.envelope.id) for row in claimed])
        [saga] = await store.claim(conn, "one", steps.PLANS, 1, 30)
        assert await store.save(conn, [SagaWrite(saga, saga.state, [], 0, None)])
        assert await order_store.load(conn, order_id, lock=True)
        read: int = await conn.fetchval(ROWS_READ) - before
        await conn.execute("UPDATE outbox SET published_at = NULL WHERE subject = $1", str(order_id))
    return read


async def test_a_grown_table_is_soon_not_read_whole(
    pool: db.Pool, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in TABLES:  # or an ANALYZE might be what renews the plans
        await pool.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    order_id = await start_saga(pool)
    monkeypatch.setattr(db_session, "PLAN_SECONDS", 1)
    async with db.open_pool(database_url, 1, AMPLE_SECONDS, AMPLE_SECONDS) as session:
        for _ in range(TIMES):
            await work(session, order_id)
        await pool.execute(ADD, GROWTH, timeout=AMPLE_SECONDS)

        async def reads_little() -> bool:
            return await work(session, order_id) < 100

        await wait_until(reads_little, AMPLE_SECONDS, "plans that use the indexes")
