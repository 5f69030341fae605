"""A slow or long link to the broker: every event is published, and few are sent twice."""

import asyncio
import contextlib

import pytest
from aio_pika.abc import AbstractChannel

from app import db
from app.errors import BrokerUnavailable
from app.messaging.rabbitmq.publisher import RabbitPublisher
from app.messaging.relay import Relay
from chaos.proxy.faults import Delay, Throttle
from chaos.proxy.proxy import Proxy
from tests.harness.dead_letters import drained
from tests.harness.events import event, put
from tests.harness.messages import publishing
from tests.harness.queues import QUEUE
from tests.harness.relays import make_relay
from tests.harness.wait import AMPLE_SECONDS, wait_until

PUBLISH_SECONDS = 5.0  # the setting's default
LINES = [{"sku": f"SKU-{n:046}", "quantity": 1, "unit_price": "9.99", "line_total": "9.99"} for n in range(100)]


def relay_over(pool: db.Pool, transport: RabbitPublisher, lease_seconds: float) -> Relay:
    return make_relay(pool, transport, batch_size=200, lease_seconds=lease_seconds)


async def is_drained(pool: db.Pool, relay: Relay) -> bool:
    """Publish one batch; return whether every event is published."""
    with contextlib.suppress(BrokerUnavailable):
        await relay.run_once()
    return bool(await pool.fetchval("SELECT bool_and(published_at IS NOT NULL) FROM outbox"))


async def test_large_events_drain_over_a_slow_link(
    pool: db.Pool, broker_proxy: Proxy, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """230 orders of 100 lines at 300 KB a second: 200 of them take about 10 s, longer than a batch may take here.

    What was confirmed in its time is recorded, and what was not sent in its time is not repeated.
    """
    events = [event(data={"items": LINES}) for _ in range(230)]
    await put(pool, *events)
    broker_proxy.arm(Throttle(300_000))
    async with publishing(broker_proxy.url(rabbitmq_url), PUBLISH_SECONDS) as transport:
        relay = relay_over(pool, transport, lease_seconds=10.0)
        await wait_until(lambda: is_drained(pool, relay), AMPLE_SECONDS, "the last event")
    assert await pool.fetchval("SELECT count(*) FROM outbox WHERE attempts > 0") == 0
    ids = await drained(channel, QUEUE)
    assert set(ids) == {str(envelope.id) for envelope in events}
    assert len(ids) - len(events) <= 25  # no duplicates, unless the machine stalls: then the unconfirmed ones


async def test_a_cancelled_relay_records_what_was_confirmed(
    pool: db.Pool, broker_proxy: Proxy, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """It is cancelled within a batch, as after SIGTERM and its grace period: only the rest is sent again."""
    events = [event(data={"items": LINES}) for _ in range(100)]
    await put(pool, *events)
    broker_proxy.arm(Throttle(200_000))
    async with publishing(broker_proxy.url(rabbitmq_url), PUBLISH_SECONDS) as transport:
        task = asyncio.create_task(relay_over(pool, transport, lease_seconds=60.0).run_once())

        async def many_arrived() -> bool:
            queue = await channel.declare_queue(QUEUE, passive=True)
            return (queue.declaration_result.message_count or 0) >= 40  # more than are sent unconfirmed

        await wait_until(many_arrived, AMPLE_SECONDS, "40 messages")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    published, claimed = await pool.fetchrow(
        "SELECT count(published_at) AS published, count(claim_token) AS claimed FROM outbox"
    ) or (0, 0)
    assert (published > 0, claimed) == (True, 0)


async def test_a_lost_connection_is_replaced_over_a_long_link(
    pool: db.Pool, broker_proxy: Proxy, rabbitmq_url: str, channel: AbstractChannel
) -> None:
    """Connecting and declaring the topology takes about a dozen round trips of 0.4 s."""
    async with publishing(broker_proxy.url(rabbitmq_url), PUBLISH_SECONDS) as transport:
        relay = relay_over(pool, transport, lease_seconds=30.0)
        await put(pool, event())
        await wait_until(lambda: is_drained(pool, relay), AMPLE_SECONDS, "the first event")
        broker_proxy.arm(Delay(0.2))
        broker_proxy.cut()
        await put(pool, event())
        await wait_until(lambda: is_drained(pool, relay), AMPLE_SECONDS, "an event over another connection")
    assert len(set(await drained(channel, QUEUE))) == 2
