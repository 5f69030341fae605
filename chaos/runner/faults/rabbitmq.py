"""Faults of RabbitMQ and of the link to it."""

import asyncio
import contextlib
import errno
import random
from typing import Any

import aio_pika
from aio_pika.exceptions import ChannelNotFoundEntity

from chaos.proxy import amqp
from chaos.proxy.faults import Double, Eat, Overtake, Throttle
from chaos.runner.faults.acts import CALL_SECONDS, Row, alone, arming, cutting, freezing, kill
from chaos.runner.system import System
from tests.harness.processes import Service

SYNCS = "posix/io/sync/*"
DISK_LIMIT, MORE_THAN_ANY_DISK = "50MB", "1000000GB"
QUEUE, DEAD_LETTER_QUEUE, EXCHANGE = "orders.saga", "orders.saga.dlq", "orders.events"


async def _kill_rabbitmq(system: System, _: random.Random, seconds: float) -> None:
    # RabbitMQ 3 loses a queue that was declared within the last second, and does not recover from that.
    await system.rabbitmq.sync()
    await kill(system.rabbitmq, seconds)


async def _restore_old_files(system: System, _: random.Random, seconds: float) -> None:
    """Put back RabbitMQ's files as they were some seconds ago, so that what it confirmed since is lost.

    Consumers freeze meanwhile: those messages would be gone from its queue anyway.
    """
    broker, ended = system.rabbitmq, asyncio.Event()
    await broker.sync()
    await broker.kill()
    await asyncio.to_thread(broker.save)
    await broker.start()

    async def freeze(consumer: Service, _: float) -> None:
        consumer.freeze()
        try:
            await ended.wait()
        finally:
            consumer.thaw()

    async with asyncio.TaskGroup() as group:
        for consumer in system.roles["consumer"]:
            group.create_task(alone(system, consumer, freeze, seconds))
        await asyncio.sleep(seconds)
        await broker.kill()
        ended.set()
    await asyncio.to_thread(broker.restore)
    await broker.start()


async def _fail_syncs(system: System, _: random.Random, seconds: float) -> None:
    """Let every fsync fail: the queues stop, and a restart has to repair them."""
    await system.rabbitmq.sync()
    node = system.rabbitmq.present
    await system.rabbitmq_disk.fail(node.pid, SYNCS, errno.EIO)
    await asyncio.sleep(seconds)
    await kill(node, 0)


async def _fill_disk(system: System, _: random.Random, seconds: float) -> None:
    """Let RabbitMQ believe that its disk is full: it blocks every publisher."""
    node = system.rabbitmq.present
    await node.control("set_disk_free_limit", MORE_THAN_ANY_DISK)
    try:
        await asyncio.sleep(seconds)
    finally:
        await node.control("set_disk_free_limit", DISK_LIMIT)


@contextlib.asynccontextmanager
async def _channel(system: System) -> Any:
    async with await aio_pika.connect(system.rabbitmq.url(), timeout=CALL_SECONDS) as connection:
        yield await connection.channel()


async def _unbind(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        with contextlib.suppress(ChannelNotFoundEntity):  # another fault has just deleted the queue, with its bindings
            queue = await channel.get_queue(QUEUE)
            await queue.unbind(EXCHANGE, "order.placed")


async def _delete_queue(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        await channel.queue_delete(QUEUE)


async def _purge_dead_letters(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        with contextlib.suppress(ChannelNotFoundEntity):  # as above
            queue = await channel.get_queue(DEAD_LETTER_QUEUE)
            await queue.purge()


async def _send_rubbish(system: System, rng: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        exchange = await channel.get_exchange(EXCHANGE)
        for body in (b"", b"{", b"null", rng.randbytes(200)):
            await exchange.publish(aio_pika.Message(body), "order.placed")


FAULTS: dict[str, Row] = {
    "rabbitmq: kill -9": Row("rabbitmq", (0.0, 2.0), _kill_rabbitmq),
    "rabbitmq: freeze": Row("rabbitmq", (1.0, 5.0), freezing(lambda system: system.rabbitmq)),
    "rabbitmq: disk full": Row("rabbitmq", (2.0, 6.0), _fill_disk, 4.0),
    "rabbitmq: I/O errors of the disk": Row("rabbitmq", (1.0, 4.0), _fail_syncs, 10.0),
    "rabbitmq: restored from old files": Row("rabbitmq", (3.0, 6.0), _restore_old_files, 18.0),
    "rabbitmq: unbind the queue": Row("rabbitmq", (0.0, 0.0), _unbind),
    "rabbitmq: delete the queue": Row("rabbitmq", (0.0, 0.0), _delete_queue),
    "rabbitmq: purge dead letters": Row("rabbitmq", (0.0, 0.0), _purge_dead_letters),
    "rabbitmq: rubbish messages": Row("rabbitmq", (0.0, 0.0), _send_rubbish),
    "link to rabbitmq: cut": Row("rabbitmq-link", (0.1, 0.5), cutting(lambda system: system.rabbitmq_link)),
    "link to rabbitmq: slow": Row(
        "rabbitmq-link", (2.0, 5.0), arming(lambda system: system.rabbitmq_link, Throttle(bytes_per_second=40_000))
    ),
    "link to rabbitmq: lose confirms and acknowledgements": Row(
        "rabbitmq-link",
        (2.0, 5.0),
        arming(
            lambda system: system.rabbitmq_link,
            Eat(amqp.CONFIRM, probability=0.1),
            Eat(amqp.ACKNOWLEDGEMENT, probability=0.1),
        ),
    ),
    "link to rabbitmq: double and reorder deliveries": Row(
        "rabbitmq-link",
        (2.0, 5.0),
        arming(
            lambda system: system.rabbitmq_link,
            Double(amqp.DELIVERY, probability=0.3),
            Overtake(amqp.DELIVERY, probability=0.2),
        ),
    ),
}
