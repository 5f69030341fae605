"""Faults of RabbitMQ and of the link to it."""

import contextlib
import random
from typing import Any

import aio_pika

from chaos.proxy import amqp
from chaos.proxy.faults import Double, Eat, Overtake, Throttle
from chaos.runner.faults.acts import CALL_SECONDS, Row, arming, cutting, freezing, kill
from chaos.runner.system import System

QUEUE, DEAD_LETTER_QUEUE, EXCHANGE = "orders.saga", "orders.saga.dlq", "orders.events"


async def _kill_rabbitmq(system: System, _: random.Random, seconds: float) -> None:
    # RabbitMQ 3 loses a queue that was declared within the last second, and does not recover from that.
    await system.rabbitmq.sync()
    await kill(system.rabbitmq, seconds)


@contextlib.asynccontextmanager
async def _channel(system: System) -> Any:
    async with await aio_pika.connect(system.rabbitmq.url(), timeout=CALL_SECONDS) as connection:
        yield await connection.channel()


async def _unbind(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        queue = await channel.get_queue(QUEUE)
        await queue.unbind(EXCHANGE, "order.placed")


async def _delete_queue(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
        await channel.queue_delete(QUEUE)


async def _purge_dead_letters(system: System, _: random.Random, __: float) -> None:
    async with _channel(system) as channel:
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
