"""The outbox table: events leave in order, one relay at a time, and only the relay that holds a row can change it."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from app import db
from app.messaging import outbox, outbox_admin
from app.messaging.outbox import PublishRecord
from tests.harness.events import event, put

LEASE_SECONDS = 3600.0  # longer than any test; a test that needs the end of a lease ends it


async def claim(pool: db.Pool, limit: int = 100, token: UUID | None = None) -> list[UUID]:
    async with db.connection(pool) as conn:
        return ids(await outbox.claim(conn, token or uuid4(), limit, LEASE_SECONDS))


def ids(claimed: Sequence[outbox.ClaimedRow]) -> list[UUID]:
    return [row.envelope.id for row in claimed]


async def end_leases(pool: db.Pool) -> None:
    async with db.connection(pool) as conn:
        await conn.execute("UPDATE outbox SET next_attempt_at = clock_timestamp() WHERE claim_token IS NOT NULL")


async def row(pool: db.Pool, row_id: UUID) -> dict[str, Any]:
    async with db.connection(pool) as conn:
        return dict(await conn.fetchrow("SELECT * FROM outbox WHERE id = $1", row_id) or {})


async def test_a_claim_returns_the_added_event(pool: db.Pool) -> None:
    """A claim returns the event exactly as it was added."""
    added = event(
        data={"total": "9.99", "customer_id": "Zoë ✓", "items": [{"quantity": 3}], "metadata": None},
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        tracestate="vendor=1",
    )
    await put(pool, added)
    async with db.connection(pool) as conn:
        assert await outbox.claim(conn, uuid4(), 1, LEASE_SECONDS) == [outbox.ClaimedRow(added, attempts=0)]


async def test_a_rolled_back_event_does_not_exist(pool: db.Pool) -> None:
    """An event exists only if the transaction that wrote it commits."""
    async with db.connection(pool) as conn:
        transaction = conn.transaction()
        await transaction.start()
        await outbox.add(conn, [event()])
        assert await claim(pool) == []
        await transaction.rollback()
    assert await claim(pool) == []


async def test_events_of_a_subject_leave_in_order(pool: db.Pool) -> None:
    """The events of one subject are claimed one after the other, by sequence."""
    third, first, second = (event("order", sequence) for sequence in (3, 1, 2))
    await put(pool, third, first, second)
    for expected in (first, second, third):
        token = uuid4()
        assert await claim(pool, token=token) == [expected.id]
        assert await claim(pool) == []
        async with db.connection(pool) as conn:
            assert await outbox.record_results(conn, token, [PublishRecord(expected.id)]) == {expected.id}
    assert await claim(pool) == []


async def test_a_refused_event_delays_its_subject_only(pool: db.Pool) -> None:
    """A refused event delays the later events of its subject, and no others."""
    refused, later, other = event("order", 1), event("order", 2), event("other", 2)
    await put(pool, refused, later)
    token = uuid4()
    await claim(pool, token=token)
    async with db.connection(pool) as conn:
        assert await outbox.record_results(conn, token, [PublishRecord(refused.id, "nacked", LEASE_SECONDS)]) == {
            refused.id
        }
    await put(pool, other)
    assert await claim(pool) == [other.id]


async def test_a_parked_event_blocks_its_subject(pool: db.Pool) -> None:
    """Later events of a subject are not claimed while an earlier one is parked."""
    parked, later = event("order", 1), event("order", 2)
    await put(pool, parked, later)
    token = uuid4()
    await claim(pool, token=token)
    async with db.connection(pool) as conn:
        assert await outbox.record_results(conn, token, [PublishRecord(parked.id, "returned")]) == {parked.id}
    assert await claim(pool) == []
    assert (await row(pool, parked.id))["parked_at"]


async def test_the_oldest_events_are_claimed_first(pool: db.Pool) -> None:
    """A claim takes the events that waited longest, and no more than its limit."""
    events = [event() for _ in range(9)]
    for envelope in events:
        await put(pool, envelope)
    for batch in (events[:3], events[3:6], events[6:]):
        assert sorted(await claim(pool, limit=3)) == sorted(envelope.id for envelope in batch)


async def test_concurrent_claims_do_not_overlap(pool: db.Pool) -> None:
    """Two relays that claim at once get different rows, and neither waits for the other."""
    await put(pool, *(event() for _ in range(20)))
    async with db.transaction(pool) as first_conn, db.transaction(pool) as other:
        first = ids(await outbox.claim(first_conn, uuid4(), 12, LEASE_SECONDS))
        second = ids(await outbox.claim(other, uuid4(), 20, LEASE_SECONDS))
    assert (len(first), len(second)) == (12, 8)
    assert set(first).isdisjoint(second)


async def test_many_relays_claim_every_row_once(pool: db.Pool) -> None:
    """Many concurrent relays claim every row exactly once."""
    events = [event() for _ in range(100)]
    await put(pool, *events)
    batches = await asyncio.gather(*(claim(pool, limit=20) for _ in range(10)))
    taken = [row_id for batch in batches for row_id in batch]
    while rest := await claim(pool):  # a claim skips rows that another claim has just locked
        taken += rest
    assert sorted(taken) == sorted(envelope.id for envelope in events)


async def test_a_claimed_row_is_free_after_its_lease(pool: db.Pool) -> None:
    """No other relay can claim a row until its lease ends."""
    only = event()
    await put(pool, only)
    assert await claim(pool) == [only.id]
    assert await claim(pool) == []
    await end_leases(pool)
    assert await claim(pool) == [only.id]


async def test_a_claim_keeps_its_limit_with_any_statistics(pool: db.Pool) -> None:
    """With statistics of an empty table, a nested loop could run the limited subquery once per row."""
    await pool.execute("ANALYZE outbox")
    await put(pool, *(event() for _ in range(20)))
    assert len(await claim(pool, limit=3)) == 3


async def test_a_relay_without_the_lease_changes_nothing(pool: db.Pool) -> None:
    """A relay that lost its lease can neither publish, refuse nor release the row."""
    only, stale, present = event(), uuid4(), uuid4()
    await put(pool, only)
    await claim(pool, token=stale)
    await end_leases(pool)
    await claim(pool, token=present)
    before = await row(pool, only.id)
    async with db.connection(pool) as conn:
        assert await outbox.record_results(conn, stale, [PublishRecord(only.id)]) == set()
        assert await outbox.record_results(conn, stale, [PublishRecord(only.id, "too late")]) == set()
        assert await outbox.release(conn, stale, [only.id]) == 0
        assert await row(pool, only.id) == before
        assert await outbox.record_results(conn, present, [PublishRecord(only.id)]) == {only.id}


async def test_a_published_row_never_changes(pool: db.Pool) -> None:
    """A published row can be neither claimed nor changed again."""
    only, token = event(), uuid4()
    await put(pool, only)
    await claim(pool, token=token)
    async with db.connection(pool) as conn:
        assert await outbox.record_results(conn, token, [PublishRecord(only.id)]) == {only.id}
        assert await outbox.record_results(conn, token, [PublishRecord(only.id)]) == set()
        assert await outbox.record_results(conn, token, [PublishRecord(only.id, "nacked")]) == set()
        assert await outbox.release(conn, token, [only.id]) == 0
    assert await claim(pool) == []


async def test_a_released_row_can_be_claimed_at_once(pool: db.Pool) -> None:
    """Releasing a row leaves it unchanged, and any relay can claim it at once."""
    mine, others, token = event(), event(), uuid4()
    await put(pool, mine)
    await claim(pool, token=token)
    await put(pool, others)
    await claim(pool)
    async with db.connection(pool) as conn:
        assert await outbox.release(conn, token, [mine.id, others.id]) == 1
    assert await claim(pool) == [mine.id]
    assert (await row(pool, mine.id))["attempts"] == 0


async def test_a_refusal_is_counted_with_its_reason(pool: db.Pool) -> None:
    """A refusal is counted with its reason; publishing clears the reason."""
    only, token = event(), uuid4()
    await put(pool, only)
    await claim(pool, token=token)
    async with db.connection(pool) as conn:
        await outbox.record_results(conn, token, [PublishRecord(only.id, "r" * 10_000, 0)])
        assert (await row(pool, only.id))["last_error"] == "r" * 500
        assert await outbox.claim(conn, token, 1, LEASE_SECONDS) == [outbox.ClaimedRow(only, attempts=1)]
        await outbox.record_results(conn, token, [PublishRecord(only.id)])
    assert (await row(pool, only.id))["last_error"] is None


async def test_a_refused_row_waits_for_its_pause(pool: db.Pool) -> None:
    """A refused row is not due before its pause ends."""
    only, token = event(), uuid4()
    await put(pool, only)
    await claim(pool, token=token)
    async with db.connection(pool) as conn:
        await outbox.record_results(conn, token, [PublishRecord(only.id, "nacked", 600)])
        waits = await conn.fetchval("SELECT next_attempt_at - clock_timestamp() FROM outbox")
    assert timedelta(seconds=500) < waits <= timedelta(seconds=600)


@pytest.mark.parametrize("kind", ["pending", "claimed", "refused"])
async def test_unpublished_and_unparked_rows_are_pending(pool: db.Pool, kind: str) -> None:
    """Every row that is neither published nor parked counts as pending."""
    only, token = event(), uuid4()
    await put(pool, only)
    if kind != "pending":
        await claim(pool, token=token)
    async with db.connection(pool) as conn:
        if kind == "refused":
            await outbox.record_results(conn, token, [PublishRecord(only.id, "nacked", 60)])
        await conn.execute("UPDATE outbox SET pending_since = clock_timestamp() - interval '1 hour'")
        pending, age, parked = await outbox_admin.stats(conn)
    assert (pending, parked) == (1, 0)
    assert 3600 <= age < 7200


async def test_parked_and_published_rows_have_no_age(pool: db.Pool) -> None:
    """Parked and published rows are counted separately, and do not count for the age."""
    parked, published, token = event(), event(), uuid4()
    await put(pool, parked, published)
    await claim(pool, token=token)
    async with db.connection(pool) as conn:
        await outbox.record_results(conn, token, [PublishRecord(parked.id, "returned")])
        await outbox.record_results(conn, token, [PublishRecord(published.id)])
        assert await outbox_admin.stats(conn) == (0, 0.0, 1)


async def test_an_empty_outbox_has_age_zero(pool: db.Pool) -> None:
    """Without pending rows, the age is zero."""
    async with db.connection(pool) as conn:
        assert await outbox_admin.stats(conn) == (0, 0.0, 0)
