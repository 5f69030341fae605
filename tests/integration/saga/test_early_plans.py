"""A statement that was prepared while the tables were empty stays cheap until Postgres analyzes them."""

from uuid import uuid4

from app import db
from app.messaging import outbox
from app.messaging.outbox import PublishRecord
from app.saga import steps, store
from app.saga.store import SagaWrite
from tests.harness.orders import start_saga
from tests.harness.wait import AMPLE_SECONDS

TIMES, GROWTH = 10, 5_000  # Postgres may keep a plan from the sixth run on
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
READ_WHOLE = "SELECT relname FROM pg_stat_xact_user_tables WHERE seq_scan > 0"  # by the session that asks, lately


async def work(conn: db.Connection) -> None:
    """Run the statements of relay and sagas that find rows by their ids."""
    token = uuid4()
    claimed = await outbox.claim(conn, token, 1, 30)
    assert await outbox.record_results(conn, token, [PublishRecord(row.envelope.id) for row in claimed])
    [saga] = await store.claim(conn, "one", steps.PLANS, 1, 30)
    assert await store.save(conn, [SagaWrite(saga, saga.state, [], 0, None)])


async def test_a_growing_table_is_not_read_whole(pool: db.Pool, database_url: str) -> None:
    saga_id = await start_saga(pool)
    async with db.open_pool(database_url, 1, AMPLE_SECONDS, AMPLE_SECONDS, by_index=True) as by_index:
        for number in range(TIMES):
            async with db.transaction(by_index) as conn:
                await work(conn)
                assert not await conn.fetch(READ_WHOLE)
            await pool.execute("UPDATE outbox SET published_at = NULL WHERE subject = $1", str(saga_id))
            if number == TIMES - 2:
                await pool.execute(ADD, GROWTH, timeout=AMPLE_SECONDS)
