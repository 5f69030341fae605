"""Declare the topology. Publisher and subscriptions do so on every connect, which restores it if the broker lost it."""

from collections.abc import Collection

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aio_pika.exceptions import ChannelPreconditionFailed
from pamqp.common import FieldTable

from app.messaging.topology import (
    DEAD_LETTER_DELIVERY_LIMIT,
    DEAD_LETTER_EXCHANGE,
    DELIVERY_LIMIT,
    EXCHANGE,
    QueueSpec,
)

log = structlog.get_logger(__name__)


async def declare_all(connection: AbstractConnection, channel: AbstractChannel, queues: Collection[QueueSpec]) -> None:
    """Declare the exchanges and every queue."""
    for queue in queues:
        await declare(connection, channel, queue)


async def declare(connection: AbstractConnection, channel: AbstractChannel, spec: QueueSpec) -> AbstractQueue:
    """Declare a queue with its dead-letter queue, exchanges and bindings: durable, and replicated in a cluster."""
    events = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    dead_letters = await channel.declare_exchange(DEAD_LETTER_EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)
    await _declare_dead_letter_queue(connection, spec.dead_letter_queue)
    dlq = await channel.get_queue(spec.dead_letter_queue, ensure=False)
    await dlq.bind(dead_letters, spec.name)
    queue = await channel.declare_queue(
        spec.name,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-dead-letter-exchange": DEAD_LETTER_EXCHANGE,
            "x-dead-letter-routing-key": spec.name,
        },
    )
    for routing_key in spec.routing_keys:
        await queue.bind(events, routing_key)
    return queue


async def has_current_arguments(connection: AbstractConnection, spec: QueueSpec) -> bool:
    """Return whether the dead-letter queue has this release's arguments, delivery limit included."""
    return await _declare_dead_letter_queue(connection, spec.dead_letter_queue)


async def _declare_dead_letter_queue(connection: AbstractConnection, name: str) -> bool:
    """Declare the queue. Return False if it exists with other arguments, as older releases declared it.

    A queue's arguments cannot be changed, so it is used as it is. A refusal closes the channel, so use a separate one.
    """
    arguments: FieldTable = {"x-queue-type": "quorum", "x-delivery-limit": DEAD_LETTER_DELIVERY_LIMIT}
    try:
        async with connection.channel() as channel:
            await channel.declare_queue(name, durable=True, arguments=arguments)
    except ChannelPreconditionFailed as error:
        log.info("rabbitmq.other_arguments", queue=name, error=str(error))
        return False
    return True
