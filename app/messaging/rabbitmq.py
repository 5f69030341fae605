"""RabbitMQ: the topology, publishing with confirms, consuming with acknowledgements; each on a connection of its own.

Publishing and consuming must not share a connection: a resource alarm blocks every connection that publishes. Both
declare the topology whenever they connect, so a broker that lost it gets it back. Connections are plain ones: a lost
one surfaces as an error, and the loop above decides when to connect again.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import UTC
from functools import partial

import aio_pika
import structlog
from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueue,
)
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, DeliveryError, PublishError

from app.errors import BrokerUnavailable, DatabaseUnavailable
from app.loops import Loop
from app.messaging.consumer import Consumer, Dead, Handled, Retry
from app.messaging.envelope import CONTENT_TYPE, Envelope, UnreadableMessage, parse
from app.messaging.relay import Refusal

log = structlog.get_logger(__name__)

EXCHANGE = "orders.events"
DEAD_LETTER_EXCHANGE = "orders.dlx"
QUEUE = "orders.saga"
DEAD_LETTER_QUEUE = "orders.saga.dlq"

CONNECT_SECONDS = 5
SETUP_SECONDS = 10  # a queue without a leader makes no answer, and declaring it again later may help
HEARTBEAT_SECONDS = 15  # a peer that froze is given up after about twice this
DELIVERY_LIMIT = 100  # a backstop only: the consumer counts attempts itself; a crash loop must not reach it
DATABASE_PAUSE_SECONDS = 1.0  # between tries while Postgres is out; the message stays with us, unacknowledged


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
        raise _unavailable(error) from error


async def declare_topology(channel: AbstractChannel, routing_keys: Collection[str]) -> AbstractQueue:
    """Declare exchanges, queues and bindings; all durable, the queues replicated where there is a cluster."""
    events = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    dead_letters = await channel.declare_exchange(DEAD_LETTER_EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)
    dlq = await channel.declare_queue(DEAD_LETTER_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
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


def _unavailable(error: BaseException) -> BrokerUnavailable:
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
        self._exchange: AbstractExchange | None = None

    async def publish(self, envelopes: Sequence[Envelope]) -> list[Refusal | None]:
        """Publish and wait for every confirm. Raises BrokerUnavailable when not all came in time.

        The deadline covers connecting too and is shorter than the rows' lease. Past it the connection is closed, so
        that nothing of this batch can still be sent after another relay has claimed its rows.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                exchange = await self._open()
                return await asyncio.gather(*(self._publish(exchange, envelope) for envelope in envelopes))
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            await self.close()
            raise _unavailable(error) from error

    async def close(self) -> None:
        """Close the connection, if there is one; an answer from the other side is not waited for long."""
        connection, self._connection, self._exchange = self._connection, None, None
        await close(connection)

    async def _open(self) -> AbstractExchange:
        if self._exchange is not None:
            return self._exchange
        self._connection = await connect(self._url, "orders relay")
        # Without on_return_raises a message that no queue took would look like a confirmed one.
        channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        await declare_topology(channel, self._routing_keys)
        self._exchange = await channel.get_exchange(EXCHANGE, ensure=False)
        return self._exchange

    async def _publish(self, exchange: AbstractExchange, envelope: Envelope) -> Refusal | None:
        mandatory = envelope.type in self._consumed_types
        try:
            await exchange.publish(_message(envelope), envelope.routing_key, mandatory=mandatory)
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


async def close(connection: AbstractConnection | None) -> None:
    """Close without waiting long for the other side, which may be gone or frozen."""
    if connection is None:
        return
    try:
        async with asyncio.timeout(1):
            await connection.close()
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        log.info("rabbitmq.closed_hard", error=str(error))


class Subscription:
    """Consumes the saga queue until `stop`, connecting again whenever the connection is lost."""

    def __init__(self, url: str, consumer: Consumer, routing_keys: Collection[str], prefetch: int) -> None:
        self._url = url
        self._consumer = consumer
        self._routing_keys = routing_keys
        self._prefetch = prefetch
        self._loop = Loop("consumer", self._consume, poll_seconds=0.1)
        self._ended = asyncio.Event()  # of the present connection: lost, or told to stop
        self._ended.set()
        self._stopping = False
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether it is consuming right now."""
        return not self._ended.is_set()

    async def run(self) -> None:
        """Consume until `stop`."""
        await self._loop.run()

    def stop(self) -> None:
        """Take no more messages; finish what is under way, then end."""
        self._stopping = True
        self._loop.stop()
        self._ended.set()

    async def _consume(self) -> int:
        connection = await connect(self._url, "orders consumer")
        try:
            async with asyncio.timeout(SETUP_SECONDS):
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                await channel.set_qos(prefetch_count=self._prefetch)
                queue = await declare_topology(channel, self._routing_keys)
            ended = self._ended = asyncio.Event()
            channel.close_callbacks.add(lambda *_: ended.set())
            # A queue that was deleted takes its consumers along and leaves connection and channel open: silence.
            underlay = await channel.get_underlay_channel()
            underlay.on_consumer_cancel_callbacks.add(lambda _: ended.set())
            if self._stopping:
                return 0
            tag = await queue.consume(partial(self._accept, channel, ended), timeout=SETUP_SECONDS)
            log.info("consumer.started", queue=QUEUE)
            await ended.wait()
            if self._stopping:
                await queue.cancel(tag)
                if self._under_way:
                    await asyncio.wait(self._under_way)
                return 0
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            raise _unavailable(error) from error
        finally:
            self._ended.set()
            await close(connection)
        raise BrokerUnavailable("rabbitmq: the connection was lost")

    async def _accept(self, channel: AbstractChannel, ended: asyncio.Event, message: AbstractIncomingMessage) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - bug: aio-pika runs each delivery in a task of its own
        self._under_way.add(task)
        try:
            await self._process(channel, ended, message)
        except Exception as error:  # noqa: BLE001 - the edge: unacknowledged means delivered again on a new connection
            log.warning("consumer.not_acknowledged", message_id=message.message_id, error=repr(error))
            ended.set()
        finally:
            self._under_way.discard(task)

    async def _process(self, channel: AbstractChannel, ended: asyncio.Event, message: AbstractIncomingMessage) -> None:
        """Handle one delivery to its end, or until the connection is gone (then it will be delivered again)."""
        try:
            envelope = parse(message.headers, message.body)
        except UnreadableMessage as error:
            await self._set_aside(channel, message, self._consumer.dead(f"unreadable: {error}"))
            return
        while True:
            try:
                verdict = await self._consumer.handle(envelope)
            except DatabaseUnavailable as error:
                log.warning("consumer.waiting", event_id=str(envelope.id), error=str(error))
                pause = DATABASE_PAUSE_SECONDS
            else:
                match verdict:
                    case Handled():
                        await message.ack()
                        return
                    case Dead():
                        await self._set_aside(channel, message, verdict)
                        return
                    case Retry(in_seconds=pause):
                        pass
            if await _is_set_within(ended, pause):
                return

    async def _set_aside(self, channel: AbstractChannel, message: AbstractIncomingMessage, dead: Dead) -> None:
        """Publish to the dead-letter exchange, confirmed, and only then acknowledge."""
        exchange = await channel.get_exchange(DEAD_LETTER_EXCHANGE, ensure=False)
        copy = aio_pika.Message(
            message.body,
            headers={
                **message.headers,
                "x-reason": dead.reason,
                "x-attempts": dead.attempts,
                "x-first-failure-at": dead.first_failure_at.isoformat(),
                "x-last-failure-at": dead.last_failure_at.isoformat(),
            },
            content_type=message.content_type,
            message_id=message.message_id,
            type=message.type,
            timestamp=message.timestamp,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await exchange.publish(copy, QUEUE, mandatory=True, timeout=CONNECT_SECONDS)
        await message.ack()
        log.error(
            "consumer.dead_lettered",
            message_id=message.message_id,
            reason=dead.reason,
            attempts=dead.attempts,
        )


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
