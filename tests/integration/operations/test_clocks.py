"""Ages, pauses and retention use Postgres's clock: a process with a wrong clock acts neither too early nor too late."""

import json
from datetime import timedelta

import pytest

from app import db
from app.db import Pool
from app.messaging import outbox_admin
from app.operations.maintenance.resender import Resender
from tests.harness.clocks import orders_at
from tests.harness.events import counted
from tests.harness.history import lived_through
from tests.harness.observed import Observed
from tests.harness.orders import placed
from tests.harness.queues import CONSUMER

HOUR = timedelta(hours=1)
OFFSETS = pytest.mark.parametrize("offset", ["-1h", "+1h"])
SHIFTS = pytest.mark.parametrize("shift", [-HOUR, HOUR], ids=["behind", "ahead"])


async def placed_by_a_process_that_is_wrong(pool: Pool, shift: timedelta) -> str:
    """Place an order as a process does whose clock is off by `shift`."""
    order = await placed(pool)
    await pool.execute("UPDATE orders SET placed_at = placed_at + $1, updated_at = updated_at + $1", shift)
    await pool.execute("UPDATE outbox SET occurred_at = occurred_at + $1", shift)
    return str(order.id)


async def send_again(pool: Pool) -> tuple[float | None, float | None]:
    """Run the resender; return how many events are pending, and how many orders it counted."""
    signals = Observed()

    async def depths() -> tuple[int, int]:
        return 0, 0

    await Resender(pool, CONSUMER, depths, signals).run_once()
    return counted(signals, "outbox_resent_total"), counted(signals, "orders_unstarted")


@SHIFTS
async def test_the_age_of_pending_rows(pool: Pool, shift: timedelta) -> None:
    """The age of pending rows is by Postgres's clock."""
    await placed_by_a_process_that_is_wrong(pool, shift)
    async with db.connection(pool) as conn:
        _, age, _ = await outbox_admin.stats(conn)
        assert age < HOUR.total_seconds() / 2
        await conn.execute("UPDATE outbox SET pending_since = pending_since - $1::interval", HOUR)
        _, age, _ = await outbox_admin.stats(conn)
        assert age >= HOUR.total_seconds()


@SHIFTS
async def test_when_an_event_is_resent(pool: Pool, shift: timedelta) -> None:
    """Resends are due by Postgres's clock."""
    await placed_by_a_process_that_is_wrong(pool, shift)
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp()")
    assert await send_again(pool) == (0, 0)
    await pool.execute("UPDATE outbox SET published_at = published_at - $1::interval", HOUR)
    await pool.execute("UPDATE outbox SET pending_since = pending_since - $1::interval", HOUR)
    assert await send_again(pool) == (1, 1)
    assert await send_again(pool) == (0, 1)


@OFFSETS
async def test_which_rows_are_pruned(pool: Pool, database_url: str, offset: str) -> None:
    """Retention is by Postgres's clock."""
    await lived_through(pool, 3, "7 days 30 minutes")
    await lived_through(pool, 2, "6 days 23 hours 30 minutes")
    code, out, err = await orders_at(offset, "prune", "--json", database_url=database_url)
    assert (code, json.loads(out), err) == (0, {"outbox": 3, "inbox": 3, "sagas": 0, "idempotency_keys": 0}, "")


@OFFSETS
async def test_which_dead_letters_are_recent(pool: Pool, database_url: str, offset: str) -> None:
    """The age of a dead letter is by Postgres's clock."""
    recent, older = [(await placed(pool)).id for _ in range(2)]
    query = "UPDATE outbox SET parked_at = clock_timestamp() - $2::interval, last_error = 'bug' WHERE id = $1"
    await pool.execute(query, recent, timedelta(minutes=5))
    await pool.execute(query, older, timedelta(minutes=30))
    code, out, _ = await orders_at(offset, "dlq", "peek", "--since", "15m", "--json", database_url=database_url)
    assert (code, [letter["id"] for letter in json.loads(out)["dead_letters"]]) == (0, [str(recent)])
