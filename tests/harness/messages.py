"""Use the broker as another client: bind queues that listen, and take messages from them."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from app.messaging.rabbitmq.publisher import RabbitPublisher
from app.messaging.rabbitmq.topology import declare
from app.messaging.topology import EXCHANGE, QueueSpec
from tests.harness.checker import Heard
from tests.harness.queues import SAGA_QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

HEARD = "orders.heard"  # a queue that gets every event and survives a crash of the broker


@contextlib.asynccontextmanager
async def open_channel(url: str) -> AsyncIterator[AbstractChannel]:
    """Open a channel to a broker that has the topology."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await declare(connection, channel, SAGA_QUEUE)
        yield channel


@contextlib.asynccontextmanager
async def publishing(
    url: str, patience_seconds: float = AMPLE_SECONDS, queues: tuple[QueueSpec, ...] = (SAGA_QUEUE,)
) -> AsyncIterator[RabbitPublisher]:
    """Lend a transport like the relay's."""
    transport = RabbitPublisher(url, queues, patience_seconds)
    try:
        yield transport
    finally:
        await transport.close()


async def listen(channel: AbstractChannel, routing_key: str = "#", **arguments: Any) -> AbstractQueue:
    """Bind an exclusive queue, which gets everything that is published from now on."""
    queue = await channel.declare_queue(exclusive=True, arguments=arguments)
    await queue.bind(EXCHANGE, routing_key)
    return queue


async def start_hearing(url: str) -> None:
    """Keep everything that is published from now on, in the order of arrival."""
    async with open_channel(url) as channel:
        queue = await channel.declare_queue(HEARD, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(EXCHANGE, "#")


async def everything_heard(url: str) -> list[Heard]:
    """Return all messages that arrived since `start_hearing`, duplicates included."""
    heard = []
    async with open_channel(url) as channel:
        while message := await take(channel, HEARD):
            attributes = {
                name: str(message.headers[f"cloudEvents_{name}"]) for name in ("id", "type", "subject", "sequence")
            }
            assert message.message_id == attributes["id"]
            heard.append(
                Heard(attributes["id"], attributes["type"], attributes["subject"], int(attributes["sequence"]))
            )
    return heard


async def take(channel: AbstractChannel, name: str) -> AbstractIncomingMessage | None:
    """Remove and return one message of the queue, None if it is empty."""
    queue = await channel.get_queue(name, ensure=False)
    return await queue.get(no_ack=True, fail=False, timeout=AMPLE_SECONDS)


async def next_message(channel: AbstractChannel, name: str) -> AbstractIncomingMessage:
    """Wait for the next message of the queue, and remove it."""
    message = await wait_until(lambda: take(channel, name), AMPLE_SECONDS, f"message in {name}")
    assert message is not None
    return message
