"""RabbitMQ: connecting, the topology, publishing with confirms. Consuming is `subscription`.

Publishing and consuming must not share a connection: a resource alarm blocks every connection that publishes. Both
declare the topology whenever they connect, so a broker that lost it gets it back. Connections are plain ones: a lost
one surfaces as an error, and the loop above decides when to connect again.
"""

import asyncio
import math
import re
from collections.abc import Collection, Sequence
from typing import cast

import aio_pika
import aiormq
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue, HeadersType
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelPreconditionFailed
from aiormq.exceptions import ChannelAccessRefused
from pamqp.common import FieldTable

from app.errors import BrokerUnavailable
from app.messaging.envelope import UNDECODABLE, Envelope
from app.messaging.rabbitmq.batch import Batch, ConfirmsLate
from app.messaging.rabbitmq.connection import AmqpConnection
from app.messaging.rabbitmq.undecodable import encodable, fitting
from app.messaging.relay import UNCONFIRMED, Answer, Refusal

log = structlog.get_logger(__name__)

EXCHANGE = "orders.events"
DEAD_LETTER_EXCHANGE = "orders.dlx"
QUEUE = "orders.saga"
DEAD_LETTER_QUEUE = "orders.saga.dlq"

ACCESS = re.compile(r"access to (\w+) '([^']*)'")
INEQUIVALENT = re.compile(r"inequivalent arg '([^']*)' for (\w+) '([^']*)'")

# CC and BCC ask the broker to send the copy to other queues, too, and it refuses a copy in which they are no list.
NOT_COPIED = frozenset({UNDECODABLE, "CC", "BCC"})
DEFAULT_FRAME_BYTES = 128 * 1024  # RabbitMQ's
HEADER_FRAME_BYTES = 64  # of a frame with headers, at most: what is around the properties, an empty table, a priority

CONNECT_SECONDS = 5
SETUP_SECONDS = 10  # a queue without a leader makes no answer, and declaring it again later may help
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


async def connect(url: str, name: str) -> AmqpConnection:
    """Connect once. Raises BrokerUnavailable."""
    try:
        return await aio_pika.connect(
            url,
            timeout=CONNECT_SECONDS,
            heartbeat=HEARTBEAT_SECONDS,
            client_properties={"connection_name": name},
            connection_class=AmqpConnection,
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
    return BrokerUnavailable(f"rabbitmq: {type(error).__name__}: {error}".strip(": "), _refusal(error))


def _refusal(error: BaseException) -> str | None:
    """Say what is wrong with the broker to an operator who sees only readiness: without its user and its vhost."""
    match error:
        case ConfirmsLate():
            return "the last batch was not confirmed in time"
        case ChannelAccessRefused() if found := ACCESS.search(str(error)):
            return "the broker refuses access to {} {}: a right is missing".format(*found.groups())
        case ChannelPreconditionFailed() if found := INEQUIVALENT.search(str(error)):
            return "{1} {2} exists with another {0}".format(*found.groups())
    return None


class RabbitTransport:
    """Publishes batches over one channel of one connection, which it opens again when it is lost."""

    def __init__(
        self, url: str, consumed_types: Collection[str], routing_keys: Collection[str], patience_seconds: float
    ) -> None:
        self._url = url
        self._consumed_types = frozenset(consumed_types)
        self._routing_keys = routing_keys
        self._patience_seconds = patience_seconds
        self._connection: AmqpConnection | None = None
        self._channel: AbstractChannel | None = None
        self._declared = False

    @property
    def connected(self) -> bool:
        """Whether connection and channel are open, as far as this side knows."""
        if self._connection is None or self._channel is None:
            return False
        return self._connection.connected.is_set() and not self._channel.is_closed

    async def ready(self) -> None:
        """Connect and declare the topology unless that is done, and wait while the broker blocks publishing.

        Connecting has `CONNECT_SECONDS`, the rest `SETUP_SECONDS`: some fifteen round trips in all.
        """
        await self._open_channel()

    async def _open_channel(self) -> aiormq.Channel:
        try:
            if not self.connected:
                await self._connect()
            await self._wait_until_unblocked()
            if not self._declared:
                await self._declare()
            return cast("aiormq.Channel", await cast("AbstractChannel", self._channel).get_underlay_channel())
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            await self.close()
            raise unavailable(error) from error

    async def publish(self, envelopes: Sequence[Envelope], seconds: float = math.inf) -> list[Answer]:
        """Publish what there is time for. Raises BrokerUnavailable when nothing is known of any message.

        When no confirm has come for `patience_seconds`, or when the time is up, the connection is reset, so that
        nothing of this batch is still sent after another relay may have claimed its rows. A blocked connection is kept:
        the broker has what was sent, unread, and will read it even after a close, and another connection would only
        give it another copy of a batch. Nothing more is sent on it before it is unblocked.
        """
        began_at = asyncio.get_running_loop().time()
        channel = await self._open_channel()
        batch = Batch(channel, EXCHANGE, envelopes, self._consumed_types, self._patience_seconds)
        try:
            await batch.publish(began_at, seconds)
        except asyncio.CancelledError:
            await self._reset()
            raise
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            if not (isinstance(error, TimeoutError) and await _is_blocked(self._connection)):
                await self._reset()
            unconfirmed = batch.answers.count(UNCONFIRMED)
            if unconfirmed == len(envelopes):
                raise unavailable(error) from error
            log.warning("relay.cut_short", unconfirmed=unconfirmed, of=len(envelopes), error=str(unavailable(error)))
        if any(isinstance(answer, Refusal) and answer.returned for answer in batch.answers):
            self._declared = False  # a queue or a binding is gone: the next batch finds it declared again
        return batch.answers

    async def close(self) -> None:
        """Close the connection, if there is one; an answer from the other side is not waited for long."""
        connection, self._connection, self._channel = self._connection, None, None
        await close(connection)

    async def _connect(self) -> None:
        await self.close()
        self._connection = await connect(self._url, "orders relay")
        async with asyncio.timeout(SETUP_SECONDS):
            # Without on_return_raises a message that no queue took would look like a confirmed one.
            self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._declared = False

    async def _wait_until_unblocked(self) -> None:
        if not await _is_blocked(self._connection):
            return
        try:
            async with asyncio.timeout(self._patience_seconds):
                await unblocked(cast("AbstractConnection", self._connection))
        except TimeoutError:
            text = "the broker blocks publishing: an alarm of memory or disk"
            raise BrokerUnavailable(f"rabbitmq: {text}", text) from None

    async def _declare(self) -> None:
        async with asyncio.timeout(SETUP_SECONDS):
            connection, channel = cast("AbstractConnection", self._connection), cast("AbstractChannel", self._channel)
            await declare_topology(connection, channel, self._routing_keys)
        self._declared = True

    async def _reset(self) -> None:
        if self._connection is not None:
            self._connection.reset()
        await self.close()


def copied(
    message: AbstractIncomingMessage, headers: HeadersType, frame_bytes: int, story: HeadersType | None = None
) -> aio_pika.Message:
    """Return a persistent message like the one that came in, with these headers and `story`, to be published instead.

    The broker closes a connection that sends headers larger than a frame, so headers make room for the story.
    """
    copy = aio_pika.Message(
        message.body,
        headers=dict(story or {}),
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
    sent = encodable({name: value for name, value in headers.items() if name not in NOT_COPIED})
    kept = fitting(sent, frame_bytes - HEADER_FRAME_BYTES - len(copy.properties.marshal()))
    if len(kept) < len(sent):
        log.warning("rabbitmq.headers_left_out", message_id=message.message_id, left_out=len(sent) - len(kept))
    copy.headers = {**kept, **copy.headers}
    return copy


def frame_limit(message: AbstractIncomingMessage) -> int:
    """Return how many bytes a frame may have on the connection of this message; the broker says 0 for no limit."""
    return message.channel.connection.connection_tune.frame_max or DEFAULT_FRAME_BYTES


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
