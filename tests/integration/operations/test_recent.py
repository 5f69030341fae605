"""The history of the last minutes: what each slot counts, from the outbox, and what reading it costs."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from app import db
from app.db import Pool
from app.operations.recent import SLOTS, RecentHistory, Slot
from app.orders.events import PLACED, TYPES
from app.orders.model import Status
from tests.harness.history import lived_through
from tests.harness.orders import start_saga
from tests.harness.plans import full_scans, indexes, plans_of

NOW = datetime(2026, 11, 21, 12, 0, 1, tzinfo=UTC)  # a slot has been over for a second
CONFIRMED = TYPES[Status.CONFIRMED]
EVENT = """
    INSERT INTO outbox (id, type, subject, sequence, tenant, data, occurred_at, published_at)
    VALUES ($1, $2, $3, 1, 'default', '{}', $4, $4)
"""


async def add(pool: Pool, seconds_ago: float, event_type: str = PLACED, order_id: UUID | None = None) -> None:
    """Add an event of that time before NOW."""
    at = NOW - timedelta(seconds=seconds_ago)
    number = await pool.fetchval("SELECT count(*) FROM outbox")
    event_id = UUID(int=db.first_id(at).int + number)
    await pool.execute(EVENT, event_id, event_type, str(order_id or event_id), at)


async def finish(pool: Pool, seconds_ago: float, after_seconds: float) -> None:
    """Finish the saga of an order, so many seconds after its start."""
    order_id, at = await start_saga(pool), NOW - timedelta(seconds=seconds_ago)
    await pool.execute(
        "UPDATE sagas SET finished_at = $2, started_at = $3 WHERE id = $1",
        order_id,
        at,
        at - timedelta(seconds=after_seconds),
    )
    await add(pool, seconds_ago, CONFIRMED, order_id)


async def look(pool: Pool, history: RecentHistory, seconds_later: float = 0, backlog: int = 0) -> list[Slot | None]:
    async with pool.acquire() as conn:
        await history.update(conn, NOW + timedelta(seconds=seconds_later), backlog)
    return history.slots()


async def test_slots_count_what_happened(pool: Pool) -> None:
    """Also before anybody looked on, and for as long as the history goes back."""
    await add(pool, 2)
    await add(pool, 3)
    await add(pool, 8)
    await finish(pool, 3, 0.25)
    await add(pool, 5 * SLOTS)
    await add(pool, 5 * SLOTS + 5)  # too long ago
    await add(pool, 0.5)  # not over yet
    slots = await look(pool, RecentHistory(list))
    assert len(slots) == SLOTS
    assert slots[-2:] == [Slot(placed=1), Slot(placed=2, finished=1, saga_seconds=[0.25], backlog=0)]
    assert slots[0] == Slot(placed=1)
    assert sum(slot.placed for slot in slots if slot) == 4


async def test_each_slot_is_read_twice(pool: Pool) -> None:
    """When it is over, and with the next one: an event may have been committed late. Then it stays until it is old."""
    history = RecentHistory(list)
    await add(pool, 3)
    await look(pool, history)
    await add(pool, 2)
    await add(pool, 0)
    assert (await look(pool, history, 1))[-1] == Slot(placed=1, backlog=0)  # the next slot is not over
    slots = await look(pool, history, 5, backlog=7)
    assert slots[-2:] == [Slot(placed=2, backlog=0), Slot(placed=1, answers=[], backlog=7)]
    await pool.execute("DELETE FROM outbox")
    slots = await look(pool, history, 10)
    assert slots[-3:] == [Slot(placed=2, backlog=0), Slot(answers=[], backlog=7), Slot(answers=[], backlog=0)]
    assert await look(pool, history, 5 * SLOTS + 10) == [*[Slot()] * (SLOTS - 1), Slot(backlog=0)]


async def test_too_much_to_count_is_unknown(pool: Pool) -> None:
    """The newest events are counted; a slot that may be incomplete is not shown."""
    for seconds_ago in (2, 3, 7, 8, 12):
        await add(pool, seconds_ago)
    slots = await look(pool, RecentHistory(list, max_events=3))
    assert slots == [*[None] * (SLOTS - 1), Slot(placed=2, backlog=0)]


async def test_answers_are_those_of_one_slot(pool: Pool) -> None:
    """The difference of two readings. After a time without a viewer, it would be that of many slots: unknown."""
    now = [(0.1, 5.0), (float("inf"), 6.0)]
    history = RecentHistory(lambda: now)
    assert [slot and slot.answers for slot in await look(pool, history)] == [None] * SLOTS
    now = [(0.1, 7.0), (float("inf"), 9.0)]
    slots = await look(pool, history, 5)
    assert [slot.answers for slot in slots if slot][-2:] == [None, [(0.1, 2.0), (float("inf"), 3.0)]]
    slots = await look(pool, history, 20)
    assert [slot.answers for slot in slots if slot][-3:] == [None] * 3


async def test_the_cost_does_not_grow_with_history(pool: Pool) -> None:
    """A reading scans a range of the primary key, and looks sagas up by theirs."""
    await lived_through(pool, 20_000, "2 days")
    await pool.execute("ANALYZE")
    now = datetime.now(UTC)

    async def read(conn: db.Connection) -> None:
        await RecentHistory(list).update(conn, now, 0)

    plans = await plans_of(pool, read)
    assert len(plans) == 2
    assert full_scans(plans) == set()
    assert indexes(plans) == {"outbox_pkey", "sagas_pkey"}
