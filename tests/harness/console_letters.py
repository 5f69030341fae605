"""Dead letters and parked events for the pages that show them, with either transport."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
from aio_pika.abc import AbstractChannel

from app import db
from app.messaging import inbox
from app.orders.model import Order
from tests.harness.api import serving
from tests.harness.console import SETTINGS, log_in
from tests.harness.dead_letters import REASON, drained, holds, set_aside
from tests.harness.messages import open_channel
from tests.harness.orders import event_of, placed
from tests.harness.queues import CONSUMER


async def park(pool: db.Pool, number: int = 1, reason: str = REASON) -> list[Order]:
    """Place orders whose events are parked, one after the other."""
    orders = [await placed(pool) for _ in range(number)]
    for order in orders:
        await pool.execute(
            "UPDATE outbox SET parked_at = clock_timestamp(), last_error = $2, attempts = 10 WHERE subject = $1",
            str(order.id),
            reason,
        )
    return orders


async def record_dead(pool: db.Pool, order: Order, reason: str = REASON) -> None:
    """Record in the inbox that the order's event is dead."""
    async with db.connection(pool) as conn:
        await inbox.count_failure(conn, CONSUMER, str(order.id), reason)
        await inbox.mark_dead(conn, CONSUMER, str(order.id))


@dataclass
class Desk:
    """An operator's client, and dead letters in RabbitMQ, or without `channel` in the outbox."""

    client: httpx.AsyncClient
    pool: db.Pool
    channel: AbstractChannel | None

    async def plant(self, number: int = 1) -> list[Order]:
        """Place orders whose events become dead letters, as after a failure of the saga's consumer."""
        orders = await park(self.pool, number)
        for order in orders:
            await record_dead(self.pool, order)
            if self.channel is not None:
                await set_aside(self.channel, event_of(order))
        if self.channel is not None:
            await self.pool.execute("UPDATE outbox SET parked_at = NULL, published_at = clock_timestamp()")
            await holds(self.channel, number)
        return orders

    async def page(self, path: str) -> str:
        """Return a page."""
        return (await self.client.get(path)).raise_for_status().text

    async def parked(self) -> list[str]:
        """Return the orders of the parked rows, longest parked first."""
        rows = await self.pool.fetch("SELECT subject FROM outbox WHERE parked_at IS NOT NULL ORDER BY parked_at")
        return [row["subject"] for row in rows]

    async def left(self) -> list[str | None]:
        """Return the ids of the dead letters. Those in RabbitMQ are removed."""
        return [*await self.parked()] if self.channel is None else await drained(self.channel)


@contextlib.asynccontextmanager
async def at_desk(database_url: str, pool: db.Pool, rabbitmq_url: str = "") -> AsyncIterator[Desk]:
    """Serve the console, and log in."""
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(rabbitmq_url)) if rabbitmq_url else None
        client = await stack.enter_async_context(serving(database_url, rabbitmq_url=rabbitmq_url, **SETTINGS))
        await log_in(client)
        yield Desk(client, pool, channel)
