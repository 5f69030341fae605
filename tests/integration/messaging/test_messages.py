"""Messages as other readers see them: by the published document, and by the CloudEvents project's own SDK."""

import asyncio
import json
from datetime import UTC

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage
from cloudevents.core.bindings import amqp
from cloudevents.core.formats.json import JSONFormat

from app import db
from app.messaging.consumer import Consumer
from app.messaging.envelope import Envelope
from app.messaging.rabbitmq.subscription import RabbitSubscription
from app.messaging.topology import EXCHANGE
from app.observability.signals import Signals
from app.orders import store
from app.orders.model import Reason, Status
from tests.harness.asyncapi import check
from tests.harness.messages import listen, next_message, open_channel, publishing
from tests.harness.orders import event_of, placed
from tests.harness.queues import DEAD_LETTER_QUEUE, ROUTING_KEYS, SAGA_QUEUE

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=1"}
ENDS: dict[Status, tuple[Status | None, Reason | None]] = {
    Status.PENDING: (None, None),
    Status.CONFIRMED: (None, None),
    Status.REJECTED: (Status.COMPENSATING, Reason.CARD_DECLINED),
    Status.CANCELLED: (None, Reason.CANCELLED_BY_CUSTOMER),
}


async def event_at(pool: db.Pool, status: Status) -> Envelope:
    """Bring a new order to this status; return the event of it."""
    order = await placed(pool, customer_id="Zoë ✓")
    before, reason = ENDS[status]
    async with db.transaction(pool) as conn:
        for step in (before, status):
            if step is not None and step is not order.status:
                order = await store.change_status(conn, order, step, reason, {})
    return event_of(order, **TRACE)


async def sent(url: str, event: Envelope) -> AbstractIncomingMessage:
    """Publish as the relay does; return the message that a listener receives."""
    async with open_channel(url) as channel, publishing(url) as transport:
        queue = await listen(channel, event.routing_key)
        assert await transport.publish([event]) == [None]
        return await next_message(channel, queue.name)


@pytest.mark.parametrize("status", ENDS)
async def test_every_event_matches_the_document(pool: db.Pool, rabbitmq_url: str, status: Status) -> None:
    """Every event is valid by the AsyncAPI document."""
    event = await event_at(pool, status)
    message = await sent(rabbitmq_url, event)
    check(message.routing_key.replace(".", "_"), message.headers, json.loads(message.body))  # type: ignore[union-attr]
    assert (message.exchange, message.routing_key, message.content_type, message.type) == (
        EXCHANGE,
        event.routing_key,
        "application/json",
        event.type,
    )


@pytest.mark.parametrize("status", ENDS)
async def test_the_official_sdk_reads_every_event(pool: db.Pool, rabbitmq_url: str, status: Status) -> None:
    """The CloudEvents SDK reads the attributes that were sent."""
    event = await event_at(pool, status)
    message = await sent(rabbitmq_url, event)
    read = amqp.from_amqp(
        amqp.AMQPMessage({"content-type": message.content_type}, dict(message.headers), message.body), JSONFormat()
    )
    assert read.get_attributes() == {
        "specversion": "1.0",
        "id": str(event.id),
        "source": "/orders",
        "type": event.type,
        "subject": event.subject,
        "time": event.time.astimezone(UTC),
        "sequence": str(event.sequence),
        "tenant": event.tenant,
        "datacontenttype": "application/json",
    }
    assert read.get_data() == event.data


async def test_a_dead_letter_matches_the_document(pool: db.Pool, rabbitmq_url: str) -> None:
    """A dead letter is valid by the AsyncAPI document."""
    consumer = Consumer(pool, "saga", {}, 1, Signals())
    subscription = RabbitSubscription(rabbitmq_url, consumer, SAGA_QUEUE, 10)
    task = asyncio.create_task(subscription.run())
    async with open_channel(rabbitmq_url) as channel:
        exchange = await channel.get_exchange(EXCHANGE)
        await exchange.publish(aio_pika.Message(b'{"no": "event"}'), ROUTING_KEYS[0])
        message = await next_message(channel, DEAD_LETTER_QUEUE)
    subscription.stop()
    await task
    check("dead_letter", message.headers, json.loads(message.body))
