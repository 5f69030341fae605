"""Consuming from RabbitMQ: a message is acknowledged only after it took effect or was dead-lettered."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from app import db
from app.errors import BrokerUnavailable
from app.messaging.consumer import Consumer
from app.messaging.envelope import Envelope
from app.messaging.rabbitmq.publisher import RabbitPublisher
from app.messaging.rabbitmq.subscription import RabbitSubscription
from app.messaging.topology import EXCHANGE
from tests.harness import servers
from tests.harness.events import CONFIRMED, PLACED, Effects, event
from tests.harness.messages import next_message, open_channel, publishing, take
from tests.harness.queues import DEAD_LETTER_QUEUE, QUEUE, SAGA_QUEUE
from tests.harness.wait import AMPLE_SECONDS, wait_until


class Held:
    """A handler that waits for `may_end`, then has its effect. `begun`: how many messages it got."""

    def __init__(self, effects: Effects) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()
        self._effects = effects

    async def __call__(self, conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        self.begun += len(envelopes)
        await self.may_end.wait()
        await self._effects(conn, envelopes)


@contextlib.asynccontextmanager
async def consuming(url: str, consumer: Consumer, prefetch: int = 10) -> AsyncIterator[RabbitSubscription]:
    """Run a subscription, then stop it, which returns unacknowledged messages to the queue."""
    subscription = RabbitSubscription(url, consumer, SAGA_QUEUE, prefetch)
    task = asyncio.create_task(subscription.run())
    try:
        yield subscription
    finally:
        subscription.stop()
        await task


@pytest.fixture
async def transport(rabbitmq_url: str) -> AsyncIterator[RabbitPublisher]:
    async with publishing(rabbitmq_url) as transport:
        yield transport


async def applied(effects: Effects, *messages: Envelope) -> None:
    """Wait until exactly these messages have taken effect, once each."""
    expected = sorted(message.id for message in messages)

    async def done() -> bool:
        return len(await effects.committed()) >= len(expected)

    await wait_until(done, AMPLE_SECONDS, f"effect of {len(expected)} messages")
    assert sorted(await effects.committed()) == expected


async def send(channel: AbstractChannel, body: bytes, **properties: Any) -> None:
    exchange = await channel.get_exchange(EXCHANGE, ensure=False)
    await exchange.publish(aio_pika.Message(body, **properties), "order.placed")


async def test_messages_take_effect_and_are_acknowledged(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """Every message takes effect and is acknowledged."""
    messages = [event() for _ in range(50)]
    await transport.publish(messages)
    async with consuming(rabbitmq_url, effects.consumer()):
        await applied(effects, *messages)
    assert await take(channel, QUEUE) is None


async def test_a_message_sent_twice_takes_effect_once(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """A message that was sent twice takes effect once, and both copies are acknowledged."""
    twice, last = event(), event()
    await transport.publish([twice])
    await transport.publish([twice])
    await transport.publish([last])
    async with consuming(rabbitmq_url, effects.consumer(), prefetch=1):
        await applied(effects, twice, last)
    assert await take(channel, QUEUE) is None


async def test_a_failing_message_is_dead_lettered(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """A message whose handler keeps failing is dead-lettered with its failures in headers."""
    effects.failure, sent, before = ValueError("no such thing"), event(), datetime.now(UTC)
    await transport.publish([sent])
    async with consuming(rabbitmq_url, effects.consumer(max_attempts=3)):
        dead = await next_message(channel, DEAD_LETTER_QUEUE)
    assert (dead.message_id, dead.type, dead.body) == (str(sent.id), PLACED, sent.body())
    assert dead.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert sent.headers().items() <= dead.headers.items()
    assert (dead.headers["x-reason"], dead.headers["x-attempts"]) == ("ValueError: no such thing", 3)
    first, last = (datetime.fromisoformat(str(dead.headers[f"x-{which}-failure-at"])) for which in ("first", "last"))
    assert before <= first < last <= datetime.now(UTC)
    assert await take(channel, QUEUE) is None
    assert await effects.committed() == []


@pytest.mark.parametrize("body", [b"not json", b"[" * 100_000, b"{}"], ids=["text", "deeply nested", "no attributes"])
@pytest.mark.parametrize("properties", [{}, {"message_id": "theirs"}], ids=["no id", "an id"])
async def test_an_unreadable_message_is_dead_lettered(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects, body: bytes, properties: dict[str, str]
) -> None:
    """An unreadable message is dead-lettered, and the next one takes effect."""
    fine = event()
    await send(channel, body, **properties)
    await send(channel, fine.body(), headers=dict(fine.headers()))
    async with consuming(rabbitmq_url, effects.consumer(), prefetch=1):
        dead = await next_message(channel, DEAD_LETTER_QUEUE)
        await applied(effects, fine)
    assert dead.body == body
    assert str(dead.headers["x-reason"]).startswith("unreadable: ")
    assert dead.headers["x-attempts"] == 1
    assert dead.headers["x-first-failure-at"] == dead.headers["x-last-failure-at"]
    assert await take(channel, QUEUE) is None


async def test_a_message_of_an_unknown_type_is_dead_lettered(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects
) -> None:
    """A message of a type without a handler is dead-lettered."""
    stray = event(event_type=CONFIRMED)
    await send(channel, stray.body(), headers=dict(stray.headers()))
    async with consuming(rabbitmq_url, effects.consumer()):
        dead = await next_message(channel, DEAD_LETTER_QUEUE)
    assert dead.headers["x-reason"] == f"unknown type {CONFIRMED}"


async def test_a_failed_dead_letter_publish_loses_nothing(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects
) -> None:
    """If the dead letter cannot be published, the message is kept, and dead-lettered later."""
    async with consuming(rabbitmq_url, effects.consumer()) as subscription:
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
        await channel.queue_delete(DEAD_LETTER_QUEUE)
        await send(channel, b"not json", message_id="theirs")
        async with open_channel(rabbitmq_url) as fresh:
            assert (await next_message(fresh, DEAD_LETTER_QUEUE)).body == b"not json"


async def test_a_republished_dead_letter_takes_effect_once(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """A dead letter that is sent again after its cause was fixed takes effect once."""
    effects.failure, sent = ValueError("no such thing"), event()
    await transport.publish([sent])
    async with consuming(rabbitmq_url, effects.consumer(max_attempts=1)):
        dead = await next_message(channel, DEAD_LETTER_QUEUE)
        effects.failure = None
        for _ in range(2):
            await send(channel, dead.body, headers=dead.headers, message_id=dead.message_id)
        await applied(effects, sent)


async def test_a_message_is_held_while_postgres_is_down(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """The subscription holds the message and retries; it does not return to the queue."""

    async def cut_off(conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        await effects(conn, envelopes)
        if effects.calls < 3:
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    sent, consumer = event(), effects.consumer(max_attempts=1)
    consumer.handlers = {PLACED: cut_off}
    await transport.publish([sent])
    async with consuming(rabbitmq_url, consumer) as subscription:
        await wait_until(lambda: effects.calls >= 2, AMPLE_SECONDS, "second try")
        assert subscription.connected
        assert await take(channel, QUEUE) is None
        await applied(effects, sent)
    assert effects.calls == 3
    assert await take(channel, QUEUE) is None
    async with db.connection(pool) as conn:
        assert await conn.fetchval("SELECT attempts FROM inbox") == 0


async def test_stopping_returns_a_held_message(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """A message held while Postgres is down returns to the queue, after one delivery, when the service stops."""

    async def cut_off(conn: db.Connection, envelopes: Sequence[Envelope]) -> None:
        await effects(conn, envelopes)
        await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    sent, consumer = event(), effects.consumer()
    consumer.handlers = {PLACED: cut_off}
    await transport.publish([sent])
    async with consuming(rabbitmq_url, consumer):
        await wait_until(lambda: effects.calls >= 2, AMPLE_SECONDS, "second try")
    back = await next_message(channel, QUEUE)
    assert (back.message_id, back.redelivered) == (str(sent.id), True)
    assert back.headers.get("x-delivery-count", 0) in {0, 1}


async def test_the_prefetch_limits_unacknowledged_messages(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """At most `prefetch` messages are unacknowledged at a time."""
    messages, consumer, held = [event() for _ in range(5)], effects.consumer(), Held(effects)
    consumer.handlers = {PLACED: held}
    await transport.publish(messages)
    async with consuming(rabbitmq_url, consumer, prefetch=2):

        async def others() -> bool:
            queue = await channel.declare_queue(QUEUE, passive=True)
            return queue.declaration_result.message_count == 3

        await wait_until(others, AMPLE_SECONDS, "two messages under way")
        assert held.begun <= 2
        held.may_end.set()
        await applied(effects, *messages)


async def test_stopping_finishes_messages_in_progress(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """A message in progress takes effect and is acknowledged before the subscription ends."""
    sent, consumer, held = event(), effects.consumer(), Held(effects)
    consumer.handlers = {PLACED: held}
    await transport.publish([sent])
    async with consuming(rabbitmq_url, consumer) as subscription:
        await wait_until(lambda: held.begun, AMPLE_SECONDS, "a message under way")
        subscription.stop()
        held.may_end.set()
    assert await effects.committed() == [sent.id]
    assert await take(channel, QUEUE) is None


async def test_stopping_leaves_other_messages_in_the_queue(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """After `stop`, further messages go to another consumer, not marked as redelivered."""
    under_way, waiting, consumer, held = event(), event(), effects.consumer(), Held(effects)
    consumer.handlers = {PLACED: held}
    await transport.publish([under_way])
    await transport.publish([waiting])
    async with consuming(rabbitmq_url, consumer, prefetch=1) as subscription:
        await wait_until(lambda: held.begun, AMPLE_SECONDS, "a message under way")
        subscription.stop()
        held.may_end.set()
    assert await effects.committed() == [under_way.id]
    left = await next_message(channel, QUEUE)
    assert (left.message_id, left.redelivered) == (str(waiting.id), False)


async def test_connected_means_known_to_the_broker(rabbitmq_url: str, effects: Effects) -> None:
    """`connected` is true once the broker knows the consumer, and false after `stop`."""
    assert not RabbitSubscription(rabbitmq_url, effects.consumer(), SAGA_QUEUE, 1).connected
    async with consuming(rabbitmq_url, effects.consumer()) as subscription:
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
    assert not subscription.connected


async def test_a_deleted_queue_is_restored(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    """A deleted queue is declared again and consumed."""
    sent = event()
    async with consuming(rabbitmq_url, effects.consumer()) as subscription:
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
        await channel.queue_delete(QUEUE)
        await wait_until(lambda: not subscription.connected, AMPLE_SECONDS, "notice of the deletion")
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
        assert await transport.publish([sent]) == [None]
        await applied(effects, sent)


async def test_a_killed_broker_loses_nothing(server_directory: Path, effects: Effects) -> None:
    """After a killed broker is back, consuming resumes, and no message is lost."""
    async with servers.rabbitmq(server_directory) as broker, publishing(broker.url()) as transport:
        before, waiting, after = event(), event(), event()
        async with consuming(broker.url(), effects.consumer()):
            await transport_works(transport, before)
            await applied(effects, before)
            await broker.sync()
        await transport.publish([waiting])
        async with consuming(broker.url(), effects.consumer()) as subscription:
            await applied(effects, before, waiting)
            await broker.kill()
            await wait_until(lambda: not subscription.connected, AMPLE_SECONDS, "notice of the end")
            with pytest.raises(BrokerUnavailable):
                await transport.publish([after])
            await broker.start()
            await transport_works(transport, after)
            await applied(effects, before, waiting, after)


async def transport_works(transport: RabbitPublisher, message: Envelope) -> None:
    """Publish repeatedly until it is confirmed, as the relay does."""

    async def confirmed() -> bool:
        with contextlib.suppress(BrokerUnavailable):
            return await transport.publish([message]) == [None]
        return False

    await wait_until(confirmed, AMPLE_SECONDS, "confirm")
