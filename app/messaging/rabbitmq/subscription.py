"""Consume one RabbitMQ queue: feed its consumer and acknowledge the messages.

A message is acknowledged when it has taken effect, or when its copy in the dead-letter queue is confirmed. Until then
the broker keeps it, and delivers it again when this connection ends. The copy is published on a separate connection:
an alarm that blocks publishing must not block the acknowledgements of other messages.

A silent connection may be broken. So every `watch_seconds` the topology is declared again over it. That restores a
deleted binding or queue, fails on a half-open connection (sooner than heartbeats do), and returns how many messages are
ready. If messages are ready twice in a row, and none was delivered in between or is in progress, the broker has lost
this consumer, and the subscription reconnects.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, HeadersType
from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from app.errors import BrokerUnavailable
from app.loops import Loop
from app.messaging.consumer import Consumer, Dead, Handled
from app.messaging.delivery import failure_headers, handle_to_end, is_set_within
from app.messaging.facts import MessageDeadLettered
from app.messaging.rabbitmq.connection import (
    CONNECT_SECONDS,
    SETUP_SECONDS,
    close,
    connect,
    unavailable,
    wait_until_unblocked,
)
from app.messaging.rabbitmq.messages import clone_message, frame_limit
from app.messaging.rabbitmq.topology import declare
from app.messaging.topology import DEAD_LETTER_EXCHANGE, QueueSpec
from app.observability.facts import LoopSucceeded

log = structlog.get_logger(__name__)

WATCH_SECONDS = 10.0
DEAD_LETTER_PAUSE_SECONDS = 1.0  # between attempts while no dead letter can be published


class RabbitSubscription:
    """Consumes one queue until `stop`, and reconnects whenever the connection is lost."""

    def __init__(
        self,
        url: str,
        consumer: Consumer,
        queue: QueueSpec,
        prefetch: int,
        watch_seconds: float = WATCH_SECONDS,
        require: Callable[[], None] = lambda: None,  # raises while this process must not consume
    ) -> None:
        self._url = url
        self._consumer = consumer
        self._queue = queue
        self._prefetch = prefetch
        self._watch_seconds = watch_seconds
        self._require = require
        self._loop = Loop("consumer", self._consume, poll_seconds=0.1)
        self._ended = asyncio.Event()  # the current connection is lost, or `stop` was called
        self._ended.set()
        self._outage = BrokerUnavailable("the consumer is not connected")  # the last one
        self._stopping = False
        self._in_progress: set[asyncio.Task[None]] = set()
        self._deliveries = 0
        self._dead_letters = _DeadLetterPublisher(url, queue)

    @property
    def connected(self) -> bool:
        """Whether the subscription is consuming now."""
        return not self._ended.is_set()

    def check(self) -> None:
        """Raise BrokerUnavailable with the reason while it is not consuming."""
        if not self.connected:
            raise self._outage

    async def run(self) -> None:
        """Consume until `stop`."""
        await self._loop.run()

    def stop(self) -> None:
        """Take no more messages, finish those in progress, then end."""
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
                queue = await declare(connection, channel, self._queue)
            channel.close_callbacks.add(lambda *_: ended.set())
            # Deleting a queue ends its consumers, but leaves connection and channel open.
            underlay = await channel.get_underlay_channel()
            underlay.on_consumer_cancel_callbacks.add(lambda _: ended.set())
            if self._stopping:
                return 0
            tag = await queue.consume(partial(self._accept, ended), timeout=SETUP_SECONDS)
            self._ended = ended
            log.info("consumer.started", queue=self._queue.name)
            self._report_success()
            if self._stopping:
                ended.set()  # `stop` was called before `_ended` was this event
            await self._watch(connection, channel, ended)
            if self._stopping:
                await queue.cancel(tag, timeout=CONNECT_SECONDS)
                if self._in_progress:
                    await asyncio.wait(self._in_progress)
                return 0
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            raise unavailable(error) from error
        finally:
            ended.set()
            await close(connection)
            await self._dead_letters.close()
        raise BrokerUnavailable("rabbitmq: the connection was lost")

    async def _watch(self, connection: AbstractConnection, channel: AbstractChannel, ended: asyncio.Event) -> None:
        """Return when `ended` is set. Raises BrokerUnavailable when messages wait and none is delivered."""
        deliveries, silent_checks = self._deliveries, 0
        while not await is_set_within(ended, self._watch_seconds):
            async with asyncio.timeout(SETUP_SECONDS):
                queue = await declare(connection, channel, self._queue)
            waiting = queue.declaration_result.message_count
            silent = waiting and deliveries == self._deliveries and not self._in_progress
            silent_checks = silent_checks + 1 if silent else 0
            if silent_checks == 2:  # noqa: PLR2004 - the first time, a message may be in transit
                raise BrokerUnavailable("rabbitmq: messages wait in the queue, and none is delivered")
            deliveries = self._deliveries
            self._report_success()

    def _report_success(self) -> None:
        """Report that the broker has this consumer. A run of the loop itself ends only when the connection is lost."""
        self._consumer.signals.emit(LoopSucceeded(self._loop.name))

    async def _accept(self, ended: asyncio.Event, message: AbstractIncomingMessage) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - bug: aio-pika runs each delivery in a task of its own
        self._in_progress.add(task)
        self._deliveries += 1
        try:
            await self._process(ended, message)
        except Exception as error:  # noqa: BLE001 - the edge: the message is delivered again on a new connection
            log.warning("consumer.not_acknowledged", message_id=message.message_id, error=repr(error))
            ended.set()
        finally:
            self._in_progress.discard(task)

    async def _process(self, ended: asyncio.Event, message: AbstractIncomingMessage) -> None:
        """Handle one delivery to its end, or until the connection is lost; then the broker delivers it again."""
        match await handle_to_end(self._consumer, message.headers, message.body, ended):
            case Handled():
                await message.ack()
            case Dead() as dead:
                await self._dead_letter(ended, message, dead)

    async def _dead_letter(self, ended: asyncio.Event, message: AbstractIncomingMessage, dead: Dead) -> None:
        """Publish the message to the dead-letter exchange, and acknowledge it once that is confirmed."""
        failures: HeadersType = dict(failure_headers(dead))
        copy = clone_message(message, message.headers, frame_limit(message), failures)
        while True:
            try:
                await self._dead_letters.publish(copy)
                break
            except BrokerUnavailable as error:
                log.warning("consumer.not_dead_letter", message_id=message.message_id, error=str(error))
            if await is_set_within(ended, DEAD_LETTER_PAUSE_SECONDS):
                return
        await message.ack()
        self._consumer.signals.emit(MessageDeadLettered(message.message_id or "-", dead.reason, dead.attempts))


class _DeadLetterPublisher:
    """Publishes dead letters one at a time, over a connection that it opens when needed."""

    def __init__(self, url: str, queue: QueueSpec) -> None:
        self._url = url
        self._queue = queue
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._lock = asyncio.Lock()

    async def publish(self, message: aio_pika.Message) -> None:
        """Publish the message, and wait for its confirm. Raises BrokerUnavailable."""
        async with self._lock:
            try:
                async with asyncio.timeout(SETUP_SECONDS):
                    if self._connection is None or self._channel is None:
                        self._connection = await connect(self._url, "orders dead letters")
                        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
                        await declare(self._connection, self._channel, self._queue)
                    # While it blocks, the broker would keep a copy from each attempt.
                    await wait_until_unblocked(self._connection)
                    exchange = await self._channel.get_exchange(DEAD_LETTER_EXCHANGE, ensure=False)
                    await exchange.publish(message, self._queue.name, mandatory=True)
            except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
                await self.close()
                raise unavailable(error) from error

    async def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection, self._channel = self._connection, None, None
        await close(connection)
