"""The in-process transport: a row counts as published only when its handler's effect is committed."""

from collections.abc import Sequence
from typing import Any

import pytest

from app import db
from app.errors import DatabaseUnavailable
from app.messaging.consumer import Consumer
from app.messaging.envelope import Envelope
from app.messaging.relay import UNCONFIRMED, PublishResult, Refusal, Relay
from app.observability.signals import Signals
from tests.harness.events import CONFIRMED, PLACED, Effects, event, put
from tests.harness.relays import local_transport, make_relay

YEAR_SECONDS = 31_536_000.0  # full jitter makes pauses of any length up to this, so few are short


def relay(pool: db.Pool, consumer: Consumer, *, max_attempts: int = 10) -> Relay:
    return make_relay(
        pool,
        local_transport(consumer),
        lease_seconds=3600,
        backoff_seconds=YEAR_SECONDS,
        max_attempts=max_attempts,
    )


async def published(pool: db.Pool) -> int:
    async with db.connection(pool) as conn:
        return int(await conn.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL"))


async def make_due(pool: db.Pool) -> None:
    async with db.connection(pool) as conn:
        await conn.execute("UPDATE outbox SET next_attempt_at = clock_timestamp()")


async def parked(pool: db.Pool) -> list[Any]:
    async with db.connection(pool) as conn:
        return [tuple(row) for row in await conn.fetch("SELECT id, last_error FROM outbox WHERE parked_at IS NOT NULL")]


async def publish(effects: Effects, *messages: Envelope, max_attempts: int = 3) -> Sequence[PublishResult]:
    return await local_transport(effects.consumer(max_attempts=max_attempts)).publish(messages)


async def test_a_handled_message_is_confirmed(effects: Effects) -> None:
    """A message with a handler takes effect and is confirmed."""
    messages = [event(), event()]
    assert await publish(effects, *messages) == [None, None]
    assert await effects.committed() == [message.id for message in messages]


async def test_messages_take_effect_together(pool: db.Pool, effects: Effects) -> None:
    """They are delivered at the same time, so the consumer gathers them: many messages, few transactions."""
    assert await publish(effects, *(event() for _ in range(3 * db.BATCH_SIZE))) == [None] * 3 * db.BATCH_SIZE
    async with db.connection(pool) as conn:
        assert await conn.fetchval("SELECT count(DISTINCT xmin::text) FROM inbox") <= 6


async def test_messages_without_time_are_unconfirmed(effects: Effects) -> None:
    """Messages that the time does not suffice for are unconfirmed."""
    answers = await local_transport(effects.consumer()).publish([event(), event(event_type=CONFIRMED)], seconds=0)
    assert answers == [UNCONFIRMED, UNCONFIRMED]
    assert await effects.committed() == []


async def test_a_message_without_a_handler_is_confirmed(pool: db.Pool, effects: Effects) -> None:
    """As by an exchange without a queue."""
    assert await publish(effects, event(event_type=CONFIRMED)) == [None]
    async with db.connection(pool) as conn:
        assert await conn.fetchval("SELECT count(*) FROM inbox") == 0


async def test_a_failing_handler_refuses_its_message_only(effects: Effects) -> None:
    """A failing handler refuses its message, and no other."""
    effects.failure = ValueError("no such thing")
    refused, fine = await publish(effects, event(), event(event_type=CONFIRMED))
    assert refused == Refusal("ValueError: no such thing")
    assert fine is None


async def test_the_last_attempt_is_a_final_refusal(effects: Effects) -> None:
    """The last attempt by the inbox's count is a final refusal."""
    effects.failure, message = ValueError("no such thing"), event()
    answers = [await publish(effects, message, max_attempts=2) for _ in range(2)]
    assert [isinstance(refusal, Refusal) and refusal.final for (refusal,) in answers] == [False, True]


async def test_a_row_is_published_after_its_effect(pool: db.Pool, effects: Effects) -> None:
    """A row is published when its effect is committed."""
    message = event()
    await put(pool, message, event(event_type=CONFIRMED))
    assert await relay(pool, effects.consumer()).run_once() == 2
    assert await published(pool) == 2
    assert await effects.committed() == [message.id]


async def test_a_row_whose_handler_keeps_failing_is_parked(pool: db.Pool, effects: Effects) -> None:
    """After the last attempt, the row is parked with the reason."""
    effects.failure, message = ValueError("no such thing"), event()
    await put(pool, message)
    publisher = relay(pool, effects.consumer(max_attempts=2))
    for _ in range(2):
        assert await parked(pool) == []
        assert await publisher.run_once() == 1
        await make_due(pool)
    assert await publisher.run_once() == 0
    assert await parked(pool) == [(message.id, "ValueError: no such thing")]
    assert await effects.committed() == []


@pytest.mark.parametrize("text", ["\x00", "\ud800"], ids=["NUL", "surrogate"])
async def test_a_failure_with_any_text_parks_the_row(pool: db.Pool, effects: Effects, text: str) -> None:
    """A row is parked whatever characters the text of the failure has."""
    effects.failure, fine = ValueError(text), event(event_type=CONFIRMED)
    await put(pool, event(), fine)
    assert await relay(pool, effects.consumer(max_attempts=1)).run_once() == 2
    assert len(await parked(pool)) == 1
    assert await published(pool) == 1


async def test_an_outage_within_a_batch_releases_all_rows(pool: db.Pool, effects: Effects) -> None:
    """If Postgres fails within a batch, all rows are released, and nothing takes effect twice."""

    async def second_time_unlucky(conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        await effects(conn, envelopes)
        if effects.calls == 2:
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    messages = [event() for _ in range(db.BATCH_SIZE + 1)]  # two transactions
    await put(pool, *messages)
    consumer = Consumer(pool, "effects", {PLACED: second_time_unlucky}, 1, Signals())
    publisher = relay(pool, consumer)
    with pytest.raises(DatabaseUnavailable):
        await publisher.run_once()
    assert len(await effects.committed()) == db.BATCH_SIZE
    assert await published(pool) == 0
    assert await publisher.run_once() == len(messages)
    assert await published(pool) == len(messages)
    assert sorted(await effects.committed()) == sorted(message.id for message in messages)
