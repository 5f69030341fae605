"""Consuming from RabbitMQ: nothing is acknowledged before it took effect or was set aside, whatever breaks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
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
    """A handler that has its effect when it `may_end`; `begun`: how many messages it was given."""

    def __init__(self, effects: Effects) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()
        self._effects = effects

    async def __call__(self, conn: db.Connection, envelope: Envelope) -> None:
        self.begun += 1
        await self.may_end.wait()
        await self._effects(conn, envelope)


@contextlib.asynccontextmanager
async def consuming(url: str, consumer: Consumer, prefetch: int = 10) -> AsyncIterator[RabbitSubscription]:
    """Run a subscription; afterwards it is stopped, and what it has not acknowledged is in the queue again."""
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
    """Wait until exactly these have taken effect, each once."""
    expected = sorted(each.id for each in messages)

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
    messages = [event() for _ in range(50)]
    await transport.publish(messages)
    async with consuming(rabbitmq_url, effects.consumer()):
        await applied(effects, *messages)
    assert await take(channel, QUEUE) is None


async def test_a_message_that_was_sent_twice_takes_effect_once_and_both_copies_are_acknowledged(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    twice, last = event(), event()
    await transport.publish([twice])
    await transport.publish([twice])
    await transport.publish([last])
    async with consuming(rabbitmq_url, effects.consumer(), prefetch=1):
        await applied(effects, twice, last)
    assert await take(channel, QUEUE) is None


async def test_a_message_whose_handler_keeps_failing_is_set_aside_with_its_story(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
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
async def test_a_message_that_cannot_be_read_is_set_aside_and_the_next_one_takes_effect(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects, body: bytes, properties: dict[str, str]
) -> None:
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


async def test_a_message_of_a_type_that_nobody_handles_is_set_aside(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects
) -> None:
    stray = event(event_type=CONFIRMED)
    await send(channel, stray.body(), headers=dict(stray.headers()))
    async with consuming(rabbitmq_url, effects.consumer()):
        dead = await next_message(channel, DEAD_LETTER_QUEUE)
    assert dead.headers["x-reason"] == f"unknown type {CONFIRMED}"


async def test_a_message_that_cannot_be_set_aside_is_not_lost(
    rabbitmq_url: str, channel: AbstractChannel, effects: Effects
) -> None:
    async with consuming(rabbitmq_url, effects.consumer()) as subscription:
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
        await channel.queue_delete(DEAD_LETTER_QUEUE)
        await send(channel, b"not json", message_id="theirs")
        async with open_channel(rabbitmq_url) as fresh:
            assert (await next_message(fresh, DEAD_LETTER_QUEUE)).body == b"not json"


async def test_a_dead_letter_that_is_sent_again_takes_effect_once_when_its_cause_is_gone(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    effects.failure, sent = ValueError("no such thing"), event()
    await transport.publish([sent])
    async with consuming(rabbitmq_url, effects.consumer(max_attempts=1)):
        dead = await next_message(channel, DEAD_LETTER_QUEUE)
        effects.failure = None
        for _ in range(2):
            await send(channel, dead.body, headers=dead.headers, message_id=dead.message_id)
        await applied(effects, sent)


async def test_while_postgres_is_out_a_message_is_held_and_tried_again_without_going_back_to_the_queue(
    pool: db.Pool, rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    async def cut_off(conn: db.Connection, envelope: Envelope) -> None:
        await effects(conn, envelope)
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


async def test_a_message_held_while_postgres_is_out_goes_back_after_one_delivery_when_the_service_stops(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    async def cut_off(conn: db.Connection, envelope: Envelope) -> None:
        await effects(conn, envelope)
        await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    sent, consumer = event(), effects.consumer()
    consumer.handlers = {PLACED: cut_off}
    await transport.publish([sent])
    async with consuming(rabbitmq_url, consumer):
        await wait_until(lambda: effects.calls >= 2, AMPLE_SECONDS, "second try")
    back = await next_message(channel, QUEUE)
    assert (back.message_id, back.redelivered) == (str(sent.id), True)
    assert back.headers.get("x-delivery-count", 0) in {0, 1}


async def test_no_more_messages_are_held_at_a_time_than_the_prefetch(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    messages, consumer, held = [event() for _ in range(5)], effects.consumer(), Held(effects)
    consumer.handlers = {PLACED: held}
    await transport.publish(messages)
    async with consuming(rabbitmq_url, consumer, prefetch=2):
        await wait_until(lambda: held.begun == 2, AMPLE_SECONDS, "two messages under way")
        queue = await channel.declare_queue(QUEUE, passive=True)
        assert queue.declaration_result.message_count == 3
        assert held.begun == 2
        held.may_end.set()
        await applied(effects, *messages)


async def test_stopping_lets_the_message_under_way_take_effect_and_be_acknowledged(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    sent, consumer, held = event(), effects.consumer(), Held(effects)
    consumer.handlers = {PLACED: held}
    await transport.publish([sent])
    async with consuming(rabbitmq_url, consumer) as subscription:
        await wait_until(lambda: held.begun, AMPLE_SECONDS, "a message under way")
        subscription.stop()
        held.may_end.set()
    assert await effects.committed() == [sent.id]
    assert await take(channel, QUEUE) is None


async def test_stopping_takes_no_further_message_which_then_goes_to_another_consumer_as_new(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
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


async def test_it_is_connected_when_the_broker_knows_it_until_it_is_stopped(
    rabbitmq_url: str, effects: Effects
) -> None:
    assert not RabbitSubscription(rabbitmq_url, effects.consumer(), SAGA_QUEUE, 1).connected
    async with consuming(rabbitmq_url, effects.consumer()) as subscription:
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
    assert not subscription.connected


async def test_a_queue_that_was_deleted_is_restored_and_consumed_again(
    rabbitmq_url: str, channel: AbstractChannel, transport: RabbitPublisher, effects: Effects
) -> None:
    sent = event()
    async with consuming(rabbitmq_url, effects.consumer()) as subscription:
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
        await channel.queue_delete(QUEUE)
        await wait_until(lambda: not subscription.connected, AMPLE_SECONDS, "notice of the deletion")
        await wait_until(lambda: subscription.connected, AMPLE_SECONDS, "connection")
        assert await transport.publish([sent]) == [None]
        await applied(effects, sent)


async def test_a_broker_that_was_killed_is_used_again_as_soon_as_it_is_back_and_loses_nothing(
    server_directory: Path, effects: Effects
) -> None:
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
    """Publish as the relay would: again and again, until it is confirmed."""

    async def confirmed() -> bool:
        with contextlib.suppress(BrokerUnavailable):
            return await transport.publish([message]) == [None]
        return False

    await wait_until(confirmed, AMPLE_SECONDS, "confirm")
