"""The resender: a placed order whose event was lost is started once; other orders are not touched."""

from uuid import UUID

import pytest

from app import db
from app.errors import BrokerUnavailable
from app.messaging import inbox, outbox
from app.messaging.outbox import PublishRecord
from app.operations.maintenance.resender import BATCH, FEW_WAITING, Resender
from app.orders import store as order_store
from app.saga import cancel, maintenance, start
from tests.harness.events import counted
from tests.harness.history import lived_through
from tests.harness.messages import next_message, open_channel, publishing
from tests.harness.observed import Observed
from tests.harness.orders import DEADLINE_SECONDS, TENANT, event_of, placed
from tests.harness.plans import full_scans, indexes, plans_of
from tests.harness.queues import CONSUMER, QUEUE
from tests.harness.relays import make_relay

MINUTE = 60


def resender(pool: db.Pool, signals: Observed | None = None, waiting: int = 0) -> Resender:
    async def depths() -> tuple[int, int]:
        return waiting, 0

    return Resender(pool, CONSUMER, depths, signals or Observed())


async def placed_and_published(pool: db.Pool, seconds_ago: float, resends: int = 0) -> UUID:
    """Place an order whose event was published `seconds_ago`, and whose saga has not started."""
    order = await placed(pool)
    await pool.execute("UPDATE orders SET placed_at = placed_at - interval '1 day' WHERE id = $1", order.id)
    await pool.execute(
        """
        UPDATE outbox SET published_at = clock_timestamp() - make_interval(secs => $2), resends = $3, attempts = 2,
            pending_since = clock_timestamp() - interval '1 day'
        WHERE subject = $1
        """,
        str(order.id),
        seconds_ago,
        resends,
    )
    return order.id


async def pending(pool: db.Pool) -> list[UUID]:
    return [row["id"] for row in await pool.fetch("SELECT id FROM outbox WHERE published_at IS NULL")]


async def look(pool: db.Pool) -> list[UUID]:
    """Check all pending orders; return the pending events."""
    resends = resender(pool)
    while await resends.run_once():
        pass
    return await pending(pool)


@pytest.mark.parametrize(
    ("resends", "seconds_ago", "again"),
    [(0, 40, False), (0, 61, True), (1, 100, False), (1, 121, True), (5, 31 * MINUTE, False), (5, 33 * MINUTE, True)],
)
async def test_the_pause_between_resends_doubles(pool: db.Pool, resends: int, seconds_ago: float, again: bool) -> None:
    """The event of an unstarted order is resent after one minute, then two, then four."""
    order_id = await placed_and_published(pool, seconds_ago, resends)
    assert await look(pool) == ([order_id] if again else [])
    row = dict(await pool.fetchrow("SELECT * FROM outbox") or {})
    assert (row["resends"], row["attempts"]) == ((resends + 1, 0) if again else (resends, 2))


async def test_a_pending_resend_is_not_repeated(pool: db.Pool) -> None:
    """A resent event is not resent again before it is published."""
    signals = Observed()
    order_id = await placed_and_published(pool, 3600)
    resends = resender(pool, signals)
    for _ in range(3):
        await resends.run_once()
        assert await pending(pool) == [order_id]
    assert await pool.fetchval("SELECT resends FROM outbox") == 1
    assert counted(signals, "outbox_resent_total") == 1


async def test_started_and_final_orders_are_not_resent(pool: db.Pool) -> None:
    """The event of a started or final order is not resent."""
    started, cancelled = [await placed_and_published(pool, 3600) for _ in range(2)]
    async with pool.acquire() as conn, conn.transaction():
        order = await order_store.load(conn, started)
        assert order
        await start.handle_order_placed(conn, [event_of(order)], DEADLINE_SECONDS)
        await cancel.cancel(conn, TENANT, cancelled, {})
    await pool.execute("UPDATE outbox SET published_at = clock_timestamp() - interval '1 hour'")
    assert await look(pool) == []


@pytest.mark.parametrize("parked", [False, True])
async def test_unpublished_events_are_left_to_the_relay(pool: db.Pool, *, parked: bool) -> None:
    """The resender does not touch unpublished events."""
    order_id = await placed_and_published(pool, 3600)
    await pool.execute("UPDATE outbox SET published_at = NULL")
    if parked:
        await pool.execute("UPDATE outbox SET parked_at = clock_timestamp()")
    before = await pool.fetchrow("SELECT * FROM outbox")
    assert await look(pool) == [order_id]
    assert await pool.fetchrow("SELECT * FROM outbox") == before


async def test_dead_letters_are_not_resent(pool: db.Pool) -> None:
    """A dead letter is not lost: it waits for an operator."""
    dead, lost = [await placed_and_published(pool, 3600) for _ in range(2)]
    async with db.connection(pool) as conn:
        await inbox.count_failure(conn, CONSUMER, str(dead), "bug")
        await inbox.mark_dead(conn, CONSUMER, str(dead))
    assert await look(pool) == [lost]


async def test_nothing_is_resent_while_the_consumer_is_behind(
    pool: db.Pool,
) -> None:
    """Unstarted orders are still counted."""
    signals, order_id = Observed(), await placed_and_published(pool, 3600)
    resends = resender(pool, signals, waiting=FEW_WAITING + 1)
    assert await resends.run_once() == 0
    assert await pending(pool) == []
    assert signals.value("orders_unstarted") == 1
    await resender(pool, signals, waiting=FEW_WAITING).run_once()
    assert await pending(pool) == [order_id]


async def test_an_outage_counts_no_order_twice(pool: db.Pool) -> None:
    """An outage of the broker does not count an unstarted order twice."""

    async def depths() -> tuple[int, int]:
        if outages.pop(0):
            raise BrokerUnavailable("rabbitmq: refused")
        return 0, 0

    outages, signals = [True, True, False], Observed()
    await placed_and_published(pool, 3600)
    resends = Resender(pool, CONSUMER, depths, signals)
    while outages:
        await resends.run_once()
        assert counted(signals, "orders_unstarted") == 1
    assert counted(signals, "outbox_resent_total") == 1


async def test_unchanged_orders_hide_no_others(pool: db.Pool) -> None:
    """Any number of orders that are not resent hide no others."""
    await lived_through(pool, BATCH + 1, "2 days", "pending")
    await pool.execute("UPDATE inbox SET processed_at = NULL, dead_at = clock_timestamp()")
    await pool.execute("TRUNCATE sagas CASCADE")
    lost = await placed_and_published(pool, 3600)
    assert await look(pool) == [lost]


async def test_unstarted_orders_are_found_by_an_index(
    pool: db.Pool,
) -> None:
    """The query reads no table from end to end, with any statistics."""
    await lived_through(pool, 20_000, "1 day")
    for _ in range(100):
        await placed_and_published(pool, 3600)
    for _ in range(2):
        plans = await plans_of(pool, lambda conn: maintenance.scan_unstarted(conn, maintenance.FIRST, BATCH, 60))
        assert full_scans(plans) == set()
        assert indexes(plans) == {"orders_status_tenant_placed_at_id_idx", "sagas_pkey", "outbox_pkey"}
        await pool.execute("ANALYZE")


async def test_a_lost_event_reaches_the_queue_with_its_id(pool: db.Pool, rabbitmq_url: str) -> None:
    """An event that the broker confirmed and lost is delivered again with the same id."""
    order = await placed(pool)
    async with open_channel(rabbitmq_url) as channel, publishing(rabbitmq_url) as transport:
        relay = make_relay(pool, transport, batch_size=10)
        assert await relay.run_once() == 1
        await (await channel.get_queue(QUEUE)).purge()
        await pool.execute("UPDATE orders SET placed_at = placed_at - interval '1 hour'")
        await pool.execute(
            "UPDATE outbox SET published_at = now() - interval '1 hour', pending_since = now() - interval '1 hour'"
        )
        assert await look(pool) == [order.id]
        assert await relay.run_once() == 1
        assert (await next_message(channel, QUEUE)).message_id == str(order.id)


async def test_claimed_and_changed_rows_are_not_touched(pool: db.Pool) -> None:
    """Rows that a relay holds, or has changed meanwhile, are not touched."""
    order_id = await placed_and_published(pool, 3600)
    async with db.connection(pool) as conn:
        assert await outbox.republish(conn, [order_id], MINUTE) == [order_id]
        [claimed] = await outbox.claim(conn, order_id, 10, 30)
        assert await outbox.republish(conn, [order_id], 0) == []
        assert await outbox.record_results(conn, order_id, [PublishRecord(claimed.envelope.id)]) == {order_id}
        assert await outbox.republish(conn, [order_id], MINUTE) == []
