"""The cost of the outbox does not grow with history, whatever the planner's statistics are."""

import itertools
from functools import partial
from uuid import uuid4

import pytest

from app import db
from app.errors import OutboxFull
from app.messaging import outbox, outbox_admin
from app.messaging.backpressure import Backpressure
from app.messaging.outbox import PublishRecord
from tests.harness.plans import Plan, buffers, full_scans, indexes, plans_of
from tests.harness.wait import AMPLE_SECONDS

BATCH, HISTORY, BACKLOG = 50, 50_000, 5_000
ROWS = """
    INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at, published_at)
    SELECT gen_random_uuid(), 'orders.order.placed.v1', gen_random_uuid()::text, 1, 'default',
           jsonb_build_object('total', '29.97', 'filler', repeat('x', 300)), clock_timestamp(),
           CASE WHEN $2 THEN clock_timestamp() END
    FROM generate_series(1, $1)
"""


async def add(pool: db.Pool, rows: int, *, published: bool) -> None:
    await pool.execute(ROWS, rows, published)


async def claim_and_settle(conn: db.Connection) -> None:
    token = uuid4()
    claimed = await outbox.claim(conn, token, BATCH, 30)
    assert len(claimed) == BATCH
    await outbox.record_results(conn, token, [PublishRecord(row.envelope.id) for row in claimed])


@pytest.fixture
async def first_day(pool: db.Pool) -> int:
    """Return the pages that a batch touches in a table with hardly any other rows."""
    await add(pool, BATCH * 2, published=False)
    return buffers(await plans_of(pool, claim_and_settle))


async def cost(pool: db.Pool) -> tuple[list[Plan], int]:
    plans = await plans_of(pool, claim_and_settle)
    assert len(plans) == 2
    assert full_scans(plans) == set()
    assert indexes(plans[:1]) == {"outbox_next_attempt_at_idx", "outbox_subject_sequence_idx", "outbox_pkey"}
    return plans, buffers(plans)


async def test_a_batch_costs_the_same_after_a_long_history(pool: db.Pool, first_day: int) -> None:
    """A batch touches less than twice as many pages after a long history."""
    await add(pool, HISTORY, published=True)
    for _ in range(2):  # only the deeper tree of the primary key may cost more
        _, touched = await cost(pool)
        assert touched < first_day * 2
        await pool.execute("ANALYZE outbox")


async def test_a_batch_costs_the_same_with_old_statistics(pool: db.Pool, first_day: int) -> None:
    """In an outage, the statistics still describe a nearly empty table."""
    await add(pool, HISTORY, published=True)
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp()")
    await pool.execute("ANALYZE outbox")  # the statistics say that no row is pending
    await add(pool, BACKLOG, published=False)
    _, touched = await cost(pool)
    assert touched < first_day * 2


async def test_rows_that_are_not_due_are_not_read(pool: db.Pool) -> None:
    """A claim does not read rows that wait for their next attempt."""
    await add(pool, BACKLOG, published=False)
    await pool.execute("UPDATE outbox SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    await pool.execute("VACUUM ANALYZE outbox")
    assert buffers(await plans_of(pool, partial(outbox.claim, token=uuid4(), limit=BATCH, lease_seconds=30))) < 20


async def test_the_generic_plan_is_the_same(pool: db.Pool, first_day: int) -> None:
    """The generic plan costs less than twice as much as a custom plan for few rows."""
    await add(pool, HISTORY, published=True)
    await add(pool, BACKLOG, published=False)
    await pool.execute("ANALYZE outbox")
    name = await pool.fetchval("SELECT current_database()")
    await pool.execute(f"ALTER DATABASE {name} SET plan_cache_mode = force_generic_plan")
    await pool.expire_connections()
    _, touched = await cost(pool)
    assert touched < first_day * 2


async def test_dead_index_entries_are_vacuumed_early(
    pool: db.Pool,
) -> None:
    """By default, a vacuum waits for a share of the table, so claims would get slower every year."""
    query = "SELECT relname, reloptions FROM pg_class WHERE reloptions IS NOT NULL AND relkind = 'r'"
    found = {row["relname"]: set(row["reloptions"]) for row in await pool.fetch(query)}
    expected = {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=20000"}
    tables = dict.fromkeys(("outbox", "inbox", "orders", "idempotency_keys"), expected)
    assert found == {**tables, "sagas": expected | {"fillfactor=70"}}


async def test_pending_rows_are_counted_by_the_index(pool: db.Pool) -> None:
    """Old and new rows are counted by the partial index."""
    await add(pool, HISTORY, published=True)
    await add(pool, 10, published=False)
    await pool.execute("VACUUM ANALYZE outbox")
    for act in (outbox_admin.stats, partial(outbox.count_pending, at_most=1_000_001)):
        plans = await plans_of(pool, act)
        assert full_scans(plans) == set()
        assert buffers(plans) < 100


@pytest.mark.parametrize(
    ("limit", "tick_seconds", "looks"), [(1_000_000, 0, 1), (1_000_000, 1, 2), (100, 0, 100), (100, 1, 5)]
)
async def test_the_backlog_is_counted_only_when_needed(
    pool: db.Pool, database_url: str, limit: int, tick_seconds: int, looks: int
) -> None:
    """The clock advances with each reading: room for a million lasts 50 s, and a count costs one tick."""
    statements: list[str] = []
    async with db.open_pool(database_url, 1, wait_seconds=AMPLE_SECONDS) as narrow:
        async with db.connection(narrow) as conn:
            conn.add_query_logger(lambda query: statements.append(query.query))
        await add(pool, 100, published=False)
        backlog = Backpressure(narrow, limit, clock=itertools.count(step=tick_seconds).__next__)
        for _ in range(100):
            await backlog.run_once()
        assert len(statements) == looks
        backlog.require_room()


async def test_a_backlog_over_its_limit_is_noticed(pool: db.Pool) -> None:
    """A backlog over its limit is noticed even if there was room before."""
    await add(pool, 100, published=False)
    backlog = Backpressure(pool, 100, clock=lambda: 0.0)
    await backlog.run_once()
    backlog.require_room()
    await add(pool, 1, published=False)
    await backlog.run_once()
    with pytest.raises(OutboxFull):
        backlog.require_room()
