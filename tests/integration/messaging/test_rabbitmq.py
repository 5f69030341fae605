"""Publishing to RabbitMQ: confirmed and durable, with the event's id. Refusals and outages are told apart."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aio_pika
import pytest
import yarl
from aio_pika.abc import AbstractChannel

from app import db
from app.errors import BrokerUnavailable
from app.messaging.envelope import Envelope, parse
from app.messaging.rabbitmq.publisher import RabbitPublisher
from app.messaging.relay import Refusal
from app.messaging.topology import EXCHANGE
from tests.harness.dead_letters import holds
from tests.harness.events import CONFIRMED, PLACED, counted, event, put
from tests.harness.messages import listen, open_channel, publishing, take
from tests.harness.observed import Observed
from tests.harness.queues import QUEUE, ROUTING_KEYS
from tests.harness.relays import make_relay

LONG_SECONDS = 30.0


@pytest.fixture
async def transport(rabbitmq_url: str) -> AsyncIterator[RabbitPublisher]:
    async with publishing(rabbitmq_url) as transport:
        yield transport


async def test_a_message_is_persistent_and_has_its_attributes(
    transport: RabbitPublisher, channel: AbstractChannel
) -> None:
    """A message has its id, its attributes, and persistent delivery."""
    heard = await listen(channel)
    sent = event(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert await transport.publish([sent]) == [None]
    message = await heard.get(no_ack=True)
    assert (message.exchange, message.routing_key) == ("orders.events", "order.placed")
    assert (message.message_id, message.type) == (str(sent.id), PLACED)
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert message.content_type == "application/json"
    assert message.timestamp == sent.time.replace(microsecond=0)
    assert message.headers == sent.headers()
    assert parse(message.headers, message.body) == sent


async def test_a_resent_message_has_the_same_id(transport: RabbitPublisher, channel: AbstractChannel) -> None:
    """A message that is sent again has the same id."""
    heard, sent = await listen(channel), event()
    assert [await transport.publish([sent]) for _ in range(2)] == [[None], [None]]
    assert {(await heard.get(no_ack=True)).message_id for _ in range(2)} == {str(sent.id)}


async def test_only_placed_orders_reach_the_saga_queue(transport: RabbitPublisher, channel: AbstractChannel) -> None:
    """The saga's queue gets `order.placed`, and no other event."""
    placed, confirmed = event(), event(event_type=CONFIRMED)
    assert await transport.publish([confirmed, placed]) == [None, None]
    message = await take(channel, QUEUE)
    assert message is not None
    assert message.message_id == str(placed.id)
    assert await take(channel, QUEUE) is None


async def test_a_large_batch_is_confirmed(transport: RabbitPublisher, channel: AbstractChannel) -> None:
    """Every message of a large batch is confirmed."""
    heard, batch = await listen(channel), [event() for _ in range(500)]
    assert await transport.publish(batch) == [None] * 500
    assert {(await heard.get(no_ack=True)).message_id for _ in batch} == {str(envelope.id) for envelope in batch}


async def test_a_batch_needs_few_iterations_of_the_event_loop(transport: RabbitPublisher, rabbitmq_url: str) -> None:
    """Otherwise a busy process would take seconds for a batch, and mistake that for an outage."""
    assert await transport.publish([]) == []  # connects
    events = [event() for _ in range(200)]
    batch = asyncio.create_task(transport.publish(events))
    for _ in range(150):
        await asyncio.sleep(0)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, arrived(rabbitmq_url, 200)).result()
    assert await batch == [None] * 200


async def arrived(url: str, number: int) -> None:
    async with open_channel(url) as channel:
        await holds(channel, number, QUEUE)


async def unbind(url: str, transport: RabbitPublisher) -> None:
    """Remove the queue's binding after the transport has declared it."""
    await transport.ready()
    async with await aio_pika.connect(url) as connection:
        queue = await (await connection.channel()).get_queue(QUEUE)
        await queue.unbind(EXCHANGE, ROUTING_KEYS[0])


async def test_an_unroutable_message_is_returned(rabbitmq_url: str) -> None:
    """A message with a consumer is returned when no queue is bound for it."""
    async with publishing(rabbitmq_url) as transport:
        await unbind(rabbitmq_url, transport)
        returned, nobodys = await transport.publish([event(), event(event_type=CONFIRMED)])
    assert returned == Refusal("returned: no queue is bound for order.placed", returned=True)
    assert nobodys is None


async def test_a_full_queue_refuses_its_message_only(transport: RabbitPublisher, channel: AbstractChannel) -> None:
    """A message for a full queue is refused, and no other."""
    await listen(channel, "order.confirmed", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    assert await transport.publish([event(event_type=CONFIRMED)]) == [None]
    answers = await transport.publish([event(event_type=CONFIRMED), event()])
    assert answers == [Refusal("nacked by the broker"), None]


@pytest.mark.parametrize(
    "poison",
    [
        event(event_type="orders.order." + "x" * 300 + ".v1"),  # AMQP's short strings end at 255 bytes
        event(data={"total": object()}),
    ],
    ids=["long type", "not JSON"],
)
async def test_a_message_that_cannot_be_encoded_is_refused(
    transport: RabbitPublisher, channel: AbstractChannel, poison: Envelope
) -> None:
    """Its refusal is final, and no other message is refused."""
    heard, fine = await listen(channel), event()
    refused, confirmed = await transport.publish([poison, fine])
    assert isinstance(refused, Refusal)
    assert (refused.final, refused.reason.startswith("cannot be written: ")) == (True, True)
    assert confirmed is None
    assert (await heard.get(no_ack=True)).message_id == str(fine.id)


@pytest.mark.parametrize("wrong", [{"port": 1}, {"password": "wrong"}, {"path": "/no-such-vhost"}], ids=str)
async def test_an_unusable_broker_is_unavailable(rabbitmq_url: str, wrong: dict[str, Any]) -> None:
    """A wrong port, password or vhost raises BrokerUnavailable."""
    url = yarl.URL(rabbitmq_url)
    for part, value in wrong.items():
        url = getattr(url, f"with_{part}")(value)
    async with publishing(str(url)) as transport:
        with pytest.raises(BrokerUnavailable):
            await transport.publish([event()])


async def test_a_silent_broker_is_unavailable_in_time() -> None:
    """A broker that does not answer raises BrokerUnavailable within the time limit."""

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        url = f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with publishing(url, patience_seconds=0.2) as transport:
            with pytest.raises(BrokerUnavailable):
                await transport.publish([event()])
        for writer in writers:
            writer.close()


async def test_a_deleted_exchange_is_restored(transport: RabbitPublisher, channel: AbstractChannel) -> None:
    """A deleted exchange fails one batch, and is declared again before the next."""
    await transport.publish([event()])
    await channel.exchange_delete(EXCHANGE)
    with pytest.raises(BrokerUnavailable):
        await transport.publish([event(), event()])
    assert await transport.publish([event()]) == [None]


async def test_closing_twice_or_unconnected_is_allowed(free_port: int) -> None:
    """Closing twice, or without a connection, does nothing."""
    transport = RabbitPublisher(f"amqp://127.0.0.1:{free_port}/", (), LONG_SECONDS)
    await transport.close()
    await transport.close()


async def test_the_relay_parks_unroutable_messages_only(pool: db.Pool, rabbitmq_url: str) -> None:
    """The relay parks a message that is returned too often, and publishes the others."""
    signals, returned, fine = Observed(), event(), event(event_type=CONFIRMED)
    await put(pool, returned, fine)
    async with publishing(rabbitmq_url) as transport:
        await unbind(rabbitmq_url, transport)
        relay = make_relay(pool, transport, signals, batch_size=10, backoff_seconds=60, max_attempts=1)
        assert await relay.run_once() == 2
    async with db.connection(pool) as conn:
        parked = await conn.fetch("SELECT id, last_error FROM outbox WHERE parked_at IS NOT NULL")
        assert list(map(tuple, parked)) == [(returned.id, "returned: no queue is bound for order.placed")]
        assert await conn.fetchval("SELECT id FROM outbox WHERE published_at IS NOT NULL") == fine.id
    assert counted(signals, "outbox_returned_total") == 1
