"""Orders whose `order.placed` was dead-lettered an hour ago."""

from collections.abc import Sequence
from uuid import UUID

from aio_pika.abc import AbstractChannel

from app import db
from app.messaging.consumer import Consumer
from app.messaging.envelope import Envelope
from app.messaging.relay import Transport
from app.observability.signals import Signals
from tests.harness.dead_letters import consuming, holds
from tests.harness.events import PLACED
from tests.harness.messages import publishing
from tests.harness.orders import placed
from tests.harness.queues import CONSUMER, DEAD_LETTER_QUEUE
from tests.harness.relays import make_relay

FAILURE = "ValueError: no such thing"


def failing_consumer(pool: db.Pool) -> Consumer:
    """Return the saga's consumer with a bug: every message is dead at its first failure."""

    async def fail(_conn: db.Connection, _envelopes: Sequence[Envelope]) -> None:
        raise ValueError("no such thing")

    return Consumer(pool, CONSUMER, {PLACED: fail}, 1, Signals())


async def publish_all(pool: db.Pool, transport: Transport) -> None:
    """Publish the outbox with a relay."""
    await make_relay(pool, transport).run_once()


async def dead_lettered(pool: db.Pool, url: str, channel: AbstractChannel, number: int = 1) -> list[UUID]:
    """Place orders whose events became dead letters an hour ago; return their ids."""
    ids = [(await placed(pool)).id for _ in range(number)]
    async with publishing(url) as transport, consuming(url, failing_consumer(pool)):
        await publish_all(pool, transport)
        await holds(channel, number)
    await age(pool)
    return ids


async def age(pool: db.Pool) -> None:
    """Move all times of orders, outbox and inbox back by an hour."""
    for table, columns in {
        "orders": ("placed_at",),
        "outbox": ("published_at", "pending_since"),
        "inbox": ("dead_at", "purged_at"),
    }.items():
        changes = ", ".join(f"{column} = {column} - interval '1 hour'" for column in columns)
        await pool.execute(f"UPDATE {table} SET {changes}")  # noqa: S608 - names


async def purge_by_hand(channel: AbstractChannel) -> None:
    """Purge the dead-letter queue in RabbitMQ, unnoticed by the service."""
    await (await channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)).purge()
    await holds(channel, 0)


async def pending(pool: db.Pool) -> set[UUID]:
    """Return the ids of the pending events."""
    rows = await pool.fetch("SELECT id FROM outbox WHERE published_at IS NULL AND parked_at IS NULL")
    return {UUID(int=row["id"].int) for row in rows}
