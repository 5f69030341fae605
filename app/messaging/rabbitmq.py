"""RabbitMQ: connecting, the topology, publishing with confirms. Consuming is `subscription`.

Publishing and consuming must not share a connection: a resource alarm blocks every connection that publishes. Both
declare the topology whenever they connect, so a broker that lost it gets it back. Connections are plain ones: a lost
one surfaces as an error, and the loop above decides when to connect again.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import UTC
from typing import cast

import aio_pika
import aiormq
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue, HeadersType
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelPreconditionFailed, DeliveryError, PublishError
from pamqp.common import FieldTable

from app.errors import BrokerUnavailable
from app.messaging.envelope import CONTENT_TYPE, Envelope
from app.messaging.relay import Refusal

log = structlog.get_logger(__name__)

EXCHANGE = "orders.events"
DEAD_LETTER_EXCHANGE = "orders.dlx"
QUEUE = "orders.saga"
DEAD_LETTER_QUEUE = "orders.saga.dlq"

CONNECT_SECONDS = 5
SETUP_SECONDS = 10  # a queue without a leader makes no answer, and declaring it again later may help
BURST = aiormq.Connection.FRAME_BUFFER_SIZE  # messages handed over at a time
HEARTBEAT_SECONDS = 15  # a peer that froze is given up after about twice this
# A backstop only: the consumer counts attempts itself, and never sends a message back. So in every version the broker
# counts how often a connection ended with the message unacknowledged: a crash, a restart, or half an hour of Postgres
# being out (the broker's `consumer_timeout`), which may each befall up to a prefetch of innocent messages too. Until
# RabbitMQ 4.2 every return counts, from 4.3 failures only, of which the end of a connection is one. Said explicitly,
# because 3.x has no limit by default and 4.x has 20, which a crash loop reaches within minutes.
# Source: RabbitMQ's manual, "Quorum Queues", poison message handling; release notes of 4.0.
DELIVERY_LIMIT = 100
# None, in the one spelling that every release understands: left out, 4.x takes 20 and then drops the dead letter, which
# has nowhere else to go; -1 means none to 4.x, and to 3.10 that a message is dropped when it is first given back.
DEAD_LETTER_DELIVERY_LIMIT = 2**31 - 1


async def connect(url: str, name: str) -> AbstractConnection:
    """Connect once. Raises BrokerUnavailable."""
    try:
        return await aio_pika.connect(
            url,
            timeout=CONNECT_SECONDS,
            heartbeat=HEARTBEAT_SECONDS,
            client_properties={"connection_name": name},
        )
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        raise unavailable(error) from error


async def declare_topology(
    connection: AbstractConnection, channel: AbstractChannel, routing_keys: Collection[str]
) -> AbstractQueue:
    """Declare exchanges, queues and bindings; all durable, the queues replicated where there is a cluster."""
    events = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    dead_letters = await channel.declare_exchange(DEAD_LETTER_EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)
    await _declare_dead_letter_queue(connection)
    dlq = await channel.get_queue(DEAD_LETTER_QUEUE, ensure=False)
    await dlq.bind(dead_letters, QUEUE)
    queue = await channel.declare_queue(
        QUEUE,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-dead-letter-exchange": DEAD_LETTER_EXCHANGE,
            "x-dead-letter-routing-key": QUEUE,
        },
    )
    for routing_key in routing_keys:
        await queue.bind(events, routing_key)
    return queue


async def _declare_dead_letter_queue(connection: AbstractConnection) -> None:
    """Declare it, on a channel of its own, which a refusal closes: one with other arguments is taken as it is.

    A queue's arguments cannot be changed, and a release before this one gave it no limit. Nothing may depend on it.
    """
    arguments: FieldTable = {"x-queue-type": "quorum", "x-delivery-limit": DEAD_LETTER_DELIVERY_LIMIT}
    try:
        async with connection.channel() as channel:
            await channel.declare_queue(DEAD_LETTER_QUEUE, durable=True, arguments=arguments)
    except ChannelPreconditionFailed as error:
        log.info("rabbitmq.other_arguments", queue=DEAD_LETTER_QUEUE, error=str(error))


def unavailable(error: BaseException) -> BrokerUnavailable:
    """Say in our own terms that the broker cannot be used."""
    return BrokerUnavailable(f"rabbitmq: {type(error).__name__}: {error}".strip(": "))


class RabbitTransport:
    """Publishes batches: all messages at once over one channel, then all confirms together."""

    def __init__(
        self, url: str, consumed_types: Collection[str], routing_keys: Collection[str], timeout_seconds: float
    ) -> None:
        self._url = url
        self._consumed_types = frozenset(consumed_types)
        self._routing_keys = routing_keys
        self._timeout_seconds = timeout_seconds
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._declared = False
        self._outage: BrokerUnavailable | None = None

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Refusal | None]:
        """Publish and wait for every confirm. Raises BrokerUnavailable when not all came in time.

        The deadline covers connecting too and is shorter than the rows' lease. Past it the connection is closed, so
        that nothing of this batch can still be sent after another relay has claimed its rows. Not so a blocked one: the
        broker has what was sent, unread, and will read it even after a close; another connection would only leave it
        another copy of a batch. It is kept, and nothing more is sent on it before it is unblocked.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                refusals = await self._publish_all(await self._open(), envelopes)
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            self._outage = unavailable(error)
            if not (isinstance(error, TimeoutError) and await _is_blocked(self._connection)):
                await self.close()
            raise self._outage from error
        self._outage = None
        if any(refusal and refusal.returned for refusal in refusals):
            self._declared = False  # a queue or a binding is gone: the next batch finds it declared again
        return refusals

    async def check(self) -> None:
        """Raise BrokerUnavailable if the last batch was not confirmed, and another would not be now."""
        if self._outage is None:
            return
        if self._connection is not None:  # kept because it is blocked
            if await _is_blocked(self._connection):
                raise self._outage
        else:
            await close(await connect(self._url, "orders readiness"))

    async def close(self) -> None:
        """Close the connection, if there is one; an answer from the other side is not waited for long."""
        connection, self._connection, self._channel = self._connection, None, None
        await close(connection)

    async def _open(self) -> aiormq.Channel:
        if self._connection is None or self._channel is None:
            self._connection = await connect(self._url, "orders relay")
            # Without on_return_raises a message that no queue took would look like a confirmed one.
            self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            self._declared = False
        await unblocked(self._connection)
        if not self._declared:
            await declare_topology(self._connection, self._channel, self._routing_keys)
            self._declared = True
        return cast("aiormq.Channel", await self._channel.get_underlay_channel())

    async def _publish_all(self, channel: aiormq.Channel, envelopes: Sequence[Envelope]) -> list[Refusal | None]:
        """Send all, then await all confirms.

        Not by the exchange's `publish`: it keeps the channel until its message has left, three turns of the event loop
        for each message, one after the other, so that a busy process would need seconds for a batch and take that for
        an outage. A burst that fits into the buffer is handed over in one turn and leaves in the next.
        """
        sent: list[asyncio.Task[Refusal | None]] = []
        try:
            for envelope in envelopes:
                sent.append(asyncio.create_task(self._publish(channel, envelope)))
                if len(sent) % BURST == 0:
                    await asyncio.sleep(0)  # the tasks run
                    await asyncio.sleep(0)  # the connection's writer runs
            return await asyncio.gather(*sent)
        finally:
            for task in sent:
                task.cancel()

    async def _publish(self, channel: aiormq.Channel, envelope: Envelope) -> Refusal | None:
        try:
            message = _message(envelope)
            await channel.basic_publish(
                message.body,
                exchange=EXCHANGE,
                routing_key=envelope.routing_key,
                properties=message.properties,
                mandatory=envelope.type in self._consumed_types,
                wait=False,
            )
        except PublishError:
            return Refusal(f"returned: no queue is bound for {envelope.routing_key}", returned=True)
        except DeliveryError:
            return Refusal("nacked by the broker")
        except (ValueError, TypeError) as error:  # one such row must not hold up the others
            return Refusal(f"cannot be written: {error}", final=True)
        return None


def _message(envelope: Envelope) -> aio_pika.Message:
    return aio_pika.Message(
        envelope.body(),
        headers=dict(envelope.headers()),
        content_type=CONTENT_TYPE,
        message_id=str(envelope.id),
        type=envelope.type,
        timestamp=envelope.time.astimezone(UTC),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )


def copied(message: AbstractIncomingMessage, headers: HeadersType) -> aio_pika.Message:
    """Return a persistent message like the one that came in, with these headers, to be published in its stead."""
    return aio_pika.Message(
        message.body,
        headers=headers,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        message_id=message.message_id,
        type=message.type,
        timestamp=message.timestamp,
        app_id=message.app_id,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )


async def unblocked(connection: AbstractConnection) -> None:
    """Wait until the broker takes messages on this connection: `connection.blocked` says that it does not."""
    if connection.transport is not None:
        await connection.transport.connection.ready()


async def _is_blocked(connection: AbstractConnection | None) -> bool:
    if connection is None or connection.transport is None or connection.transport.connection.is_closed:
        return False
    try:
        async with asyncio.timeout(0):  # nothing to wait for, no time needed
            await unblocked(connection)
    except TimeoutError:
        return True
    return False


async def close(connection: AbstractConnection | None) -> None:
    """Close without waiting long for the other side, which may be gone or frozen."""
    if connection is None:
        return
    try:
        async with asyncio.timeout(1):
            await connection.close()
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        log.info("rabbitmq.closed_hard", error=str(error))
