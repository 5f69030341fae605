"""The consumer: each message takes effect once, even if it is delivered twice, concurrently, or after failures."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from app import db
from app.errors import DatabaseUnavailable, Overloaded
from app.messaging import inbox
from app.messaging.consumer import Consumer, Dead, Handled, Retry
from app.messaging.envelope import Envelope, UnreadableMessage
from app.messaging.facts import MessageHandled
from app.observability.signals import Signals
from tests.harness.events import CONFIRMED, PLACED, Effects, counted, event
from tests.harness.observed import Observed

FAILURE = ValueError("no such thing")


async def row(pool: db.Pool, message: Envelope) -> dict[str, Any]:
    """Return the message's inbox row, empty if there is none."""
    async with db.connection(pool) as conn:
        found = await conn.fetchrow("SELECT * FROM inbox WHERE message_id = $1", str(message.id))
        return dict(found or {})


async def first_time(pool: db.Pool, message: Envelope, *, fail: bool = False) -> bool:
    async with db.transaction(pool) as conn:
        first = await inbox.first_time(conn, "effects", [str(message.id)])
        if fail:
            raise FAILURE
        return bool(first)


async def test_a_second_delivery_has_no_effect(pool: db.Pool, effects: Effects) -> None:
    """A message takes effect at its first delivery only."""
    signals, message = Observed(), event()
    consumer = effects.consumer(signals)
    assert [await consumer.handle(message) for _ in range(3)] == [Handled()] * 3
    assert await effects.committed() == [message.id]
    assert effects.calls == 1
    assert counted(signals, "consumer_processed_total") == 1
    assert counted(signals, "consumer_dedup_hits_total") == 2
    assert (await row(pool, message))["processed_at"]


async def test_concurrent_deliveries_take_effect_once(effects: Effects) -> None:
    """Concurrent deliveries of one message take effect once."""
    message = event()
    consumers = [effects.consumer() for _ in range(8)]
    results = await asyncio.gather(*(consumer.handle(message) for consumer in consumers))
    assert results == [Handled()] * 8
    assert await effects.committed() == [message.id]


async def test_a_second_transaction_waits_for_the_first(pool: db.Pool) -> None:
    """Of two concurrent transactions, the second waits, and takes over if the first fails."""
    message = event()
    async with db.connection(pool) as conn:
        transaction = conn.transaction()
        await transaction.start()
        assert await inbox.first_time(conn, "effects", [str(message.id)])
        second = asyncio.create_task(first_time(pool, message))
        third = asyncio.create_task(first_time(pool, message))
        await transaction.rollback()
    assert sorted([await second, await third]) == [False, True]


async def test_each_consumer_has_its_own_inbox(pool: db.Pool) -> None:
    """A message takes effect once per consumer."""
    async with db.transaction(pool) as conn:
        assert await inbox.first_time(conn, "one", ["message"])
        assert await inbox.first_time(conn, "another", ["message"])


async def test_a_rollback_leaves_no_inbox_row(pool: db.Pool) -> None:
    """A rolled-back transaction leaves no inbox row."""
    message = event()
    with pytest.raises(ValueError, match="no such thing"):
        await first_time(pool, message, fail=True)
    assert await row(pool, message) == {}


async def test_a_failure_leaves_only_its_count(pool: db.Pool, effects: Effects) -> None:
    """A failing handler leaves its failure count and nothing else."""
    signals, message = Observed(), event()
    effects.failure = FAILURE
    result = await effects.consumer(signals).handle(message)
    assert isinstance(result, Retry)
    assert result.in_seconds > 0
    assert result.reason == "ValueError: no such thing"
    assert await effects.committed() == []
    failed = await row(pool, message)
    assert (failed["attempts"], failed["last_error"], failed["processed_at"]) == (1, result.reason, None)
    assert counted(signals, "consumer_failed_total") == 1
    assert counted(signals, "consumer_processed_total") == 0


async def test_a_message_takes_effect_once_after_failures(effects: Effects) -> None:
    """A message whose handler recovers takes effect once."""
    message, consumer = event(), effects.consumer()
    effects.failure = FAILURE
    await consumer.handle(message)
    effects.failure = None
    assert [await consumer.handle(message) for _ in range(2)] == [Handled()] * 2
    assert await effects.committed() == [message.id]


async def test_attempts_are_counted_across_processes(pool: db.Pool, effects: Effects) -> None:
    """Attempts are counted across processes until the message is dead."""
    signals, message = Observed(), event()
    effects.failure = FAILURE
    for _ in range(2):
        assert isinstance(await effects.consumer(signals).handle(message), Retry)
    async with db.connection(pool) as conn:
        await conn.execute("UPDATE inbox SET first_failure_at = first_failure_at - interval '1 hour'")
    dead = await effects.consumer(signals).handle(message)
    kept = await row(pool, message)
    assert dead == Dead("ValueError: no such thing", 3, kept["first_failure_at"], kept["last_failure_at"])
    assert isinstance(dead, Dead)
    assert dead.last_failure_at - dead.first_failure_at >= timedelta(hours=1)
    assert kept["dead_at"]
    assert counted(signals, "consumer_failed_total") == 3


async def test_a_replayed_message_takes_effect_once(effects: Effects) -> None:
    """A dead message takes effect once if it is replayed after its cause was fixed."""
    message, consumer = event(), effects.consumer(max_attempts=1)
    effects.failure = FAILURE
    assert isinstance(await consumer.handle(message), Dead)
    effects.failure = None
    assert [await consumer.handle(message) for _ in range(2)] == [Handled()] * 2
    assert await effects.committed() == [message.id]


async def test_a_processed_message_cannot_become_dead(effects: Effects) -> None:
    """A message that took effect cannot become dead in a release whose handler fails."""
    message, consumer = event(), effects.consumer(max_attempts=1)
    await consumer.handle(message)
    effects.failure = FAILURE
    assert await consumer.handle(message) == Handled()


@pytest.mark.parametrize("text", ["\x00", "\ud800", "long " * 1_000], ids=["NUL", "surrogate", "long"])
async def test_a_failure_with_any_text_is_counted(pool: db.Pool, effects: Effects, text: str) -> None:
    """A failure is counted whatever characters its text has."""
    message, consumer = event(), effects.consumer(max_attempts=2)
    effects.failure = ValueError(f"cannot read {text}")
    results = [await consumer.handle(message) for _ in range(2)]
    assert [type(result) for result in results] == [Retry, Dead]
    for result in results:
        assert isinstance(result, Retry | Dead)
        assert result.reason.startswith("ValueError: cannot read")
        assert len(result.reason) <= 500
        assert result.reason.isprintable()
    assert (await row(pool, message))["attempts"] == 2


async def test_a_message_of_an_unknown_type_is_dead_at_once(pool: db.Pool, effects: Effects) -> None:
    """A message of a type without a handler is dead at once, and has an inbox row."""
    message = event(event_type=CONFIRMED)
    result = await effects.consumer().handle(message)
    assert isinstance(result, Dead)
    assert (result.reason, result.attempts) == (f"unknown type {CONFIRMED}", 1)
    assert result.first_failure_at == result.last_failure_at
    assert (await row(pool, message))["dead_at"]


async def test_a_message_unreadable_to_its_handler_is_dead(effects: Effects) -> None:
    """A message that its handler cannot read is dead at once."""
    effects.failure = UnreadableMessage("no total")
    result = await effects.consumer().handle(event())
    assert isinstance(result, Dead)
    assert (result.reason, result.attempts) == ("unreadable: no total", 1)
    assert await effects.committed() == []


async def test_an_outage_of_postgres_counts_no_failure(pool: db.Pool, effects: Effects) -> None:
    """While Postgres is down, `handle` raises, and no failure is counted."""

    async def cut_off(conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        await effects(conn, envelopes)
        await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    signals, message = Observed(), event()
    consumer = Consumer(pool, "effects", {PLACED: cut_off}, 1, signals)
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable):
            await consumer.handle(message)
    assert await row(pool, message) == {}
    assert counted(signals, "consumer_failed_total") == counted(signals, "dlq_messages_total") == 0
    assert await effects.consumer().handle(message) == Handled()
    assert await effects.committed() == [message.id]


async def test_too_slow_a_postgres_is_not_a_failure_of_the_message(pool: db.Pool, effects: Effects) -> None:
    """A message that waits behind a batch for too long is kept, and its attempts are not counted."""

    async def wait_too_long(*_: Any) -> None:
        raise Overloaded("the writes before this one take too long")

    message = event()
    with pytest.raises(Overloaded):
        await Consumer(pool, "effects", {PLACED: wait_too_long}, 1, Signals()).handle(message)
    assert await row(pool, message) == {}
    assert await effects.consumer().handle(message) == Handled()


@pytest.mark.parametrize("deliveries", [1, 3])
async def test_the_first_delivery_emits_after_its_commit(pool: db.Pool, deliveries: int) -> None:
    """The fact is emitted after the commit, and for the first delivery only."""
    story: list[str] = []

    async def handle(_: db.Connection, __: Sequence[Envelope]) -> None:
        story.append("effect")

    signals = Signals(story.append)
    signals.wake(lambda: story.append("woken"), MessageHandled)
    consumer = Consumer(pool, "effects", {PLACED: handle}, 1, signals)
    message = event()
    for _ in range(deliveries):
        await consumer.handle(message)
    repeated = ["consumer.committed"] * (deliveries - 1)
    assert story == ["effect", "consumer.committed", "woken", *repeated]


async def test_a_handler_can_continue_the_trace_of_its_message(pool: db.Pool) -> None:
    """The message has the trace that its effect belongs to."""
    seen: list[str | None] = []

    async def handle(_: db.Connection, envelopes: Sequence[Envelope]) -> None:
        seen.extend(envelope.traceparent for envelope in envelopes)

    consumer = Consumer(pool, "effects", {PLACED: handle}, 1, Signals())
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await consumer.handle(event(traceparent=trace))
    await consumer.handle(event())
    assert seen == [trace, None]


async def test_messages_that_arrive_together_share_a_transaction(pool: db.Pool, effects: Effects) -> None:
    """Each takes effect once, one that was delivered twice too."""
    messages, consumer = [event() for _ in range(12)], effects.consumer()
    results = await asyncio.gather(*(consumer.handle(message) for message in [*messages, *messages[5:7]]))
    assert results == [Handled()] * 14
    assert sorted(await effects.committed()) == sorted(message.id for message in messages)
    async with db.connection(pool) as conn:
        assert await conn.fetchval("SELECT count(DISTINCT xmin::text) FROM inbox") < 6


async def test_a_message_that_fails_does_not_fail_its_neighbours(pool: db.Pool, effects: Effects) -> None:
    """They take effect; only its own failure is counted."""
    bad, good = event(), [event() for _ in range(8)]

    async def handle(conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        await effects(conn, envelopes)
        if bad.id in {envelope.id for envelope in envelopes}:
            raise FAILURE

    consumer = effects.consumer()
    consumer.handlers = {PLACED: handle}
    results = await asyncio.gather(*(consumer.handle(message) for message in [*good[:4], bad, *good[4:]]))
    assert [isinstance(result, Retry) for result in results] == [*[False] * 4, True, *[False] * 4]
    assert sorted(await effects.committed()) == sorted(message.id for message in good)
    async with db.connection(pool) as conn:
        assert await conn.fetchval("SELECT sum(attempts) FROM inbox") == 1


async def test_a_message_that_another_process_handles_does_not_delay_its_neighbours(
    pool: db.Pool, effects: Effects
) -> None:
    """They take effect while the other process has not committed; it then counts as handled."""
    held, others, consumer = event(), [event() for _ in range(8)], effects.consumer()
    async with db.transaction(pool) as conn:
        assert await inbox.first_time(conn, "effects", [str(held.id)])
        first = asyncio.create_task(consumer.handle(others[0]))
        waiting = asyncio.create_task(consumer.handle(held))
        await asyncio.gather(first, *(consumer.handle(message) for message in others[1:]))
        assert not waiting.done()
    assert await waiting == Handled()
    assert sorted(await effects.committed()) == sorted(message.id for message in others)
