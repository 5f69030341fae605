"""Consuming from RabbitMQ: one subscription to the saga queue, which feeds the consumer and acknowledges what it did.

A message is acknowledged when it has taken effect, or when its copy in the dead-letter queue is confirmed; until then
the broker has it, and delivers it again when this connection ends. The copy goes over a connection of its own: an alarm
that blocks publishing must not keep the acknowledgements of all the others from the broker.

Silence is not trusted. Every `watch_seconds` the topology is declared again over the same connection, which restores a
binding or a queue that somebody deleted, fails on a connection that is only half there (sooner than heartbeats would),
and tells how many messages are ready. If there are some, twice in a row, and nothing was delivered between or is under
way, then the broker has forgotten this consumer: it connects anew.
"""

import asyncio
from collections.abc import Callable, Collection
from functools import partial

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, HeadersType
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from app.errors import BrokerUnavailable, DatabaseUnavailable
from app.loops import Loop
from app.messaging.consumer import Consumer, Dead, Handled, Retry
from app.messaging.envelope import UnreadableMessage, parse
from app.messaging.rabbitmq.transport import (
    CONNECT_SECONDS,
    DEAD_LETTER_EXCHANGE,
    QUEUE,
    SETUP_SECONDS,
    close,
    connect,
    copied,
    declare_topology,
    frame_limit,
    unavailable,
    unblocked,
)

log = structlog.get_logger(__name__)

WATCH_SECONDS = 10.0
DATABASE_PAUSE_SECONDS = 1.0  # between tries while Postgres is out; the message stays with us, unacknowledged
SET_ASIDE_PAUSE_SECONDS = 1.0  # the same while no dead letter can be published


class Subscription:
    """Consumes the saga queue until `stop`, connecting again whenever the connection is lost."""

    def __init__(
        self,
        url: str,
        consumer: Consumer,
        routing_keys: Collection[str],
        prefetch: int,
        watch_seconds: float = WATCH_SECONDS,
        require: Callable[[], None] = lambda: None,  # raises while this process must not consume
    ) -> None:
        self._url = url
        self._consumer = consumer
        self._routing_keys = routing_keys
        self._prefetch = prefetch
        self._watch_seconds = watch_seconds
        self._require = require
        self._loop = Loop("consumer", self._consume, poll_seconds=0.1)
        self._ended = asyncio.Event()  # of the present connection: lost, or told to stop
        self._ended.set()
        self._outage = BrokerUnavailable("the consumer is not connected")  # the last one
        self._stopping = False
        self._under_way: set[asyncio.Task[None]] = set()
        self._deliveries = 0
        self._aside = _Aside(url, routing_keys)

    @property
    def connected(self) -> bool:
        """Whether it is consuming right now."""
        return not self._ended.is_set()

    def check(self) -> None:
        """Raise BrokerUnavailable, with the reason, while it does not consume."""
        if not self.connected:
            raise self._outage

    async def run(self) -> None:
        """Consume until `stop`."""
        await self._loop.run()

    def stop(self) -> None:
        """Take no more messages; finish what is under way, then end."""
        self._stopping = True
        self._loop.stop()
        self._ended.set()

    async def _consume(self) -> int:
        self._require()
        try:
            return await self._consume_until_lost()
        except BrokerUnavailable as error:
            self._outage = error
            raise

    async def _consume_until_lost(self) -> int:
        connection = await connect(self._url, "orders consumer")
        ended = asyncio.Event()
        try:
            async with asyncio.timeout(SETUP_SECONDS):
                channel = await connection.channel(publisher_confirms=False)
                await channel.set_qos(prefetch_count=self._prefetch)
                queue = await declare_topology(connection, channel, self._routing_keys)
            channel.close_callbacks.add(lambda *_: ended.set())
            # A queue that was deleted takes its consumers along and leaves connection and channel open: silence.
            underlay = await channel.get_underlay_channel()
            underlay.on_consumer_cancel_callbacks.add(lambda _: ended.set())
            if self._stopping:
                return 0
            tag = await queue.consume(partial(self._accept, ended), timeout=SETUP_SECONDS)
            self._ended = ended
            log.info("consumer.started", queue=QUEUE)
            if self._stopping:
                ended.set()  # `stop` could not yet
            await self._watch(connection, channel, ended)
            if self._stopping:
                await queue.cancel(tag, timeout=CONNECT_SECONDS)
                if self._under_way:
                    await asyncio.wait(self._under_way)
                return 0
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            raise unavailable(error) from error
        finally:
            ended.set()
            await close(connection)
            await self._aside.close()
        raise BrokerUnavailable("rabbitmq: the connection was lost")

    async def _watch(self, connection: AbstractConnection, channel: AbstractChannel, ended: asyncio.Event) -> None:
        """Return when `ended` is set. Raises BrokerUnavailable when messages wait and none is delivered."""
        deliveries, silent_looks = self._deliveries, 0
        while not await _is_set_within(ended, self._watch_seconds):
            async with asyncio.timeout(SETUP_SECONDS):
                queue = await declare_topology(connection, channel, self._routing_keys)
            waiting = queue.declaration_result.message_count
            silent = waiting and deliveries == self._deliveries and not self._under_way
            silent_looks = silent_looks + 1 if silent else 0
            if silent_looks == 2:  # noqa: PLR2004 - once may be a message that is on its way to us
                raise BrokerUnavailable("rabbitmq: messages wait in the queue, and none is delivered")
            deliveries = self._deliveries

    async def _accept(self, ended: asyncio.Event, message: AbstractIncomingMessage) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - bug: aio-pika runs each delivery in a task of its own
        self._under_way.add(task)
        self._deliveries += 1
        try:
            await self._process(ended, message)
        except Exception as error:  # noqa: BLE001 - the edge: unacknowledged means delivered again on a new connection
            log.warning("consumer.not_acknowledged", message_id=message.message_id, error=repr(error))
            ended.set()
        finally:
            self._under_way.discard(task)

    async def _process(self, ended: asyncio.Event, message: AbstractIncomingMessage) -> None:
        """Handle one delivery to its end, or until the connection is gone (then it will be delivered again)."""
        try:
            envelope = parse(message.headers, message.body)
        except UnreadableMessage as error:
            await self._set_aside(ended, message, self._consumer.dead(f"unreadable: {error}"))
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
                        await self._set_aside(ended, message, verdict)
                        return
                    case Retry(in_seconds=pause):
                        pass
            if await _is_set_within(ended, pause):
                return

    async def _set_aside(self, ended: asyncio.Event, message: AbstractIncomingMessage, dead: Dead) -> None:
        """Publish to the dead-letter exchange, confirmed, and only then acknowledge."""
        story: HeadersType = {
            "x-reason": dead.reason,
            "x-attempts": dead.attempts,
            "x-first-failure-at": dead.first_failure_at.isoformat(),
            "x-last-failure-at": dead.last_failure_at.isoformat(),
        }
        copy = copied(message, message.headers, frame_limit(message), story)
        while True:
            try:
                await self._aside.publish(copy)
                break
            except BrokerUnavailable as error:
                log.warning("consumer.not_set_aside", message_id=message.message_id, error=str(error))
            if await _is_set_within(ended, SET_ASIDE_PAUSE_SECONDS):
                return
        await message.ack()
        self._consumer.gave_up()
        log.error(
            "consumer.dead_lettered",
            message_id=message.message_id,
            reason=dead.reason,
            attempts=dead.attempts,
        )


class _Aside:
    """Publishes dead letters, one at a time, over a connection that it opens when it needs one."""

    def __init__(self, url: str, routing_keys: Collection[str]) -> None:
        self._url = url
        self._routing_keys = routing_keys
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._turn = asyncio.Lock()

    async def publish(self, message: aio_pika.Message) -> None:
        """Return when the broker has it in the dead-letter queue. Raises BrokerUnavailable."""
        async with self._turn:
            try:
                async with asyncio.timeout(SETUP_SECONDS):
                    if self._connection is None or self._channel is None:
                        self._connection = await connect(self._url, "orders dead letters")
                        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
                        await declare_topology(self._connection, self._channel, self._routing_keys)
                    await unblocked(self._connection)  # what is sent before, the broker keeps, and so it does each try
                    exchange = await self._channel.get_exchange(DEAD_LETTER_EXCHANGE, ensure=False)
                    await exchange.publish(message, QUEUE, mandatory=True)
            except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
                await self.close()
                raise unavailable(error) from error

    async def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection, self._channel = self._connection, None, None
        await close(connection)


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
