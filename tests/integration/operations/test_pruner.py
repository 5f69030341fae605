"""The pruner: rows past their retention are deleted in batches; rows that may still be needed stay."""

from functools import partial
from uuid import UUID

import pytest

from app.db import Pool
from app.idempotency.key import IdempotencyKey
from app.messaging.consumer import Consumer, Handled
from app.operations.maintenance.pruner import BATCH, END, START, TABLES, Pruner, PrunerConfig
from app.saga import queries
from app.saga import start as saga_start
from app.saga.queries import MAX_STEPS
from tests.harness.events import PLACED
from tests.harness.history import lived_through, rows
from tests.harness.observed import Observed
from tests.harness.orders import DEADLINE_SECONDS, TENANT, event_of, place, placed
from tests.harness.plans import buffers, full_scans, indexes, plans_of
from tests.harness.queues import CONSUMER
from tests.harness.sagas import Stage

DAY_SECONDS = 86_400.0
KEPT = {"orders": 3, "outbox": 3, "inbox": 3, "sagas": 3, "saga_steps": 6, "idempotency_keys": 0}
KEYS = """
    INSERT INTO idempotency_keys
    SELECT 'default', 'made-' || n, '', 1, 201, '/orders/1', '', clock_timestamp() - interval '2 days',
           clock_timestamp() - make_interval(secs => n)
    FROM generate_series(1, $1) AS n
"""

LOGGED = """
    INSERT INTO saga_steps (saga_id, step, action, attempt, outcome)
    SELECT id, 'charge_payment', 'undo', n, 'unknown' FROM sagas, generate_series(1, $1) AS n
"""


def make_pruner(pool: Pool, signals: Observed | None = None, retention_seconds: float | None = None) -> Pruner:
    week, quarter = 7 * DAY_SECONDS, 90 * DAY_SECONDS
    config = PrunerConfig(
        consumers=[CONSUMER],
        outbox_retention_seconds=week if retention_seconds is None else retention_seconds,
        inbox_retention_seconds=week if retention_seconds is None else retention_seconds,
        saga_retention_seconds=quarter if retention_seconds is None else retention_seconds,
    )
    return Pruner(pool, config, signals or Observed())


def consumer_of(pool: Pool, signals: Observed) -> Consumer:
    """Make the consumer of placed orders, as the service does."""
    start = partial(saga_start.handle_order_placed, deadline_seconds=DEADLINE_SECONDS)
    return Consumer(pool, CONSUMER, {PLACED: start}, 1, signals)


async def sweep(pool: Pool) -> dict[str, int]:
    """Sweep once; return how many rows were deleted, by table."""
    removed: dict[str, int] = {}
    async for batch in make_pruner(pool).sweep():
        removed[batch.table] = removed.get(batch.table, 0) + batch.removed
    return removed


async def shown(pool: Pool) -> dict[UUID, list[queries.StepLogRow]]:
    """Return what operators are shown of the log of each saga."""
    async with pool.acquire() as conn:
        return {row["id"]: await queries.read_log(conn, row["id"]) for row in await conn.fetch("SELECT id FROM sagas")}


async def keys(pool: Pool) -> list[str]:
    return [row["key"] for row in await pool.fetch("SELECT key FROM idempotency_keys ORDER BY key")]


@pytest.mark.parametrize(
    ("age", "left"),
    [
        ("6 days", KEPT),
        ("8 days", KEPT | {"outbox": 0, "inbox": 0}),
        ("91 days", KEPT | {"outbox": 0, "inbox": 0, "sagas": 0, "saga_steps": 0}),
    ],
)
async def test_rows_past_retention_are_deleted(pool: Pool, age: str, left: dict[str, int]) -> None:
    """Rows past their retention are deleted. Orders are kept forever."""
    await lived_through(pool, 3, age)
    await sweep(pool)
    assert await rows(pool) == left


async def test_an_old_message_that_took_effect_lately_stays(pool: Pool) -> None:
    """The retention of the inbox counts from when a message took effect: an old one may be resent just afterwards."""
    await lived_through(pool, 3, "8 days")
    await pool.execute("UPDATE inbox SET processed_at = clock_timestamp()")
    await sweep(pool)
    assert await rows(pool) == KEPT | {"outbox": 0}


@pytest.mark.parametrize("status", ["pending", "compensating"])
async def test_rows_of_unfinished_orders_stay(pool: Pool, status: str) -> None:
    """Of an unfinished order, only the inbox row is deleted."""
    await lived_through(pool, 3, "91 days", status)
    await sweep(pool)
    assert await rows(pool) == KEPT | {"inbox": 0}


@pytest.mark.parametrize(
    "unfinished",
    [
        "UPDATE outbox SET published_at = NULL",
        "UPDATE outbox SET published_at = NULL, parked_at = clock_timestamp()",
        "UPDATE outbox SET published_at = clock_timestamp() - interval '6 days'",
        "UPDATE inbox SET processed_at = NULL, attempts = 1",
        "UPDATE inbox SET processed_at = NULL, dead_at = clock_timestamp() - interval '80 days'",
        "UPDATE inbox SET processed_at = clock_timestamp() - interval '6 days'",
        "UPDATE sagas SET finished_at = NULL",
        "UPDATE sagas SET finished_at = clock_timestamp() - interval '89 days'",
    ],
)
async def test_rows_that_may_be_needed_stay_at_any_age(pool: Pool, unfinished: str) -> None:
    """A row that may still be needed stays, whatever its age."""
    await lived_through(pool, 3, "100 days")
    await pool.execute(unfinished)
    table = unfinished.split()[1]
    await sweep(pool)
    assert (await rows(pool))[table] == 3


async def test_any_number_of_remaining_rows_is_skipped(pool: Pool) -> None:
    """Any number of rows that stay do not stop a sweep."""
    await lived_through(pool, BATCH + 1, "101 days", "compensating")
    await pool.execute("UPDATE inbox SET processed_at = NULL")
    await lived_through(pool, 3, "100 days")
    assert await sweep(pool) == {"outbox": 3, "inbox": 3, "sagas": 3, "idempotency_keys": 0}


async def test_a_sweep_runs_in_batches(pool: Pool) -> None:
    """`run_once` prunes one batch, and returns 0 at the end of a sweep."""
    await lived_through(pool, BATCH + 1, "8 days")
    signals, left = Observed(), []
    pruner = make_pruner(pool, signals)
    while await pruner.run_once():
        left.append((await rows(pool))["outbox"])
    assert left[:2] == [1, 0]
    assert (await rows(pool))["inbox"] == 0
    assert signals.value("janitor_pruned_total", {"table": "outbox"}) == BATCH + 1
    await lived_through(pool, 1, "8 days")
    assert await pruner.run_once()  # the next sweep begins
    assert (await rows(pool))["outbox"] == 0


@pytest.mark.parametrize("forgotten", [("inbox",), ("inbox", "sagas")])
async def test_a_late_redelivery_starts_nothing(stage: Stage, forgotten: tuple[str, ...]) -> None:
    """A message that is delivered again after its inbox row was deleted starts no saga."""
    order, signals = await placed(stage.pool), Observed()
    consumer = consumer_of(stage.pool, signals)
    for times in (1, 2):
        assert await consumer.handle(event_of(order)) == Handled()
        await stage.drive()
        assert signals.value("consumer_processed_total") == times  # not: seen before
        assert await stage.outcome(order.id) == "confirmed"
        assert (await stage.ledger(order.id)).count("payment.charge done") == 1
        assert len(await stage.log(order.id)) == (0 if times == 2 and "sagas" in forgotten else 8)
        for table in forgotten:
            async with stage.pool.acquire() as conn:
                at_once = make_pruner(stage.pool, retention_seconds=0)
                assert (await dict(at_once.prunes)[table](conn, START, END))[0] == (
                    1 if times == 1 or table == "inbox" else 0
                )


async def test_rows_with_ids_in_the_future_are_deleted(pool: Pool) -> None:
    """A process whose clock is ahead makes such ids, here by ten years."""
    await lived_through(pool, 3, "-3650 days")
    before = await rows(pool)
    await sweep(pool)
    assert await rows(pool) == before
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp() - interval '8 days'")
    await pool.execute("UPDATE inbox SET processed_at = clock_timestamp() - interval '8 days'")
    await pool.execute("UPDATE sagas SET finished_at = clock_timestamp() - interval '91 days'")
    await sweep(pool)
    assert await rows(pool) == {**dict.fromkeys(before, 0), "orders": 3}


@pytest.mark.parametrize(("sagas", "lines"), [(1, MAX_STEPS * 5), (300, 10)])
async def test_a_batch_is_limited_by_saga_steps(pool: Pool, sagas: int, lines: int) -> None:
    """A batch of sagas is limited by the number of their steps."""
    await lived_through(pool, sagas, "91 days")
    await pool.execute(LOGGED, lines)
    before, left = await shown(pool), (await rows(pool))["saga_steps"]
    async for batch in make_pruner(pool).sweep():
        assert batch.error is None
        now = await shown(pool)
        assert now == {saga: log for saga, log in before.items() if saga in now}
        were, left = left, (await rows(pool))["saga_steps"]
        assert were - left <= MAX_STEPS
    assert await rows(pool) == KEPT | dict.fromkeys(("outbox", "inbox", "sagas", "saga_steps"), 0) | {"orders": sagas}


async def test_an_error_in_one_table_stops_no_other(pool: Pool) -> None:
    """An error in one table does not stop the others."""
    await lived_through(pool, 3, "91 days")
    await pool.execute("ALTER TABLE outbox RENAME TO elsewhere")
    signals = Observed()
    pruner = make_pruner(pool, signals)
    while await pruner.run_once():
        pass
    failures = [signals.value("janitor_failures_total", {"table": table}) for table in TABLES]
    assert dict(zip(TABLES, failures, strict=True)) == {**dict.fromkeys(TABLES, 0), "outbox": 1}
    await pool.execute("ALTER TABLE elsewhere RENAME TO outbox")
    left = dict.fromkeys(("inbox", "sagas", "saga_steps"), 0)
    assert await rows(pool) == KEPT | left
    while await pruner.run_once():
        pass
    assert await rows(pool) == KEPT | left | {"outbox": 0}


async def test_only_expired_keys_are_deleted(pool: Pool) -> None:
    """Expired keys are deleted; others stay."""
    for name in ("living", "expired"):
        await place(pool, IdempotencyKey(TENANT, name, b"", 1))
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp() WHERE key = 'expired'")
    await sweep(pool)
    assert await keys(pool) == ["living"]
    assert await pool.fetchval("SELECT count(*) FROM orders") == 2


async def test_a_sweep_deletes_many_batches_of_keys(pool: Pool) -> None:
    """One sweep deletes more expired keys than fit into a batch."""
    await pool.execute(KEYS, BATCH + 1)
    assert (await sweep(pool))["idempotency_keys"] == BATCH + 1


async def test_unexpired_keys_are_not_read(pool: Pool) -> None:
    """Pruning keys reads no unexpired row."""
    await pool.execute(KEYS, 20_000)
    await pool.execute("UPDATE idempotency_keys SET expires_at = clock_timestamp() + interval '1 day'")
    await pool.execute("VACUUM ANALYZE idempotency_keys")
    pruner = make_pruner(pool)
    plans = await plans_of(pool, lambda conn: dict(pruner.prunes)["idempotency_keys"](conn, START, END))
    assert len(plans) == 1
    assert buffers(plans) < 20


async def test_locked_rows_are_skipped(pool: Pool) -> None:
    """Rows that another transaction holds are skipped."""
    await lived_through(pool, 3, "100 days")
    await pool.execute(KEYS, 3)
    async with pool.acquire() as conn, conn.transaction():
        for table in ("outbox", "inbox", "sagas", "idempotency_keys"):
            await conn.execute(f"SELECT FROM {table} LIMIT 1 FOR UPDATE")
        await sweep(pool)
        left = await rows(pool)
    assert left == {"orders": 3, "outbox": 1, "inbox": 1, "sagas": 1, "saga_steps": 2, "idempotency_keys": 1}


async def test_an_empty_sweep_does_nothing(pool: Pool) -> None:
    """With nothing to prune, a sweep deletes nothing."""
    await lived_through(pool, 3, "1 day")
    assert set((await sweep(pool)).values()) == {0}


@pytest.mark.parametrize("table", ["outbox", "inbox", "sagas"])
async def test_old_rows_are_found_by_an_index(pool: Pool, table: str) -> None:
    """Pruning reads no table from end to end, with any statistics."""
    await lived_through(pool, 20_000, "1 day")
    await lived_through(pool, 2_000, "100 days")
    pruner = make_pruner(pool)
    for _ in range(2):
        plans = await plans_of(pool, lambda conn: dict(pruner.prunes)[table](conn, START, END))
        assert table not in full_scans(plans)
        assert f"{table}_pkey" in indexes(plans)
        await pool.execute("ANALYZE")
