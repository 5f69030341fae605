"""Plans of statements that were prepared while the tables were empty are made anew as the tables grow."""

from uuid import UUID, uuid4

import pytest

from app import db, db_session
from app.messaging import outbox
from app.messaging.outbox import PublishRecord
from app.orders import store as order_store
from app.saga import steps, store
from app.saga.store import SagaWrite
from tests.harness.history import lived_through
from tests.harness.orders import start_saga
from tests.harness.wait import AMPLE_SECONDS, wait_until

TIMES, GROWTH = 10, 5_000  # Postgres may keep a plan from the sixth run on
TABLES = ("orders", "outbox", "sagas")
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
        await lived_through(pool, GROWTH, "1 hour")

        async def reads_little() -> bool:
            return await work(session, order_id) < 100

        await wait_until(reads_little, AMPLE_SECONDS, "plans that use the indexes")
