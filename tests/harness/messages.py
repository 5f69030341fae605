"""The broker as another of its users sees it: queues bound for listening, messages taken off them."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from app.messaging.rabbitmq import EXCHANGE, declare_topology
from tests.harness.wait import wait_until

ROUTING_KEYS = ("order.placed",)


@contextlib.asynccontextmanager
async def open_channel(url: str) -> AsyncIterator[AbstractChannel]:
    """Open a channel to a broker that has the topology."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await declare_topology(channel, ROUTING_KEYS)
        yield channel


async def listen(channel: AbstractChannel, routing_key: str = "#", **arguments: Any) -> AbstractQueue:
    """Bind a queue of this channel's own, which hears what is published from now on."""
    queue = await channel.declare_queue(exclusive=True, arguments=arguments)
    await queue.bind(EXCHANGE, routing_key)
    return queue


async def take(channel: AbstractChannel, name: str) -> AbstractIncomingMessage | None:
    """Take one message off the queue, for good; None when there is none."""
    queue = await channel.get_queue(name, ensure=False)
    return await queue.get(no_ack=True, fail=False, timeout=10)


async def next_message(channel: AbstractChannel, name: str) -> AbstractIncomingMessage:
    """Take the next message off the queue, waiting for it."""
    message = await wait_until(lambda: take(channel, name), 20, f"message in {name}")
    assert message is not None
    return message
