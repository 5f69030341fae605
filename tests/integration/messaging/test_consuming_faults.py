"""Faults of the broker or the network while consuming: each message takes effect once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aiormq.abc import DeliveredMessage

from app.messaging.rabbitmq.subscription import RabbitSubscription
from app.messaging.topology import EXCHANGE
from chaos.proxy import amqp
from chaos.proxy.faults import Blackhole, Block, Double, Eat, Lose, Overtake
from chaos.proxy.proxy import Proxy
from tests.harness.dead_letters import drained
from tests.harness.events import Effects, counted, event
from tests.harness.messages import listen, next_message, publishing
from tests.harness.observed import Observed
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE, ROUTING_KEYS, SAGA_QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until

WATCH_SECONDS = 0.2
NEVER_SECONDS = 3600.0  # for tests that count deliveries: a watch on a slow broker could cause more of them


@pytest.fixture
async def consume(
    broker_proxy: Proxy, rabbitmq_url: str, effects: Effects
) -> AsyncIterator[Callable[..., Awaitable[RabbitSubscription]]]:
    """Start a subscription through the proxy; it ends with the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(signals: Observed | None = None, watch_seconds: float = WATCH_SECONDS) -> RabbitSubscription:
            url = broker_proxy.url(rabbitmq_url)
            subscription = RabbitSubscription(url, effects.consumer(signals), SAGA_QUEUE, 10, watch_seconds)
            task = asyncio.create_task(subscription.run())
            stack.push_async_callback(asyncio.wait, [task])
            stack.callback(subscription.stop)
            await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
            return subscription

        yield start


async def send(rabbitmq_url: str, count: int) -> list[str]:
    """Publish without the proxy; return the ids, sorted."""
    events = [event() for _ in range(count)]
    async with publishing(rabbitmq_url) as transport:
        assert set(await transport.publish(events)) == {None}
    return sorted(str(envelope.id) for envelope in events)


async def applied(effects: Effects) -> list[str]:
    return sorted(map(str, await effects.committed()))


async def test_doubled_and_reordered_messages(
    broker_proxy: Proxy,
    rabbitmq_url: str,
    channel: AbstractChannel,
    effects: Effects,
    consume: Callable[..., Awaitable[RabbitSubscription]],
) -> None:
    """Messages that are doubled or overtaken take effect once each."""
    signals, double = Observed(), Double(amqp.DELIVERY, probability=0.5)
    broker_proxy.arm(Overtake(amqp.DELIVERY, probability=0.5, times=10))
    broker_proxy.arm(double)
    ids = await send(rabbitmq_url, 50)
    await consume(signals, NEVER_SECONDS)
    await effects.arrive(50)
    broker_proxy.disarm()
    await wait_until(lambda: done_with(signals, 50 + broker_proxy.struck[double]), AMPLE_SECONDS, "doubles")
    assert broker_proxy.struck[double]
    assert await applied(effects) == ids
    assert await drained(channel, QUEUE) == []


def done_with(signals: Observed, count: int) -> bool:
    processed, repeated = (counted(signals, f"consumer_{what}_total") for what in ("processed", "dedup_hits"))
    return (processed or 0) + (repeated or 0) == count


async def test_lost_acknowledgements(
    broker_proxy: Proxy, rabbitmq_url: str, effects: Effects, consume: Callable[..., Awaitable[RabbitSubscription]]
) -> None:
    """Messages whose acknowledgement is lost are delivered again, and take effect once."""
    signals, eaten = Observed(), Eat(amqp.ACKNOWLEDGEMENT)
    broker_proxy.arm(eaten)
    ids = await send(rabbitmq_url, 5)
    await consume(signals, NEVER_SECONDS)
    await wait_until(lambda: broker_proxy.struck[eaten] == 5, AMPLE_SECONDS, "acknowledgements")
    broker_proxy.disarm()
    broker_proxy.cut()
    await wait_until(lambda: done_with(signals, 10), AMPLE_SECONDS, "redelivery")
    assert await applied(effects) == ids
    assert counted(signals, "consumer_dedup_hits_total") == 5


async def test_a_forgotten_consumer_reconnects(
    broker_proxy: Proxy,
    rabbitmq_url: str,
    channel: AbstractChannel,
    effects: Effects,
    consume: Callable[..., Awaitable[RabbitSubscription]],
) -> None:
    """The queue was deleted, the notice of it lost, and the queue declared again without the consumer."""
    cancellation = Eat(amqp.CANCELLATION)
    subscription = await consume()
    broker_proxy.arm(cancellation)
    await channel.queue_delete(QUEUE)
    await wait_until(lambda: broker_proxy.struck[cancellation], AMPLE_SECONDS, "notice")
    assert subscription.connected
    ids = await send(rabbitmq_url, 3)
    await effects.arrive(3)
    assert await applied(effects) == ids


async def test_a_silent_connection_is_replaced(
    broker_proxy: Proxy, rabbitmq_url: str, effects: Effects, consume: Callable[..., Awaitable[RabbitSubscription]]
) -> None:
    """A connection on which nothing arrives any more is replaced."""
    await consume()
    broker_proxy.arm(Lose(amqp.DELIVERY, silent=True, times=1))
    ids = await send(rabbitmq_url, 3)
    await effects.arrive(3)
    assert await applied(effects) == ids


async def test_a_deleted_binding_is_restored(
    broker_proxy: Proxy,
    channel: AbstractChannel,
    effects: Effects,
    consume: Callable[..., Awaitable[RabbitSubscription]],
) -> None:
    """Another queue gets the events too, so none is returned."""
    await consume()
    queue, exchange = await channel.get_queue(QUEUE), await channel.get_exchange(EXCHANGE, ensure=False)

    async def returned() -> bool:
        sent = event()
        message = aio_pika.Message(sent.body(), headers=dict(sent.headers()))
        return isinstance(await exchange.publish(message, sent.routing_key), DeliveredMessage)

    async def nobody_takes_them() -> bool:
        await queue.unbind(EXCHANGE, "order.placed")
        return await returned()

    async def takes_effect() -> bool:
        assert not await returned()
        return bool(await effects.committed())

    broker_proxy.arm(Blackhole())  # until it is clear that the binding is gone, no declaration restores it
    await wait_until(nobody_takes_them, AMPLE_SECONDS, "end of the binding")
    await listen(channel)
    broker_proxy.disarm()
    await wait_until(takes_effect, AMPLE_SECONDS, "effect")


async def test_a_blocked_dead_letter_delays_no_other_ack(
    broker_proxy: Proxy,
    rabbitmq_url: str,
    channel: AbstractChannel,
    effects: Effects,
    consume: Callable[..., Awaitable[RabbitSubscription]],
) -> None:
    """An alarm blocks the connection that publishes; thirty messages are three times the prefetch."""
    signals, block = Observed(), Block(amqp.PUBLISHED)
    subscription = await consume(signals)
    broker_proxy.arm(block)
    exchange = await channel.get_exchange(EXCHANGE, ensure=False)
    await exchange.publish(aio_pika.Message(b"not JSON", message_id="unreadable"), ROUTING_KEYS[0])
    await wait_until(lambda: broker_proxy.struck[block], AMPLE_SECONDS, "a dead letter on its way")
    ids = await send(rabbitmq_url, 30)
    await effects.arrive(30)
    assert await applied(effects) == ids
    assert subscription.connected
    assert counted(signals, "dlq_messages_total") == 0
    broker_proxy.disarm()
    assert (await next_message(channel, DEAD_LETTER_QUEUE)).message_id == "unreadable"
    await wait_until(lambda: counted(signals, "dlq_messages_total") == 1, AMPLE_SECONDS, "acknowledgement")


async def test_an_older_dead_letter_queue_is_used_as_it_is(
    rabbitmq_url: str, consume: Callable[..., Awaitable[RabbitSubscription]], effects: Effects
) -> None:
    """A dead-letter queue with the arguments of an earlier release is used as it is."""
    async with await aio_pika.connect(rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(DEAD_LETTER_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        await consume()
        ids = await send(rabbitmq_url, 1)
        await effects.arrive(1)
        assert await applied(effects) == ids
