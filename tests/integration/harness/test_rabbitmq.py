"""The private RabbitMQ of the fault tests behaves as a broker that crashes and restarts."""

from pathlib import Path

import aio_pika

from tests.harness import servers

QUEUE = "survivors"


async def publish(url: str, body: bytes) -> None:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel(publisher_confirms=True)
        # A classic queue: a quorum queue killed within about a second of its declaration returns without a
        # leader and without its messages, because its name is not on disk yet.
        await channel.declare_queue(QUEUE, durable=True)
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, QUEUE)


async def take(url: str) -> bytes:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        queue = await channel.get_queue(QUEUE)
        message = await queue.get()
        await message.ack()
        await queue.delete(if_empty=False)  # the broker may be shared
        return message.body


async def test_a_confirmed_persistent_message_survives_kill_and_start(server_directory: Path) -> None:
    async with servers.rabbitmq(server_directory) as broker:
        await publish(broker.url(), b"confirmed")
        await broker.sync()
        await broker.kill()
        await broker.start()
        assert await take(broker.url()) == b"confirmed"


async def test_the_shared_vhost_can_be_used(rabbitmq_url: str) -> None:
    await publish(rabbitmq_url, b"here")
    assert await take(rabbitmq_url) == b"here"
