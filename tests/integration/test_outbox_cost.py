"""What the outbox costs: the same after a year as on the first day, whatever the planner believes of the table."""

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
    """Pages that a batch touches in a table that has hardly more rows than it."""
    await add(pool, BATCH * 2, published=False)
    return buffers(await plans_of(pool, claim_and_settle))


async def cost(pool: db.Pool) -> tuple[list[Plan], int]:
    plans = await plans_of(pool, claim_and_settle)
    assert len(plans) == 2
    assert full_scans(plans) == set()
    assert indexes(plans[:1]) == {"outbox_next_attempt_at_idx", "outbox_subject_sequence_idx", "outbox_pkey"}
    return plans, buffers(plans)


async def test_a_batch_costs_the_same_behind_a_long_history(pool: db.Pool, first_day: int) -> None:
    await add(pool, HISTORY, published=True)
    for _ in range(2):  # the deeper tree of the primary key is all that it may notice
        _, touched = await cost(pool)
        assert touched < first_day * 2
        await pool.execute("ANALYZE outbox")


async def test_a_batch_costs_the_same_in_an_outage_that_the_statistics_know_nothing_of(
    pool: db.Pool, first_day: int
) -> None:
    await add(pool, HISTORY, published=True)
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp()")
    await pool.execute("ANALYZE outbox")  # there is nothing pending, it says
    await add(pool, BACKLOG, published=False)
    _, touched = await cost(pool)
    assert touched < first_day * 2


async def test_rows_that_wait_for_their_next_attempt_are_not_looked_at(pool: db.Pool) -> None:
    await add(pool, BACKLOG, published=False)
    await pool.execute("UPDATE outbox SET next_attempt_at = clock_timestamp() + interval '1 hour'")
    await pool.execute("VACUUM ANALYZE outbox")
    assert buffers(await plans_of(pool, partial(outbox.claim, token=uuid4(), limit=BATCH, lease_seconds=30))) < 20


async def test_a_plan_made_for_any_values_is_the_same(pool: db.Pool, first_day: int) -> None:
    await add(pool, HISTORY, published=True)
    await add(pool, BACKLOG, published=False)
    await pool.execute("ANALYZE outbox")
    name = await pool.fetchval("SELECT current_database()")
    await pool.execute(f"ALTER DATABASE {name} SET plan_cache_mode = force_generic_plan")
    await pool.expire_connections()
    _, touched = await cost(pool)
    assert touched < first_day * 2


async def test_what_was_published_is_stepped_over_once_and_its_dead_entries_are_cleared_by_a_fixed_number(
    pool: db.Pool,
) -> None:
    """A share of the table, as is the default, would let each claim step over more of them with every year."""
    query = "SELECT relname, reloptions FROM pg_class WHERE reloptions IS NOT NULL AND relkind = 'r'"
    found = {row["relname"]: set(row["reloptions"]) for row in await pool.fetch(query)}
    expected = {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=20000"}
    assert found == dict.fromkeys(("outbox", "inbox", "orders", "sagas", "idempotency_keys"), expected)


async def test_old_and_new_rows_together_are_counted_by_the_partial_index(pool: db.Pool) -> None:
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
async def test_the_backlog_is_counted_again_only_when_the_room_that_was_left_can_be_filled_and_never_all_the_time(
    pool: db.Pool, database_url: str, limit: int, tick_seconds: int, looks: int
) -> None:
    """On a clock that goes on whenever it is read: room for a million is good for 50 s, and a look costs one tick."""
    statements: list[str] = []
    async with db.open_pool(database_url, 1, wait_seconds=AMPLE_SECONDS) as narrow:
        async with db.connection(narrow) as conn:
            conn.add_query_logger(lambda query: statements.append(query.query))
        await add(pool, 100, published=False)
        one = Backpressure(narrow, limit, clock=itertools.count(step=tick_seconds).__next__)
        for _ in range(100):
            await one.run_once()
        assert len(statements) == looks
        one.require_room()


async def test_a_backlog_over_its_limit_is_noticed_though_there_was_room_before(pool: db.Pool) -> None:
    await add(pool, 100, published=False)
    one = Backpressure(pool, 100, clock=lambda: 0.0)
    await one.run_once()
    one.require_room()
    await add(pool, 1, published=False)
    await one.run_once()
    with pytest.raises(OutboxFull):
        one.require_room()
