"""The queue and the messages of the floors: as durable as the service's."""

from uuid import uuid4

import aio_pika
from aio_pika.abc import AbstractChannel

QUEUE = "bench.orders"
PLACED, CONFIRMED = "order.placed", "order.confirmed"


async def declare(channel: AbstractChannel) -> None:
    """Declare the queue: durable and replicated."""
    await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})


def message(content: bytes, type_: str) -> aio_pika.Message:
    """Return a message that outlives the broker."""
    return aio_pika.Message(
        content,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=str(uuid4()),
        type=type_,
        content_type="application/json",
    )


async def publish(channel: AbstractChannel, content: bytes, type_: str) -> None:
    """Publish an event, and return when it is confirmed. Only the first event of an order has a consumer."""
    if type_ == PLACED:
        await channel.default_exchange.publish(message(content, type_), QUEUE, mandatory=True)
    else:
        await channel.default_exchange.publish(message(content, type_), type_, mandatory=False)
